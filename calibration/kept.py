"""The file of a calibration cache, read and looked at before anything long is done. Standard library only."""

from __future__ import annotations

import os
from pathlib import Path

from pcn_deploy.errors import DataError, OutputError

_MAX_BYTES = 2**30


def read_cache(path: Path) -> bytes:
    """The text of a kept calibration; empty if it is yet to be written.

    Raises:
        DataError: If it cannot be read.
        OutputError: If it could not be written either.
    """
    try:
        if not path.exists():
            _check_writable(path)
            return b""
        if path.stat().st_size <= _MAX_BYTES:
            return path.read_bytes() or b"\0"
        reason = f"it has {path.stat().st_size} bytes"
    except OSError as error:
        reason = str(error.strerror)
    msg = f"The calibration cache {path} cannot be read: {reason}. Give another path."
    raise DataError(msg)


def _check_writable(path: Path) -> None:
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        msg = f"The calibration cache {path} cannot be written: {path.parent} is no folder that can be written to."
        raise OutputError(msg)
