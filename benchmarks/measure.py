"""Shared by the benchmarks: run a command and watch its memory; interleave timed functions; print a table."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

from public_pipeline import MIB, watch

Row = tuple[str, str, str, str]
"""What, measured, limit, verdict."""


def run_watched(command: list[str], log: Path, *, accepted: tuple[int, ...] = (0,)) -> tuple[float, float]:
    """Wall time in seconds, and peak resident memory of the process tree in MiB, of a command that must succeed."""
    code, seconds, peak, usage = watch(command, log)
    if code not in accepted:
        message = f"{' '.join(command)} ended with {code}: see {log}"
        raise RuntimeError(message)
    return seconds, max(peak / MIB, usage.ru_maxrss / 1024)


def interleaved(functions: dict[str, Callable[[], object]], rounds: int, warmup: int = 3) -> dict[str, list[float]]:
    """Times in ms of each function, called in turns, so that a busy moment of the machine hits all of them alike."""
    for function in functions.values():
        for _ in range(warmup):
            function()
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            started = time.perf_counter()
            function()
            times[name].append(1000 * (time.perf_counter() - started))
    return times


def medians(times: dict[str, list[float]]) -> dict[str, float]:
    """Median per function."""
    return {name: median(values) for name, values in times.items()}


def verdict(reached: bool) -> str:
    """The word for the last column."""
    return "reached" if reached else "MISSED"


def print_rows(title: str, rows: list[Row]) -> None:
    """Print a plain table that survives copying."""
    head: Row = ("what", "measured", "limit", "")
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(4)]
    print(f"\n{title}")
    for row in [head, *rows]:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip(), flush=True)
