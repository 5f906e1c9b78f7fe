"""What each accuracy recovery gains, alone, in pairs and all together: SQNR and top-1 on the trained networks.

Usage: python benchmarks/recovery.py [--images N] [--task TEXT]

Everything is at its default except the recovery. INT8 is simulated by the quantised module that every engine is made
from. The 95 % bound is one-sided, on the drop of top-1 in percentage points against the float network on the same
images; the time is that of the recovery with calibration.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from trained import Task, tasks

from pcn_deploy import CompileOptions, ImageSource
from pcn_deploy.calibration.quantized import apply_scales
from pcn_deploy.calibration.recovery import AFTER, BEFORE, RECOVERIES
from pcn_deploy.cli import display
from pcn_deploy.network.evaluation_mode import in_evaluation_mode
from pcn_deploy.progress import silent
from pcn_deploy.tasks.bound import PairedCounts
from pcn_deploy.tasks.classification import LogitsMeter
from pcn_deploy.verbs.steps.preparation import prepare

CHOICES = ((), *((name,) for name in RECOVERIES), BEFORE, AFTER, RECOVERIES)
COLUMNS = ["recovery", "layers changed", "SQNR dB", "top-1 %", "lost", "gained", "drop", "95 % bound", "s"]


def logits(network: nn.Module, images: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Outputs of a network, `(N, K)`."""
    with torch.inference_mode():
        parts = [network(torch.from_numpy(images[start : start + 64])) for start in range(0, len(images), 64)]
    found: npt.NDArray[np.float32] = torch.cat(parts).numpy()
    return found


def row(task: Task, reference: npt.NDArray[np.float32], recovery: tuple[str, ...]) -> list[str]:
    """One choice of recoveries on one task."""
    options = CompileOptions(precision="int8", transform=task.transform, recovery=recovery)
    started = time.perf_counter()
    network = prepare(task.network, options, ImageSource([task.calibration], task.transform), silent)
    seconds = time.perf_counter() - started
    found = logits(apply_scales(network.deployed, network.scales), task.images)
    meter = LogitsMeter()
    meter.update(reference, found)
    was_right, right = reference.argmax(1) == task.labels, found.argmax(1) == task.labels
    counts = PairedCounts(len(right), int((was_right & ~right).sum()), int((~was_right & right).sum()))
    return [
        "all" if recovery == RECOVERIES else " + ".join(recovery) or "none",
        ", ".join(map(str, network.recovered.values())) or "-",
        f"{meter.metrics()['sqnr_db']:.2f}",
        f"{100 * right.mean():.2f}",
        str(counts.lost),
        str(counts.gained),
        f"{counts.drop:+.2f}",
        f"{counts.drop_bound:.2f}",
        f"{seconds:.1f}",
    ]


def main() -> None:
    """Print one table per task."""
    parser = argparse.ArgumentParser(description="What each accuracy recovery gains.")
    parser.add_argument("--images", type=int, default=30_000, help="test images of each task, or as many as it has")
    parser.add_argument("--task", default="", help="only tasks with this in their name")
    given = parser.parse_args()
    for task in tasks(given.images):
        if given.task not in task.name:
            continue
        reference = logits(in_evaluation_mode(task.network), task.images)
        float_top1 = 100 * (reference.argmax(1) == task.labels).mean()
        title = f"{task.name}: {len(task.images)} test images, float top-1 {float_top1:.2f} %"
        display.print_table(title, COLUMNS, [row(task, reference, recovery) for recovery in CHOICES])


if __name__ == "__main__":
    main()
