"""`model.onnx` in a stock ONNX Runtime session, and its TensorRT-RTX engine, with and without the last step of export.

Usage: python benchmarks/stock.py [NAME...]

Random weights; biases as large as those of trained networks. Where a stock session crashes or refuses the
graph, its words stand in the place of the figure. The engine is built where TensorRT-RTX is installed.
"""

from __future__ import annotations

import sys
from contextlib import ExitStack
from unittest import mock

import numpy as np
import torch
from torch import nn

import pcn_deploy
from pcn_deploy.engines.base import GraphSource
from pcn_deploy.engines.registry import get_backend
from pcn_deploy.engines.stock import open_stock
from pcn_deploy.errors import StockSessionError
from pcn_deploy.models.registry import create_model, find_model
from pcn_deploy.tasks.distance import least_sqnr_db

CASES = (("int8", "fp16"), ("int8", "fp32"), ("fp8", "fp16"), ("fp8", "fp32"))


def network(name: str) -> nn.Module:
    """A network whose biases are not zero."""
    model = create_model(name, random_weights=True)
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, 0, 0.3)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.uniform_(module.weight, 0.1, 0.6)
            nn.init.normal_(module.bias, 0, 0.5)
    return model


def cells(name: str, precision: str, remainder: str, *, portable: bool) -> list[str]:
    """SQNR in dB of a stock session against the eager network, and MB of the engine."""
    info = find_model(name)
    assert info is not None
    shape = (3, *info.resolution)
    options = pcn_deploy.CompileOptions(
        precision=precision,
        remainder=remainder,
        targets=("cpu",),
        transform=pcn_deploy.Transform(resolution=info.resolution),
        golden_images=4,
    )
    images = np.random.default_rng(0).standard_normal((8, *shape), dtype=np.float32)
    with ExitStack() as stack:
        stack.enter_context(mock.patch("pcn_deploy.proof.executions.EXECUTIONS", ()))  # asked below
        if not portable:
            stack.enter_context(mock.patch("pcn_deploy.graph.portable.make_portable", lambda _graph: None))
        bundle = pcn_deploy.compile(network(name), options, calibration=[images]).bundle
    spec = bundle.manifest.interface
    graph, golden = bundle.read("model.onnx"), bundle.read_arrays("golden.npz")
    try:
        with open_stock(lambda: graph, spec) as session:
            found = [session.run({"images": image[None]})["logits"] for image in golden["images"][:4]]
        answer = f"{least_sqnr_db([golden['logits'][:4]], [np.concatenate(found)]):.1f}"
    except StockSessionError as error:
        answer = str(error)
    backend = get_backend("tensorrt-rtx")
    if not backend.availability().can_build:
        return [answer, "-"]
    engine = backend.build(GraphSource(onnx=graph, torchscript=b"", spec=spec)).data
    return [answer, f"{len(engine) / 1e6:.2f}"]


def main() -> None:
    print("| network | precision, rest | stock, dB: as exported | portable | engine, MB: as exported | portable |")
    print("|---|---|---:|---:|---:|---:|")
    for name in sys.argv[1:] or ["resnet34", "mnasnet_100", "aa_resnet34"]:
        for precision, remainder in CASES:
            both = [cells(name, precision, remainder, portable=portable) for portable in (False, True)]
            answers, sizes = zip(*both, strict=True)
            print(f"| {name} | {precision}, {remainder} | {' | '.join([*answers, *sizes])} |", flush=True)


if __name__ == "__main__":
    main()
