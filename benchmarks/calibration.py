"""What calibration costs: time per image over a bare forward pass, and memory from 32 to 1,024 images.

Usage: python benchmarks/calibration.py [--rounds 7]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from statistics import median

import numpy as np
import torch
from measure import Row, interleaved, print_rows, run_watched, verdict
from PIL import Image

from pcn_deploy import CompileOptions, ImageSource, Transform, create_model
from pcn_deploy.calibration.calibrators import CALIBRATORS
from pcn_deploy.calibration.collect import BATCH, calibrate
from pcn_deploy.calibration.plan.facts import inspect_layers
from pcn_deploy.calibration.plan.rules import make_plan
from pcn_deploy.network.deploy import to_deploy
from pcn_deploy.verbs.steps.sources import synthetic_images

LIMITS = {"max": 1.2, "entropy": 1.5}
IMAGES = 32
GROWTH_LIMIT_MB = 64


def prepare() -> tuple[torch.nn.Module, list[str]]:
    """S60 in deploy form, and the layers whose inputs are observed."""
    model, _ = to_deploy(create_model("patchconvnet_s60", random_weights=True), torch.rand(1, 3, 224, 224))
    plan = make_plan(inspect_layers(model, torch.zeros(1, 3, 224, 224)), "int8")
    return model, list(plan.quantized_entries)


def overhead(rounds: int) -> list[Row]:
    """Time per image of each calibrator over that of the same loop without observers, in turns."""
    model, layers = prepare()
    source = ImageSource([synthetic_images(IMAGES, CompileOptions())], Transform())

    def bare() -> None:
        with torch.inference_mode():
            for images, _ in source.batches(BATCH):
                model(torch.from_numpy(images))

    functions = {"bare forward": bare}
    for name in CALIBRATORS:
        functions[name] = lambda name=name: calibrate(model, layers, source, name)  # type: ignore[misc]
    times = interleaved(functions, rounds, warmup=1)
    rows: list[Row] = [("bare forward pass", f"{median(times['bare forward']) / IMAGES:.1f} ms/image", "", "")]
    for name in CALIBRATORS:
        ratio = median(mine / base for mine, base in zip(times[name], times["bare forward"], strict=True))
        limit = LIMITS.get(name, 1.5)
        cost = f"{median(times[name]) / IMAGES:.1f} ms/image = {ratio:.2f} x"
        rows.append((f"calibrator {name}", cost, f"<= {limit} x", verdict(ratio <= limit)))
    return rows


def memory() -> list[Row]:
    """Peak memory of a process that calibrates on 32 and on 1,024 image files."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        random = np.random.default_rng(0)
        for index in range(1024):
            small = Image.fromarray(random.integers(0, 256, (16, 16, 3), dtype=np.uint8))
            small.resize((256, 256), Image.Resampling.BICUBIC).save(folder / f"{index:04d}.jpg")
        peaks = {}
        for count in (32, 1024):
            command = [sys.executable, __file__, "--child", str(folder), str(count)]
            peaks[count] = run_watched(command, folder / "log.txt")[1] * 2**20 / 1e6
    growth = peaks[1024] - peaks[32]
    return [
        ("peak memory, 32 images", f"{peaks[32]:.0f} MB", "", ""),
        (
            "peak memory, 1,024 images",
            f"{peaks[1024]:.0f} MB ({growth:+.0f})",
            f"+{GROWTH_LIMIT_MB}",
            verdict(growth < GROWTH_LIMIT_MB),
        ),
    ]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--child", nargs=2, metavar=("FOLDER", "COUNT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        model, layers = prepare()
        calibrate(model, layers, ImageSource(options.child[0], Transform(), limit=int(options.child[1])), "entropy")
        return
    print_rows(f"Calibration of PatchConvNet-S60, {IMAGES} images, batch {BATCH}", overhead(options.rounds) + memory())


if __name__ == "__main__":
    main()
