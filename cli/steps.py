"""What a person sees of a long step: a bar at a terminal; in a log a line when it is over, and one every 10 s."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import click
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

SECONDS_BETWEEN_LINES = 10.0
"""Where stderr is no terminal, a step that takes longer says so often how far it is."""


class _RateColumn(ProgressColumn):
    """Units per second, or how much is done where the step has no unit."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        unit = task.fields["unit"]
        if unit and speed:
            return Text(f"{speed:.1f} {unit}/s", style="progress.data.speed")
        return Text(f"{task.percentage:.0f} %", style="progress.percentage")


def columns() -> tuple[ProgressColumn, ...]:
    """What a bar shows; it fits into 80 columns."""
    return (
        TextColumn("{task.description:<26}"),
        BarColumn(bar_width=12),
        TextColumn("{task.completed}/{task.total}"),
        _RateColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
    )


class Bars:
    """Turns calls of the library's progress callable into rich tasks."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._tasks: dict[str, TaskID] = {}

    def __call__(self, step: str, done: int, total: int, unit: str = "", /) -> None:
        """As `progress.Progress`."""
        if step not in self._tasks:
            self._tasks[step] = self._progress.add_task(step, total=total, unit=unit)
        self._progress.update(self._tasks[step], completed=done, total=total)


@dataclass
class _Step:
    """A step that is not over: when it started and how far it was then, and how far it is."""

    started: float
    first: int
    done: int
    total: int
    unit: str

    def line(self, name: str, now: float) -> str:
        """How far it is, how fast, and how long it will take at this rate, in whole seconds."""
        spent, made = now - self.started, self.done - self.first
        parts = [f"{name}: {self.done}/{self.total} {self.unit}".rstrip(), f"{spent:.0f} s"]
        if made > 0 and spent >= SECONDS_BETWEEN_LINES:
            parts += [f"{made / spent:.3g} {self.unit}/s"] if self.unit else []
            left = (self.total - self.done) * spent / made
            parts += [f"about {left:.0f} s left"] if self.done < self.total else []
        return ", ".join(parts)


class Lines:
    """One line when a step is over, and one every 10 s of a step that takes longer, also while it tells nothing.

    Args:
        clock: Seconds that only grow.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._steps: dict[str, _Step] = {}
        self._current = ""
        self._told = clock()
        self._lock = threading.Lock()

    def __call__(self, step: str, done: int, total: int, unit: str = "", /) -> None:
        """As `progress.Progress`."""
        with self._lock:
            now, over = self._clock(), done >= total
            if over and step not in self._steps:  # its end was told already
                return
            kept = self._steps.setdefault(step, _Step(now, done, done, total, unit))
            kept.done, kept.total, self._current = done, total, step
            if over:
                del self._steps[step]
                self._tell(step, kept, now)
            else:
                self._tell_if_due(now)

    def tick(self) -> None:
        """Tell the step that was worked on last, if nothing was told for long."""
        with self._lock:
            self._tell_if_due(self._clock())

    def _tell_if_due(self, now: float) -> None:
        step = self._steps.get(self._current)
        if step and now - max(self._told, step.started) >= SECONDS_BETWEEN_LINES:
            self._tell(self._current, step, now)

    def _tell(self, name: str, step: _Step, now: float) -> None:
        self._told = now
        click.echo(step.line(name, now), err=True)


@contextmanager
def ticking(lines: Lines, seconds: float = 1.0) -> Iterator[Lines]:
    """Within the body another thread lets the lines tell, so often, what takes long."""
    over = threading.Event()

    def tick() -> None:
        while not over.wait(seconds):
            lines.tick()

    thread = threading.Thread(target=tick, daemon=True)
    thread.start()
    try:
        yield lines
    finally:
        over.set()
        thread.join()
