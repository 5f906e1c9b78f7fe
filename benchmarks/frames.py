"""Preprocessing of camera frames: `engine.preprocess` against Pillow alone, on this machine.

Usage: python benchmarks/frames.py [--runs 60]. Both give the same bits; the median of each is printed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from statistics import median
from time import perf_counter

import numpy as np
from measure import Row, print_rows, verdict

from pcn_deploy import Transform
from pcn_deploy.data.frames import preprocess

LIMIT_MS = 3.0
FRAMES = {"720p": (720, 1280), "1080p": (1080, 1920), "480p": (480, 640), "720p, upright": (1280, 720)}


def milliseconds(function: Callable[[], object], runs: int) -> float:
    """Median of so many runs, after one that is not counted."""
    function()
    seen = []
    for _ in range(runs):
        started = perf_counter()
        function()
        seen.append(1000 * (perf_counter() - started))
    return median(seen)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=int, default=60)
    runs, transform, rows = parser.parse_args().runs, Transform(), list[Row]()
    for name, shape in FRAMES.items():
        frame = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
        if not np.array_equal(preprocess(frame, transform)[0], transform.of_array(frame)):
            message = f"{name}: the two ways differ."
            raise SystemExit(message)
        ours = milliseconds(lambda frame=frame: preprocess(frame, transform), runs)  # type: ignore[misc]
        alone = milliseconds(lambda frame=frame: transform.of_array(frame), runs)  # type: ignore[misc]
        judged = (f"<= {LIMIT_MS:.0f} ms", verdict(ours <= LIMIT_MS)) if name == "720p" else ("", "")
        rows.append((f"{name} to 224x224, preprocess", f"{ours:.2f} ms", *judged))
        rows.append((f"{name} to 224x224, Pillow alone", f"{alone:.2f} ms", "", ""))
    print_rows("Frames, bicubic, crop_pct 0.875", rows)


if __name__ == "__main__":
    main()
