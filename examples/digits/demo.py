"""The demo: a network trained on real images becomes an INT8 TensorRT engine, and both sides' accuracy is printed.

Run it with `make demo`. It writes to the folder `out/`.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np
import torch
from data import TRANSFORM, write_images

import pcn_deploy
from pcn_deploy.artefact.provenance import ModelSource
from pcn_deploy.cli import display
from pcn_deploy.engines.base import Availability
from pcn_deploy.verbs.bench import bench
from pcn_deploy.verbs.doctor import diagnose

WEIGHTS = Path(__file__).with_name("digits.safetensors")
OUT = Path("out")


def main() -> int:
    """Compile, verify, report; the exit code is 3 if parity fails, as that of `pcn-compile`."""
    found = diagnose().targets
    targets = ("cpu", *(name for name in ("tensorrt", "tensorrt-rtx") if found[name].can_build))
    OUT.mkdir(exist_ok=True)
    train, test = write_images(OUT / "images")
    source = ModelSource(model="patchconvnet", weights=WEIGHTS)
    model = source.create()
    options = pcn_deploy.CompileOptions(
        precision="int8", targets=targets, transform=TRANSFORM, batch=pcn_deploy.BatchRange(min=1, opt=1, max=64)
    )
    started = time.perf_counter()
    with display.progress_bars(quiet=False) as progress:
        result = pcn_deploy.compile(model, options, calibration=train, provenance=source.describe(), progress=progress)
        bundle = result.bundle.save(OUT / "digits.pcn", overwrite=True)
        compiled = time.perf_counter() - started
        with pcn_deploy.load(bundle) as engine:
            report = pcn_deploy.verify(engine, test, reference=model, progress=progress)
            latency = bench(engine, seconds=1.0, progress=progress).p50
    sizes = {entry.target: entry.bytes for entry in result.bundle.engines}
    metrics = report.metrics
    rows = [
        ["held-out images", str(report.images)],
        ["fp32 top-1 (eager)", f"{metrics['top1_reference']:.2f} %"],
        [f"int8 top-1 ({report.executed_by})", f"{metrics['top1_engine']:.2f} %"],
        ["drop", f"{metrics['top1_drop']:+.2f} points"],
        ["same answer", f"{metrics['top1_agreement']:.2f} %"],
        ["SQNR of the logits", f"{metrics['sqnr_db']:.1f} dB"],
        ["fp32 weights", display.size(WEIGHTS.stat().st_size)],
        *[[f"{target} engine", display.size(size)] for target, size in sizes.items()],
        ["checkpoint to bundle", f"{compiled:.1f} s"],
        ["latency, eager fp32", f"{_eager_ms(model):.2f} ms"],
        [f"latency, int8 ({report.executed_by})", f"{latency:.2f} ms"],
    ]
    display.print_table(f"{bundle}: parity {'passed' if report and result else 'FAILED'}", ["what", "value"], rows)
    print(_what_ran_where(targets, found))
    print(f"Look inside: {Path(sys.executable).parent / 'pcn-compile'} inspect {bundle}")
    return 0 if report and result else 3


def _eager_ms(model: torch.nn.Module) -> float:
    """Median latency of one image through the eager network, in ms."""
    image = torch.zeros(1, *TRANSFORM.shape)
    times = []
    with torch.inference_mode():
        for _ in range(50):
            start = time.perf_counter()
            model(image)
            times.append(time.perf_counter() - start)
    return float(1000 * np.median(times))


def _what_ran_where(targets: tuple[str, ...], found: dict[str, Availability]) -> str:
    ran = "Ran here: eager fp32 (PyTorch) and the INT8 graph (ONNX Runtime, simulating TensorRT's INT8), on the CPU"
    not_run = [name for name in targets if not found[name].can_run]
    gpu = [name for name in targets if found[name].can_run and name != "cpu"]
    missing = [name for name in ("tensorrt-rtx",) if name not in targets]
    parts = [ran + (f", and {', '.join(gpu)} on the GPU" if gpu else "")]
    parts += [f"built but not run: the {name} engine (no NVIDIA GPU here)" for name in not_run]
    parts += [f"not built: {name} ({found[name].detail})" for name in missing]
    return "; ".join(parts) + "."


if __name__ == "__main__":
    sys.exit(main())
