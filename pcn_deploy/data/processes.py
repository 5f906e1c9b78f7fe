"""Several processes, on one machine or many, that share the images of a run.

Started by torchrun, each takes every n-th batch, and what they saw is merged exactly: counts are integers, maxima are
maxima. Everything goes through gloo on the CPU, where the statistics are; a job whose own process group is NCCL gets
a gloo group beside it. torch is imported only where there is more than one process.

A process that fails tells the others: all of them raise its error. One that dies is noticed by its closed connection.
"""

from __future__ import annotations

import atexit
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt

from pcn_deploy import errors
from pcn_deploy.errors import DataError, PcnDeployError, ProcessError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

TIMEOUT = timedelta(days=1)
"""Longest wait for another process; process 0 builds and proves alone while the others wait for its verdict."""

T = TypeVar("T")


class Processes:
    """The processes of a run; this class is the one that is alone.

    Attributes:
        rank: Number of this process.
        count: How many there are.
    """

    rank = 0
    count = 1

    @property
    def first(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0

    def sum(self, counts: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Sum over the processes, of any shape."""
        return counts

    def max(self, values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Largest over the processes, of any shape."""
        return values

    def gather(self, data: bytes) -> list[bytes]:
        """What each process gave, in the order of their numbers."""
        return [data]

    def check_equal(self, **facts: Any) -> None:
        """Refuse to merge what processes see of different networks or images.

        Args:
            facts: What must be equal, as JSON can hold it; the names go into the message.

        Raises:
            DataError: If a process has others than process 0.
        """
        every = [json.loads(text) for text in self.gather(json.dumps(facts, allow_nan=False).encode())]
        for rank, theirs in enumerate(every):
            differing = [key for key in facts if theirs[key] != every[0][key]]
            if differing:
                msg = f"Process {rank} has other {', '.join(differing)} than process 0. Give all the same files."
                raise DataError(msg)


class _Group(Processes):
    """One of several; every call is made by all of them, in the same order."""

    def __init__(self, group: ProcessGroup) -> None:
        import torch.distributed as dist

        self._group = group
        self._broken = False
        self.rank, self.count = dist.get_rank(), dist.get_world_size()

    def sum(self, counts: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        return self._reduce(counts, "SUM")

    def max(self, values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        return self._reduce(values, "MAX")

    def gather(self, data: bytes) -> list[bytes]:
        self.meet()
        return self._contact(lambda: self._exchange(data))

    def meet(self, failure: str = "") -> None:
        """Wait for all processes, telling them of a failure here; raises if another has failed."""
        told = self._contact(lambda: self._exchange(failure.encode()))
        for rank, text in enumerate(told):
            if text and rank != self.rank:
                self._broken = True
                name, message = json.loads(text)
                msg = f"Process {rank} of {self.count}: {message}"
                raise _error_class(name)(msg)

    def tell(self, error: Exception) -> None:
        """Let the others fail too, unless they know already."""
        if self._broken:
            return
        text = str(error) if isinstance(error, PcnDeployError) else f"{type(error).__name__}: {error}"
        with suppress(PcnDeployError):
            self.meet(json.dumps([type(error).__name__, text]))

    def _reduce(self, values: npt.NDArray[Any], operation: str) -> npt.NDArray[Any]:
        import torch
        import torch.distributed as dist

        self.meet()
        tensor = torch.from_numpy(values.copy())
        self._contact(lambda: dist.all_reduce(tensor, getattr(dist.ReduceOp, operation), group=self._group))
        reduced: npt.NDArray[Any] = tensor.numpy()
        return reduced

    def _exchange(self, data: bytes) -> list[bytes]:
        import torch
        import torch.distributed as dist

        sizes = torch.zeros(self.count, dtype=torch.int64)
        sizes[self.rank] = len(data)
        dist.all_reduce(sizes, group=self._group)
        padded = torch.zeros(int(sizes.max()), dtype=torch.uint8)
        if not len(padded):
            return [b""] * self.count
        padded[: len(data)] = torch.from_numpy(np.frombuffer(data, np.uint8).copy())
        rows = [torch.empty_like(padded) for _ in range(self.count)]
        dist.all_gather(rows, padded, group=self._group)
        return [row.numpy().tobytes()[:size] for row, size in zip(rows, sizes.tolist(), strict=True)]

    def _contact(self, call: Callable[[], T]) -> T:
        try:
            return call()
        except RuntimeError as error:
            self._broken = True
            msg = (
                f"Process {self.rank} of {self.count} lost contact with the others: one of them died, or did not "
                f"answer for {TIMEOUT}. Its own message tells why. ({str(error).split('. ')[0]})"
            )
            raise ProcessError(msg) from error


def _error_class(name: str) -> type[PcnDeployError]:
    error_class = getattr(errors, name, ProcessError)
    return error_class if isinstance(error_class, type) and issubclass(error_class, PcnDeployError) else ProcessError


_current = Processes()


def current() -> Processes:
    """The processes that share the work of this one: itself alone, except within `join`."""
    return _current


def is_first() -> bool:
    """Whether this is the process that prints, by torchrun's environment."""
    return os.environ.get("RANK", "0") == "0" or not _several()


@contextmanager
def join() -> Iterator[Processes]:
    """Share calibrations, searches, analyses and verifications in the body with the other processes of this run.

    All processes run the same body. Without torchrun, or another process group of several, the body runs alone. A
    default process group is made where there is none, and stays until the program ends.

    Yields:
        The processes.

    Raises:
        ProcessError: If the others cannot be reached; and what any of them raised in its body.
    """
    global _current
    if not _several():
        yield _current
        return
    previous, (processes, leave) = _current, _connect()
    _current = processes
    try:
        yield processes
        processes.meet()
    except Exception as error:
        processes.tell(error)
        raise
    finally:
        _current = previous
        leave()


def _several() -> bool:
    if os.environ.get("WORLD_SIZE", "1") not in ("", "1"):
        return True
    dist = sys.modules.get("torch.distributed")
    return dist is not None and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


@contextmanager
def _printing_to_stderr() -> Iterator[None]:
    """Gloo of torch 2.9 says on standard output that it connects, where results and JSON have their place."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def _connect() -> tuple[_Group, Callable[[], None]]:
    """A group of its own for each `join`; the default group, which cannot be made twice, is left to later ones."""
    import torch.distributed as dist

    try:
        with _printing_to_stderr():
            if not dist.is_initialized():
                dist.init_process_group("gloo", timeout=TIMEOUT)
                atexit.register(lambda: dist.is_initialized() and dist.destroy_process_group())
            group = dist.new_group(backend="gloo", timeout=TIMEOUT)
    except (ValueError, RuntimeError) as error:
        msg = f"The other processes cannot be reached ({error}). Start them with torchrun, or unset WORLD_SIZE."
        raise ProcessError(msg) from error
    return _Group(group), lambda: dist.destroy_process_group(group)
