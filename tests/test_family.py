"""Every registered network: three ways to execute it agree, and it builds in every precision.

The smallest of each class runs in `make test`, all of them in `make test-all`.
"""

from __future__ import annotations

import importlib.util
import io
from types import ModuleType

import numpy as np
import onnxruntime as ort
import pytest
import torch
from torch import nn

import pcn_deploy
from pcn_deploy.graph.export import serialise, to_onnx
from pcn_deploy.graph.torchscript import to_torchscript
from pcn_deploy.models.catalogue import ModelInfo
from pcn_deploy.models.deploy import to_deploy
from pcn_deploy.models.registry import create_model, find_model, list_models
from pcn_deploy.specs import BatchRange

SMALLEST = {"resnet34", "aa_resnet34", "wide_resnet28_10", "mnasnet_075", "aa_mnasnet_075"}
NETWORKS = [
    pytest.param(info, id=info.name, marks=[] if info.name in SMALLEST else pytest.mark.all_networks)
    for info in list_models()
    if info.arguments
]
HAS_TENSORRT_RTX = importlib.util.find_spec("tensorrt_rtx_bindings") is not None
LAST_NORMS = {"BasicBlock": "bn2", "Bottleneck": "bn3", "InvertedResidual": "bn3"}


def filled(info: ModelInfo, fill: ModuleType) -> nn.Module:
    """The network with weights that all matter, branches small enough that deep sums stay near one."""
    network = create_model(info.name, random_weights=True)
    fill.fill_(network, 1)
    for module in network.modules():
        if type(module).__name__ in LAST_NORMS:
            getattr(module, LAST_NORMS[type(module).__name__]).weight.data *= 0.2
    return network


def test_the_smallest_are_registered() -> None:
    assert all(find_model(name) for name in SMALLEST)


@pytest.mark.parametrize("info", NETWORKS)
def test_eager_torchscript_and_onnx_runtime_agree(info: ModelInfo, fill: ModuleType) -> None:
    network = filled(info, fill)
    deployed, _ = to_deploy(network)
    height, width = info.resolution
    example = torch.from_numpy(fill.images_for((1, 3, height, width), 0))
    frozen = torch.jit.load(io.BytesIO(to_torchscript(deployed, example)))  # type: ignore[no-untyped-call]
    for resolution in ((height, width), (height // 2, width * 3 // 4)):
        images = fill.images_for((2, 3, *resolution), 1)
        with torch.inference_mode():
            expected = network(torch.from_numpy(images)).numpy()
            scripted = frozen(torch.from_numpy(images)).numpy()
        graph = serialise(to_onnx(deployed, (3, *resolution), BatchRange(min=1, opt=1, max=2), {}))
        session = ort.InferenceSession(graph, providers=["CPUExecutionProvider"])
        (found,) = session.run(None, {"images": images})
        assert 0.1 < np.abs(expected).max() < 100, "an error of 1e-4 must mean something"
        np.testing.assert_allclose(scripted, expected, atol=1e-4, rtol=0)
        np.testing.assert_allclose(found, expected, atol=1e-4, rtol=0)


@pytest.mark.skipif(not HAS_TENSORRT_RTX, reason="TensorRT-RTX is not installed")
@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
@pytest.mark.parametrize("info", NETWORKS)
def test_builds_and_keeps_parity(info: ModelInfo, precision: str, fill: ModuleType) -> None:
    options = pcn_deploy.CompileOptions(
        precision=precision,
        targets=("cpu", "tensorrt-rtx"),
        transform=pcn_deploy.Transform(resolution=info.resolution),
        golden_images=2,
    )
    images = [fill.images_for((4, 3, *info.resolution), 2)] if precision == "int8" else None
    result = pcn_deploy.compile(filled(info, fill), options, calibration=images)
    assert result, [report.failures for report in result.reports]
    assert {"model.ts", "model.onnx", "engines/tensorrt-rtx.engine"} <= result.bundle.manifest["members"].keys()
    built = result.bundle.engine("tensorrt-rtx")
    assert built["bytes"] > 0
    assert (int(built["built_with"].get("quantize", 0)) > 0) == (precision == "int8")
