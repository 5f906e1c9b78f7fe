"""Peak memory of a build in FP16 and in INT8, of any networks: PatchConvNet-S60 and those that are named.

Usage: python benchmarks/memory.py [FILE.py:FACTORY ...]   (or a module:factory; weights are whatever it makes)

32 synthetic images at 224x224, target `cpu`, everything else at its default. Peak is that of the process tree.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np
from measure import Row, print_rows, run_watched, verdict

IMAGES, LIMIT = 32, 2.0
"""INT8 may take so many times the memory of FP16."""


def peak(network: str, precision: str, folder: Path) -> tuple[float, float]:
    """Seconds, and peak memory in MB."""
    command = [sys.executable, "-m", "pcn_deploy.cli.main", "build", network, "--random-weights", "--overwrite"]
    command += ["--precision", precision, "--calibration", str(folder / "images.npz"), "-o", str(folder / "out.pcn")]
    seconds, mebibytes = run_watched(command, folder / "log.txt", accepted=(0, 3))  # parity is not asked for here
    return seconds, mebibytes * 2**20 / 1e6


def rows(network: str, folder: Path) -> list[Row]:
    """Both precisions of one network."""
    found = {precision: peak(network, precision, folder) for precision in ("fp16", "int8")}
    ratio = found["int8"][1] / found["fp16"][1]
    name = network.rpartition(":")[2]
    return [
        (f"{name}, {precision}", f"{megabytes:.0f} MB, {seconds:.0f} s", "", "")
        for precision, (seconds, megabytes) in found.items()
    ] + [(f"{name}, INT8 over FP16", f"{ratio:.2f} x", f"<= {LIMIT} x", verdict(ratio <= LIMIT))]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("networks", nargs="*", default=["patchconvnet_s60"])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        images = np.random.default_rng(0).integers(0, 256, (IMAGES, 224, 224, 3), dtype=np.uint8)
        np.savez(folder / "images.npz", images=images)
        for network in parser.parse_args().networks:
            print_rows(f"{network}, {IMAGES} images", rows(network, folder))


if __name__ == "__main__":
    main()
