"""FP16, INT8 and FP8 (E4M3) beside each other: SQNR of the logits and top-1 of the built graphs.

Usage: python benchmarks/fp8.py [--images N]

Default options; each is built, and its graph executed by ONNX Runtime on the test images of the trained networks.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
from trained import Task, tasks

import pcn_deploy
from pcn_deploy import CompileOptions, Engine, verify

PRECISIONS = ("fp16", "int8", "fp8")


def row(task: Task, precision: str, folder: Path) -> list[str]:
    """Precision, quantised products, SQNR, worst cosine, top-1."""
    options = CompileOptions(precision=precision, transform=task.transform)
    result = pcn_deploy.compile(task.network, options, calibration=[task.calibration])
    np.savez(folder / "test.npz", images=task.images, labels=task.labels)
    with Engine.open(result.bundle, "cpu") as engine:
        found = verify(engine, folder / "test.npz", reference=task.network).metrics
    return [
        precision,
        str(len(result.plan.quantized_entries)),
        f"{found['sqnr_db']:.2f}",
        f"{found['cosine_min']:.4f}",
        f"{found['top1_engine']:.2f}",
        f"{found['top1_drop']:+.2f}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=int, help="test images of each task")
    options = parser.parse_args()
    print("task | precision | quantised layers | SQNR, dB | worst cosine | top-1, % | drop, points")
    print("---|---|---:|---:|---:|---:|---:")
    for task in tasks(options.images):
        with tempfile.TemporaryDirectory() as name:
            for precision in PRECISIONS:
                found = row(task, precision, Path(name))
                print(" | ".join([f"{task.name} ({len(task.images)} images)", *found]), flush=True)


if __name__ == "__main__":
    main()
