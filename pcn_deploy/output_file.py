"""Files that a command writes: refused early where they cannot be, and written whole or with our words."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from pcn_deploy.errors import OutputError


def check_output(path: Path, *, overwrite: bool, option: str = "-o", example: str = "model.pcn") -> None:
    """Refuse early what could not be written after a long run.

    Args:
        path: The file.
        overwrite: Whether one that exists may be replaced.
        option: What the user gave it with.
        example: What such a file may be called.

    Raises:
        OutputError: If the file exists and may not be replaced, or its folder is missing or not writable.
    """
    try:
        exists = path.exists()
    except OSError as error:
        msg = f"{path} cannot be a file here: {error.strerror}. Choose another path with {option}."
        raise OutputError(msg) from error
    if path.is_dir():
        msg = f"{path} is a folder; {option} takes a file name such as {path / example}."
        raise OutputError(msg)
    if exists and not overwrite:
        msg = f"{path} exists. Give --overwrite to replace it, or another path with {option}."
        raise OutputError(msg)
    if not path.parent.is_dir():
        msg = f"The folder {path.parent} does not exist. Create it, or choose another path with {option}."
        raise OutputError(msg)
    if not os.access(path.parent, os.W_OK):
        msg = f"The folder {path.parent} is not writable. Choose another path with {option}."
        raise OutputError(msg)
    try:
        tempfile.TemporaryFile(dir=path.parent, prefix=path.name).close()
    except OSError as error:
        msg = f"{path} cannot be written: {error.strerror}. Choose another path with {option}."
        raise OutputError(msg) from error


@contextmanager
def replacing(path: Path, *, option: str = "-o") -> Iterator[IO[bytes]]:
    """A file beside `path` that takes its place when the body is done; after an error `path` is as it was.

    Args:
        path: The file.
        option: What the user gave it with.

    Raises:
        OutputError: If it cannot be written.
    """
    temporary = None
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o666 & ~_umask())
        Path(temporary).replace(path)
    except OSError as error:
        msg = f"{path} cannot be written: {error.strerror or error}. Choose another path with {option}."
        raise OutputError(msg) from error
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)


def write_text(path: Path, text: str, *, option: str = "-o") -> None:
    """Write a file whole, in UTF-8.

    Args:
        path: The file.
        text: What it is to hold.
        option: What the user gave it with.

    Raises:
        OutputError: If it cannot be written.
    """
    with replacing(path, option=option) as file:
        file.write(text.encode())


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
