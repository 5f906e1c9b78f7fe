"""Give freed memory back to the system, and keep large data out of memory. Standard library only."""

from __future__ import annotations

import ctypes
import gc
import platform
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pcn_deploy.errors import OutputError

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # parameters of mallopt, from malloc.h
_LARGE = 2**20

_owned = False


def own_process() -> None:
    """Say that this process is ours, as a command's is: its allocator may be told when to give memory back.

    That holds for the whole process and cannot be read, so a library must not change it under its caller.
    """
    global _owned
    _owned = True


def release_unused() -> None:
    """Return freed memory to the system, so that the next step does not add its peak to the last one's.

    Only glibc keeps freed memory for itself and has a call to end that; elsewhere nothing happens. On a build of
    PatchConvNet-S60 in INT8 it lowered the peak by 46 MiB with the rest in FP32, by 4 MiB with the rest in FP16.
    """
    gc.collect()
    return_freed()


def return_freed() -> None:
    """Return freed memory as `release_unused` does, after steps that leave nothing large in cycles of objects.

    To look for such cycles takes a quarter of a second where torch and its exporter are loaded.
    """
    libc = _glibc()
    if libc is not None:
        libc.malloc_trim(0)


@contextmanager
def large_blocks_returned() -> Iterator[None]:
    """Return blocks of 1 MiB and more to the system the moment they are freed, not when the heap's end is free.

    For steps that copy all weights, in a process of our own. Left to itself, glibc raises the limit above which it does
    so to 32 MiB, which few weights reach, and keeps what is freed below. Afterwards the limits are where it leaves
    them, see mallopt(3).
    """
    libc = _glibc() if _owned else None
    if libc is None:
        yield
        return
    libc.mallopt(_MMAP_THRESHOLD, _LARGE)
    try:
        yield
    finally:
        libc.mallopt(_MMAP_THRESHOLD, 32 * 2**20)
        libc.mallopt(_TRIM_THRESHOLD, 64 * 2**20)


@contextmanager
def temporary_path(name: str) -> Iterator[Path]:
    """A path in a private folder that is removed afterwards.

    Args:
        name: Name of the file.

    Raises:
        OutputError: If there is no room for temporary files.
    """
    try:
        with tempfile.TemporaryDirectory(prefix="pcn-deploy-") as folder:
            yield Path(folder) / name
    except OSError as error:
        raise output_error(name, error) from error


def output_error(name: str, error: Exception) -> OutputError:
    """The error for a folder of temporary files that cannot take a file."""
    msg = f"The folder for temporary files, {tempfile.gettempdir()}, cannot hold {name}: {error}. Set TMPDIR."
    return OutputError(msg)


def _glibc() -> Any:
    return ctypes.CDLL("libc.so.6") if platform.libc_ver()[0] == "glibc" else None
