"""How right engines answer edge images, against the eager network and against the simulation (docs/parity.md).

Usage: python benchmarks/edge_images.py [--images 400]

For each trained network of the examples and each precision, SQNR in dB of the logits less the mean of their row: least
and largest of the edge images; for INT8 also the noise of quantisation on unseen real images, and the engine against
the simulation on these. A few minutes on two cores.
"""

from __future__ import annotations

import argparse

import numpy as np
import numpy.typing as npt
import torch
from trained import Task, tasks

import pcn_deploy
from pcn_deploy import BatchRange, CompileOptions
from pcn_deploy.artefact.golden import edge_images
from pcn_deploy.engines.registry import get_backend
from pcn_deploy.tasks.classification import LogitsMeter

KINDS = (("fp32", ""), ("fp16", ""), ("int8", "max"), ("int8", "entropy"))
Logits = npt.NDArray[np.float32]


def sqnr_db(reference: Logits, found: Logits) -> float:
    """Of the differences between the logits of an image."""
    meter = LogitsMeter()
    meter.update(reference, found)
    return meter.metrics()["sqnr_differences_db"]


def each(reference: Logits, found: Logits) -> str:
    """Least and largest of single images."""
    values = [sqnr_db(reference[i : i + 1], found[i : i + 1]) for i in range(len(reference))]
    return f"{min(values):.1f} to {max(values):.1f}"


def measure(task: Task, precision: str, calibrator: str) -> str:
    """One row."""
    options = CompileOptions(
        precision=precision,
        targets=("cpu", "torchscript"),
        calibrator=calibrator,
        transform=task.transform,
        batch=BatchRange(min=1, opt=1, max=64),
    )
    bundle = pcn_deploy.compile(task.network, options, calibration=task.calibration[:128]).bundle
    spec = bundle.manifest.interface
    edge = np.stack(list(edge_images(task.transform).values()))
    images = np.concatenate([edge, task.images])
    with torch.inference_mode():
        eager = task.network(torch.from_numpy(images)).numpy()

    def run(target: str, member: str) -> Logits:
        with get_backend(target).open(bundle.read(member), spec) as session:
            parts = [session.run({"images": images[i : i + 64]})["logits"] for i in range(0, len(images), 64)]
        return np.concatenate(parts)

    engine, simulated, real = run("cpu", "model.onnx"), run("torchscript", "model.ts"), slice(len(edge), None)
    row = f"{task.name:24s} {precision} {calibrator:8s} edge images: "
    row += f"eager {each(eager[: real.start], engine[: real.start])}"
    if precision == "int8":
        row += f", simulation {each(simulated[: real.start], engine[: real.start])}; real images: quantisation "
        row += f"{sqnr_db(eager[real], simulated[real]):.1f}, simulation {sqnr_db(simulated[real], engine[real]):.1f}"
    return row


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--images", type=int, default=400)
    for one in tasks(parser.parse_args().images):
        for kind in KINDS:
            print(measure(one, *kind), flush=True)
