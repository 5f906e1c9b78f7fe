"""Run every benchmark, one after the other, each in a process of its own, and keep what they print.

Usage: python benchmarks/run.py [NAME...]; names: startup, frames, latency, calibration, build.
Results: `out/benchmarks.txt`.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
BENCHMARKS = ("startup", "frames", "latency", "calibration", "build")


def main() -> int:
    names = sys.argv[1:] or list(BENCHMARKS)
    unknown = set(names) - set(BENCHMARKS)
    if unknown:
        print(f"Unknown: {', '.join(sorted(unknown))}. Known: {', '.join(BENCHMARKS)}.")
        return 2
    output = Path("out/benchmarks.txt")
    output.parent.mkdir(exist_ok=True)
    failed = []
    with output.open("w", encoding="utf-8") as file:
        head = f"{platform.platform()}, {len(os.sched_getaffinity(0))} cores, load {os.getloadavg()[0]:.2f}"
        print(head, flush=True)
        file.write(head + "\n")
        for name in names:
            command = [sys.executable, str(HERE / f"{name}.py")]
            child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
            for line in child.stdout or ():
                print(line, end="", flush=True)
                file.write(line)
            if child.wait() != 0:
                failed.append(name)
    print(f"\nKept in {output}." + (f" Failed: {', '.join(failed)}." if failed else ""))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
