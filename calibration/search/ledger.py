"""Measurements kept in a file as they are made, so that a run that was killed goes on where it stopped.

One JSON object per line: first the identity of the run, then one measurement each.
"""

from __future__ import annotations

import copy
import json
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pcn_deploy.data.processes import current
from pcn_deploy.errors import DataError, OutputError

_VERSION = 2


def _checksum(name: str, value: Any) -> int:
    return zlib.crc32(json.dumps([name, value]).encode())


def _checked(name: str, value: Any, checksum: int) -> str:
    if checksum != _checksum(name, value):
        msg = f"the measurement {name!r} was altered"
        raise ValueError(msg)
    return name


class Ledger:
    """Measurements by name, appended to a file.

    Args:
        path: The file; None keeps the measurements in memory only.
        identity: What the measurements depend on: digests, options, layers; plain values.

    Attributes:
        resumed: Number of measurements found in the file.

    Raises:
        DataError: If the file belongs to another run, or is no such file.
        OutputError: If it cannot be written.
    """

    def __init__(self, path: Path | None, identity: dict[str, Any]) -> None:
        self._path = path
        self._prefix = ""
        self._measurements: dict[str, Any] = {}
        head = json.loads(json.dumps({"version": _VERSION, **identity}, allow_nan=False))
        if path is not None and path.exists():
            self._read(path, head)
        else:
            self._write(json.dumps(head))
        self.resumed = len(self._measurements)

    @classmethod
    def of_all(cls, path: Path | None, identity: dict[str, Any]) -> Ledger:
        """The ledger that the processes of a run share: process 0 keeps the file, all know what is in it.

        Every process must then write the same.

        Args:
            path: The file; None keeps the measurements in memory only.
            identity: As above.

        Raises:
            DataError: As above, or if the processes measure on different things.
        """
        processes = current()
        processes.check_equal(**identity)
        ledger = cls(path if processes.first else None, identity)
        ledger._measurements = json.loads(processes.gather(json.dumps(ledger._measurements).encode())[0])
        ledger.resumed = len(ledger._measurements)
        return ledger

    def measure(self, names: Sequence[str], measure: Callable[[str], Any], done: Callable[[int], None]) -> None:
        """Fill in what is missing; the processes of a run share it out.

        Args:
            names: What is wanted.
            measure: Measures one of them; plain values.
            done: Told how many are there.
        """
        processes, missing = current(), [name for name in names if name not in self]
        for start in range(0, len(missing), processes.count):
            done(len(names) - len(missing) + start)
            own = missing[start : start + processes.count][processes.rank : processes.rank + 1]
            for text in processes.gather(json.dumps({name: measure(name) for name in own}, allow_nan=False).encode()):
                for name, value in json.loads(text).items():
                    self[name] = value
        done(len(names))

    def __contains__(self, name: str) -> bool:
        return self._prefix + name in self._measurements

    def __getitem__(self, name: str) -> Any:
        return self._measurements[self._prefix + name]

    def __setitem__(self, name: str, value: Any) -> None:
        name = self._prefix + name
        self._measurements[name] = value
        self._write(json.dumps([name, value, _checksum(name, value)], allow_nan=False))

    def part(self, name: str) -> Ledger:
        """The same file for measurements of something else under the same names."""
        part = copy.copy(self)
        part._prefix = f"{self._prefix}{name}/"
        return part

    def remove(self) -> None:
        """Delete the file: the run is complete."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)

    def _read(self, path: Path, head: dict[str, Any]) -> None:
        try:
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
            if not (lines and lines[0].endswith("\n")):  # killed while the head was written: nothing is lost
                path.unlink()
                self._write(json.dumps(head))
                return
            written = dict(json.loads(lines[0]))
            # a line that was being written when the run was killed has no end
            entries = [json.loads(line) for line in lines[1:] if line.endswith("\n")]
            self._measurements = {_checked(*entry): entry[1] for entry in entries}
        except (OSError, ValueError, TypeError, RecursionError) as error:
            msg = f"{path} does not hold the measurements of an earlier run ({error}). Remove it, or name another file."
            raise DataError(msg) from error
        differing = sorted(key for key in {*head, *written} if head.get(key) != written.get(key))
        if differing:
            msg = (
                f"{path} holds the measurements of another run: {', '.join(differing)} differ. "
                "Remove it to start afresh, or repeat that run with the same weights, images and options."
            )
            raise DataError(msg)
        if lines and not lines[-1].endswith("\n"):
            path.write_text("".join(lines[:-1]), encoding="utf-8")

    def _write(self, line: str) -> None:
        if self._path is None:
            return
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError as error:
            msg = f"{self._path} cannot be written: {error}."
            raise OutputError(msg) from error
