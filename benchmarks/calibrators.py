"""Which calibrator is the right default: every one on every kind of trained network, judged on unseen images.

Usage: python benchmarks/calibrators.py [--images N] [--rounds N]

Networks: the three of the examples and those of `kinds.py`, trained here on first use. SQNR of the logits in dB against
the float network, all in INT8 but the remainder in FP32, simulated, on images that neither trained nor calibrated.
On networks this small a single image can decide it (a code that falls the other way turns its answer), so the
shortfall of the default against the best of the others is given with its 95 % interval over 1,000 resamples of the
images. Time is that of `calibrate`, with histograms, in turns with `entropy`.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

import kinds
import numpy as np
import numpy.typing as npt
import torch
import trained
from measure import interleaved, medians, verdict
from torch import nn
from trained import Task

from pcn_deploy import CompileOptions, ImageSource
from pcn_deploy.calibration.calibrators import CALIBRATORS
from pcn_deploy.calibration.collect import calibrate, recalibrate
from pcn_deploy.calibration.quantized import apply_scales, plan_scales
from pcn_deploy.progress import silent
from pcn_deploy.verbs.steps.preparation import prepare
from pcn_deploy.verbs.steps.prepared import Prepared

DEFAULT = CompileOptions(precision="int8").calibrator
SHORTFALL_DB, SLOWER, RESAMPLES = 0.5, 1.2, 1000

Energies = npt.NDArray[np.float64]


def logits(network: nn.Module, images: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """Outputs of a network, `(N, K)`."""
    with torch.inference_mode():
        parts = [network(part) for part in torch.from_numpy(images).split(32)]
    return torch.cat(parts).double().numpy()


def errors(task: Task, network: Prepared) -> tuple[Energies, dict[str, Energies]]:
    """Per test image the energy of the logits `(N,)`, and of the error of each calibrator."""
    expected = logits(task.network, task.images)
    assert network.calibration is not None
    found = {}
    for name in CALIBRATORS:
        planned = network.plan.with_ranges(recalibrate(network.calibration, name, 99.99).ranges, again=True)
        quantized = apply_scales(network.unrounded, plan_scales(network.unrounded, planned))
        found[name] = ((logits(quantized, task.images) - expected) ** 2).sum(1)
    return (expected**2).sum(1), found


def decibels(signal: Energies, error: Energies) -> float:
    """SQNR over all images."""
    return 10 * float(np.log10(signal.sum() / error.sum()))


def shortfall(found: dict[str, Energies]) -> tuple[float, float, float]:
    """By how many dB the default is behind the best, and the 95 % interval of that over resampled images."""
    best = min(found, key=lambda name: found[name].sum())
    rng = np.random.default_rng(0)
    picks = rng.integers(0, len(found[best]), (RESAMPLES, len(found[best])))
    drawn = 10 * np.log10(found[DEFAULT][picks].sum(1) / found[best][picks].sum(1))
    low, high = np.quantile(drawn, (0.025, 0.975))
    return 10 * float(np.log10(found[DEFAULT].sum() / found[best].sum())), float(low), float(high)


def slower(task: Task, network: Prepared, rounds: int) -> float:
    """Time of the default over that of `entropy`."""
    source = ImageSource([task.calibration], task.transform)
    layers = list(network.scales)
    times = interleaved(
        {
            name: lambda name=name: calibrate(network.unrounded, layers, source, name)  # type: ignore[misc]
            for name in ("entropy", DEFAULT)
        },
        rounds,
        warmup=1,
    )
    found = medians(times)
    return found[DEFAULT] / found["entropy"]


def main() -> None:
    """Print one row per network."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=int, default=1000, help="test images of each task, or as many as it has")
    parser.add_argument("--rounds", type=int, default=3, help="calibrations timed; 0: none")
    given = parser.parse_args()
    print("network | INT8 layers | top-1, % |", " | ".join(CALIBRATORS), f"| {DEFAULT} behind the best | | time |")
    for task in [*trained.tasks(given.images), *kinds.tasks(given.images)]:
        options = CompileOptions(precision="int8", remainder="fp32", transform=task.transform)
        network = prepare(task.network, options, ImageSource([task.calibration], task.transform), silent)
        signal, found = errors(task, network)
        top1 = 100 * float((logits(task.network, task.images).argmax(1) == task.labels).mean())
        behind, low, high = shortfall(found)
        time = slower(replace(task, calibration=task.calibration[:128]), network, given.rounds) if given.rounds else 0.0
        cells = [task.name, str(len(network.scales)), f"{top1:.1f}"]
        cells += [f"{decibels(signal, found[name]):.2f}" for name in CALIBRATORS]
        cells += [f"{behind:.2f} [{low:.2f}, {high:.2f}]", verdict(low <= SHORTFALL_DB and time <= SLOWER)]
        cells += [f"{time:.2f} x"]
        print(" | ".join(cells), flush=True)


if __name__ == "__main__":
    main()
