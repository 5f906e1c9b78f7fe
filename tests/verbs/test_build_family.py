"""Every registered network: three ways to execute it agree, and it builds in every precision.

`make test` runs one of each kind, at its own widths and resolution but with as few blocks as make it one; `make
test-all` runs all of them as they are.
"""

from __future__ import annotations

import importlib.util
import io
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from torch import nn

import pcn_deploy
from pcn_deploy.graph.export import serialise, to_onnx
from pcn_deploy.graph.torchscript import to_torchscript
from pcn_deploy.models import mnasnet
from pcn_deploy.models.registry import create_model, find_model, list_models
from pcn_deploy.network.deploy import to_deploy
from pcn_deploy.specs import BatchRange

PRECISIONS = ("fp32", "fp16", "int8")


@dataclass(frozen=True, kw_only=True)
class Case:
    """A registered network, and how it is shortened; the first `stages` only of a MnasNet."""

    name: str
    arguments: dict[str, Any] = field(default_factory=dict)
    stages: int = len(mnasnet.STAGES)
    precisions: tuple[str, ...] = ("int8",)  # its remainder is FP16, so it has every kind of node

    @property
    def resolution(self) -> tuple[int, int]:
        info = find_model(self.name)
        assert info is not None
        return info.resolution


ONE_EACH = {"depths": (1, 1, 1, 1)}
SHORTENED = (
    Case(name="patchconvnet_s60", arguments={"depth": 2}, precisions=PRECISIONS),
    Case(name="resnet34", arguments=ONE_EACH),
    Case(name="resnet34_attnpool", arguments=ONE_EACH),
    Case(name="aa_resnet34", arguments=ONE_EACH),
    Case(name="aa_resnet50_legacy", arguments=ONE_EACH, precisions=()),
    Case(name="wide_resnet28_10", arguments={"depth": 10}),
    Case(name="mnasnet_075", stages=3),
    Case(name="aa_mnasnet_075", stages=3),
)
WHOLE = tuple(Case(name=info.name, precisions=PRECISIONS) for info in list_models() if info.arguments)


def _parameters(precisions: bool) -> list[Any]:
    """The cases, each in every precision it is built in if so asked."""
    return [
        pytest.param(
            case,
            *chosen,
            id="-".join([case.name if case in WHOLE else f"short {case.name}", *chosen]),
            marks=[pytest.mark.all_networks] if case in WHOLE else [],
        )
        for case in (*SHORTENED, *WHOLE)
        for chosen in ([(precision,) for precision in case.precisions] if precisions else [()])
    ]


HAS_TENSORRT_RTX = importlib.util.find_spec("tensorrt_rtx") is not None
LAST_NORMS = {"BasicBlock": "bn2", "Bottleneck": "bn3", "InvertedResidual": "bn3"}


def make(case: Case, fill: ModuleType) -> nn.Module:
    """The network with weights that all matter, branches small enough that deep sums stay near one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mnasnet, "STAGES", mnasnet.STAGES[: case.stages])
        network = create_model(case.name, random_weights=True, **case.arguments)
    fill.fill_(network, 1)
    for module in network.modules():
        if type(module).__name__ in LAST_NORMS:
            getattr(module, LAST_NORMS[type(module).__name__]).weight.data *= 0.2
    return network


@pytest.mark.parametrize("case", _parameters(precisions=False))
def test_eager_torchscript_and_onnx_runtime_agree(case: Case, fill: ModuleType) -> None:
    network = make(case, fill)
    deployed, _ = to_deploy(network, torch.rand(1, 3, *case.resolution))
    height, width = case.resolution
    example = torch.from_numpy(fill.images_for((1, 3, height, width), 0))
    frozen = torch.jit.load(io.BytesIO(to_torchscript(deployed, example)))  # type: ignore[no-untyped-call]
    resolutions = [(height // 2, width * 3 // 4), (height, width)]
    for resolution in resolutions if case in WHOLE else resolutions[:1]:  # at its own, a short one is built below
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
@pytest.mark.parametrize(("case", "precision"), _parameters(precisions=True))
def test_builds_and_keeps_parity(case: Case, precision: str, fill: ModuleType) -> None:
    options = pcn_deploy.CompileOptions(
        precision=precision,
        targets=("cpu", "tensorrt-rtx"),
        transform=pcn_deploy.Transform(resolution=case.resolution),
        golden_images=2,
    )
    images = [fill.images_for((4, 3, *case.resolution), 2)] if precision == "int8" else None
    result = pcn_deploy.compile(make(case, fill), options, calibration=images)
    assert result, [report.failures for report in result.reports]
    assert {"model.onnx", "engines/tensorrt-rtx.engine"} <= result.bundle.manifest.members.keys()
    built = result.bundle.engine("tensorrt-rtx")
    assert built.bytes > 0
    assert (int(built.built_with.get("quantize", 0)) > 0) == (precision == "int8")
