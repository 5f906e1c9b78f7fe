"""The artefact: a stored ZIP whose manifest names every member with its size and SHA-256. No torch.

Reading trusts nothing: names are checked against traversal, sizes against the manifest before reading, hashes before
any byte reaches a deserialiser. Writing goes to a temporary file that is renamed when complete. Nothing is a pickle.
The format is described in docs/bundle.md.
"""

from __future__ import annotations

import hashlib
import io
import json
import tempfile
import threading
import weakref
import zipfile
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from pcn_deploy.artefact.manifest import OLDER, SCHEMA, EngineEntry, Manifest, Member, read_manifest
from pcn_deploy.calibration.kept import read_cache
from pcn_deploy.errors import BundleError
from pcn_deploy.members import CALIBRATION, MANIFEST, SIGNATURE
from pcn_deploy.memory import output_error
from pcn_deploy.output_file import check_output, replacing

_MAX_MANIFEST_BYTES = 16 * 2**20
_EPOCH = (1980, 1, 1, 0, 0, 0)
_ENCRYPTED = 0x1
# What zipfile raises on a damaged file, beside BadZipFile: encryption, an unknown method, a name that is no text.
_UNREADABLE = (zipfile.BadZipFile, OSError, EOFError, KeyError, RuntimeError, ValueError)


class Bundle:
    """Members by name and the manifest that describes them.

    Attributes:
        manifest: The manifest; `members` in it is kept true by this class.
        path: The file it was read from, or None.
    """

    def __init__(
        self, manifest: Manifest, members: Mapping[str, bytes] | None = None, path: Path | None = None
    ) -> None:
        self.manifest = manifest
        self.path = path
        self._spool: IO[bytes] | None = None
        self._spooled: dict[str, tuple[int, int]] = {}
        self._position = threading.Lock()  # an engine may be built from a member in another thread
        for name, data in (members or {}).items():
            self.add(name, data)

    @classmethod
    def open(cls, path: str | Path) -> Bundle:
        """Read and check the manifest of a file; members are checked when they are read.

        Raises:
            BundleError: If the file is missing, no bundle, truncated, inconsistent or of a newer schema.
        """
        path = Path(path)
        if not path.is_file():
            msg = f"Bundle {str(path)!r} does not exist. Build one with: pcn-compile build MODEL -o {path}"
            raise BundleError(msg)
        try:
            with zipfile.ZipFile(path) as archive:
                manifest = _read_manifest(archive, path)
                _check_members(archive, manifest, path)
        except _UNREADABLE as error:
            msg = f"{path} is not a bundle, or is truncated ({error}). Copy or build it again."
            raise BundleError(msg) from error
        return cls(read_manifest(manifest, path), path=path)

    def __contains__(self, name: str) -> bool:
        return name in self.manifest.members

    @property
    def engines(self) -> list[EngineEntry]:
        """Entries of the engines."""
        return self.manifest.engines

    def engine(self, target: str) -> EngineEntry:
        """The entry of one target.

        Raises:
            BundleError: If the bundle has no engine for it.
        """
        for entry in self.engines:
            if entry.target == target:
                return entry
        present = ", ".join(entry.target for entry in self.engines) or "none"
        slimmed = self.manifest.slimmed
        if slimmed and target in slimmed.targets:
            advice = self.left_out()
        else:
            advice = f"Add one with: pcn-compile engine {self.path or 'FILE.pcn'} --target {target}"
        msg = f"The bundle holds no engine for {target!r}; it holds: {present}. {advice}"
        raise BundleError(msg)

    def left_out(self) -> str:
        """Where that is which `slim` left out of this bundle, in a sentence."""
        digest = self.manifest.slimmed.source_sha256[:16] if self.manifest.slimmed else ""
        return f"`pcn-compile slim` left it out; the bundle that this one was made from has it (SHA-256 {digest}…)."

    def lacking(self, name: str, advice: str = "") -> BundleError:
        """The error for a member that is not here.

        Args:
            name: The member.
            advice: What to do about it, in a bundle from which it was not left out.
        """
        slimmed = self.manifest.slimmed
        if slimmed and name in slimmed.left_out:
            advice = self.left_out()
        return BundleError(f"{self.path or 'The bundle'} holds no {name}. {advice}".rstrip())

    def read(self, name: str) -> bytes:
        """Return a member after checking its size and SHA-256.

        Raises:
            BundleError: If it is absent, truncated or altered.
        """
        if name not in self:
            raise self.lacking(name)
        if self._spool is not None and name in self._spooled:
            start, size = self._spooled[name]
            with self._position:
                self._spool.seek(start)
                return self._spool.read(size)
        expected = self.manifest.members[name]
        try:
            with zipfile.ZipFile(self.path or "") as archive:
                data = archive.read(name)
        except _UNREADABLE as error:
            msg = f"{name} in {self.path} cannot be read ({error}): the bundle is truncated or altered."
            raise BundleError(msg) from error
        if len(data) != expected.bytes or _sha256(data) != expected.sha256:
            msg = (
                f"{name} in {self.path} is not what was packed: SHA-256 {_sha256(data)[:16]}… instead of "
                f"{expected.sha256[:16]}…. It is corrupt or was altered; do not use it. Copy or build it again."
            )
            raise BundleError(msg)
        return data

    def check_members(self) -> None:
        """Check the hash of every member, used or not.

        Raises:
            BundleError: If one is truncated or altered.
        """
        for name in self.manifest.members:
            self.read(name)

    def read_json(self, name: str) -> Any:
        """Return a JSON member, checked as by `read`.

        Raises:
            BundleError: If it is absent, altered, or no JSON.
        """
        try:
            return json.loads(self.read(name))
        except ValueError as error:
            msg = f"{name} in {self.path} is not JSON ({error})."
            raise BundleError(msg) from error

    def read_arrays(self, name: str) -> dict[str, npt.NDArray[Any]]:
        """Return the arrays of an `.npz` member, checked as by `read`; pickled objects are refused.

        Raises:
            BundleError: If it is absent, altered, or holds anything but arrays.
        """
        try:
            archive = np.load(io.BytesIO(self.read(name)), allow_pickle=False)
            return {key: archive[key] for key in archive.files}
        except (*_UNREADABLE, AttributeError) as error:
            msg = f"{name} in {self.path} holds no plain arrays ({error})."
            raise BundleError(msg) from error

    def add(self, name: str, data: bytes | memoryview) -> None:
        """Add or replace a member; it waits in an unnamed temporary file, not in memory, until `save`.

        What is waiting there already, as the graph that is the engine of several targets, is not written again.

        Raises:
            OutputError: If there is no room for temporary files.
        """
        entry = Member(sha256=_sha256(data), bytes=len(data))
        if name in self._spooled and self.manifest.members.get(name) == entry:
            return
        try:
            if self._spool is None:
                self._spool = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the bundle
                weakref.finalize(self, self._spool.close)
            with self._position:
                self._spooled[name] = (self._spool.seek(0, io.SEEK_END), len(data))
                self._spool.write(data)
                self._spool.flush()
        except OSError as error:
            raise output_error(name, error) from error
        self.manifest.members[name] = entry

    def add_json(self, name: str, data: Any) -> None:
        """Add or replace a JSON member; raises what `add` raises."""
        self.add(name, json.dumps(data, indent=1, allow_nan=False).encode())

    def add_engine(self, target: str, member: str, data: bytes | memoryview, built_with: dict[str, str]) -> None:
        """Add or replace an engine. A member shared with the portable graph is stored once."""
        self.add(member, data)
        stored = self.manifest.members[member]
        entry = EngineEntry(
            target=target, member=member, sha256=stored.sha256, bytes=stored.bytes, built_with=built_with
        )
        self.manifest.engines = [*(old for old in self.engines if old.target != target), entry]

    def save(self, path: str | Path, *, overwrite: bool = False) -> Path:
        """Write everything to a temporary file beside `path`, then rename it.

        Raises:
            OutputError: If the file exists and may not be replaced, or cannot be written.
        """
        path = Path(path)
        check_output(path, overwrite=overwrite)
        with replacing(path) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            archive.writestr(_entry(MANIFEST), json.dumps(self.manifest.to_json(), indent=1, allow_nan=False))
            for name in self.manifest.members:
                archive.writestr(_entry(name), self.read(name))
        if self._spool is not None:
            self._spool.close()
        self.path, self._spool, self._spooled = path, None, {}
        return path


def _read_manifest(archive: zipfile.ZipFile, path: Path) -> dict[str, Any]:
    try:
        info = archive.getinfo(MANIFEST)
        if not _is_plain(info) or archive.namelist().count(MANIFEST) != 1:
            msg = f"{path} has a {MANIFEST} that is compressed, encrypted or stored twice. Do not use it."
            raise BundleError(msg)
        if info.file_size > _MAX_MANIFEST_BYTES:
            msg = f"{path} has a manifest of {info.file_size} bytes; at most {_MAX_MANIFEST_BYTES} are read."
            raise BundleError(msg)
        manifest = json.loads(archive.read(MANIFEST))
        schema, members = manifest["schema"], manifest["members"]
        sizes = {name: (int(entry["bytes"]), str(entry["sha256"])) for name, entry in members.items()}
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        # golden.npz is an archive too: of a truncated bundle its directory may be the last one
        msg = f"{path} has no valid {MANIFEST} ({error}): it is not a bundle, or is truncated. Copy or build it again."
        raise BundleError(msg) from error
    if type(schema) is not int or schema not in (SCHEMA, *OLDER):
        advice = "Upgrade pcn-deploy." if isinstance(schema, int) and schema > SCHEMA else "Build it again."
        msg = f"{path} has bundle schema {schema}; this version reads schema {SCHEMA} and older. {advice}"
        raise BundleError(msg)
    for name in sizes:
        parts = PurePosixPath(name).parts
        if name.startswith("/") or "\\" in name or ".." in parts or not parts or ":" in name:
            msg = f"{path} names a member {name!r} outside the bundle. Do not use it."
            raise BundleError(msg)
    result: dict[str, Any] = manifest
    return result


def _check_members(archive: zipfile.ZipFile, manifest: dict[str, Any], path: Path) -> None:
    present = [info for info in archive.infolist() if info.filename != MANIFEST]
    names = [info.filename for info in present]
    declared = manifest["members"]
    signed = [SIGNATURE] if SIGNATURE in names else []
    if sorted(names) != sorted([*declared, *signed]):
        odd = sorted(set(names) ^ {*declared, *signed}) or ["a member stored twice"]
        msg = f"{path} does not hold what its manifest declares: {', '.join(odd)}. It is corrupt or was altered."
        raise BundleError(msg)
    for info in present:
        if info.filename not in signed and info.file_size != declared[info.filename]["bytes"]:
            msg = (
                f"{info.filename} in {path} has {info.file_size} bytes instead of "
                f"{declared[info.filename]['bytes']}. The bundle is corrupt or was altered."
            )
            raise BundleError(msg)
        if not _is_plain(info):
            msg = f"{info.filename} in {path} is compressed or encrypted; a bundle stores plain bytes. Do not use it."
            raise BundleError(msg)


def _is_plain(info: zipfile.ZipInfo) -> bool:
    return info.compress_type == zipfile.ZIP_STORED and not info.flag_bits & _ENCRYPTED


def _entry(name: str) -> zipfile.ZipInfo:
    """Header of a member; a fixed date keeps equal contents equal files."""
    return zipfile.ZipInfo(name, date_time=_EPOCH)


def _sha256(data: bytes | memoryview) -> str:
    return hashlib.sha256(data).hexdigest()


def read_calibration(path: Path) -> bytes:
    """The text of a calibration that a bundle or a calibration cache keeps; empty if a `.json` is yet to be written.

    Raises:
        BundleError: If it is a bundle that is corrupt, or was built without calibration.
        DataError: If it cannot be read.
        OutputError: If it could not be written either.
    """
    return Bundle.open(path).read(CALIBRATION) if path.suffix == ".pcn" else read_cache(path)
