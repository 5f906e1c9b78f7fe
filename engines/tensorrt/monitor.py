"""Progress of a build: TensorRT's tree of phases and steps, told as one number that only grows."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pcn_deploy.progress import Progress

_TOTAL = 1000


@dataclass
class _Phase:
    name: str
    steps: int
    done: int = 0


class Meter:
    """Turns phases and steps into calls of a `Progress`: never back, and to the end once, in `finish`.

    Args:
        progress: Who is told.
        step: Name the build is told under.
        stop: Asked after each step whether the build is to be cancelled.

    Attributes:
        error: What `progress` raised, to be raised again outside TensorRT; None if nothing.
    """

    def __init__(self, progress: Progress, step: str, stop: Callable[[], bool] = lambda: False) -> None:
        self.error: BaseException | None = None
        self._progress, self._step, self._stop = progress, step, stop
        self._open: list[_Phase] = []
        self._told = -1
        self._lock = threading.Lock()  # TensorRT may call from several threads

    def start(self) -> None:
        """Tell that the build begins."""
        self._tell(0)

    def finish(self) -> None:
        """Tell that the build is over."""
        self._tell(_TOTAL)

    def phase_start(self, name: str, parent: str | None, steps: int) -> None:
        """Open a phase inside its parent; phases that were left open beside it are over."""
        with self._lock:
            level = self._level(parent)
            del self._open[0 if level is None else level + 1 :]
            self._open.append(_Phase(name, max(steps, 1)))

    def step_complete(self, name: str, index: int) -> bool:
        """Count a step, and say whether to go on."""
        with self._lock:
            level = self._level(name)
            if level is not None:
                del self._open[level + 1 :]
                self._open[level].done = min(index + 1, self._open[level].steps)
            self._tell(min(int(self._fraction() * _TOTAL), _TOTAL - 1))
            return self.error is None and not self._stop()

    def phase_finish(self, name: str) -> None:
        """Close a phase, and all that are open inside it."""
        with self._lock:
            level = self._level(name)
            if level is not None:
                del self._open[level:]

    def _level(self, name: str | None) -> int | None:
        return next((level for level, phase in enumerate(self._open) if phase.name == name), None)

    def _fraction(self) -> float:
        share, total = 1.0, 0.0
        for phase in self._open:
            share /= phase.steps
            total += share * phase.done
        return total

    def _tell(self, done: int) -> None:
        if done <= self._told or self.error is not None:
            return
        self._told = done
        try:
            self._progress(self._step, done, _TOTAL)
        except BaseException as error:  # must not unwind through TensorRT: kept, and raised after the build
            self.error = error


def attach(trt: Any, config: Any, meter: Meter) -> Any:
    """Let TensorRT report to a meter.

    Args:
        trt: The loaded bindings.
        config: The builder configuration.
        meter: Who is told.

    Returns:
        The monitor, which must outlive the build; None where this version has none.
    """
    if not hasattr(trt, "IProgressMonitor"):
        return None

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]  # the base is loaded at run time
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, name: str, parent: str | None, steps: int) -> None:
            meter.phase_start(name, parent, steps)

        def step_complete(self, name: str, index: int) -> bool:
            return meter.step_complete(name, index)

        def phase_finish(self, name: str) -> None:
            meter.phase_finish(name)

    monitor = Monitor()
    config.progress_monitor = monitor
    return monitor
