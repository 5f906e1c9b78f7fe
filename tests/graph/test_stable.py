"""Functions that keep what is small: the exported graph, executed, against float64, number by number."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pcn_deploy
from pcn_deploy import BatchRange, CompileOptions, Transform
from pcn_deploy.engines.onnxruntime import open_plain
from pcn_deploy.graph.export import engine_spec, serialise, to_onnx

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "logsigmoid": F.logsigmoid,
    "logsigmoid of thousands": lambda x: F.logsigmoid(-30 * x),
    "log of sigmoid": lambda x: torch.log(torch.sigmoid(x / 2)),
    "log of sigmoid and more": lambda x: torch.log(torch.sigmoid(x / 2) + 1e-30),
    "log of a scaled sigmoid": lambda x: torch.log(0.25 * torch.sigmoid(x / 2).clamp(min=1e-30)),
    "division by sigmoid": lambda x: 1 / (torch.sigmoid(x / 2) + 1e-20),
    "root of sigmoid": lambda x: torch.rsqrt(torch.sigmoid(x / 2) + 1e-25),
    "binary cross entropy": lambda x: F.binary_cross_entropy_with_logits(x, torch.ones_like(x), reduction="none"),
    "logaddexp": lambda x: torch.logaddexp(3 * x, x.flip(1)),
    "logaddexp of equals": lambda x: torch.logaddexp(x, x),
    "logaddexp2": lambda x: torch.logaddexp2(3 * x, x.flip(1)),
    "log1p of little": lambda x: torch.log1p(x * 1e-6),
    "log1p": lambda x: torch.log1p(x.abs()),
    "expm1 of little": lambda x: torch.expm1(x * 1e-6),
    "expm1": lambda x: torch.expm1(x / 5),
    "softplus": lambda x: F.softplus(30 * x),
    "softplus with a threshold": lambda x: F.softplus(x, 2, 5),
    "log_softmax": lambda x: F.log_softmax(30 * x, 1),
    "logsumexp": lambda x: torch.logsumexp(30 * x, 1, keepdim=True) + x,
    "silu": lambda x: F.silu(30 * x),
    "mish": lambda x: F.mish(30 * x),
    "gelu": F.gelu,
    "gelu by tanh": lambda x: F.gelu(x, approximate="tanh"),
    "sinc": lambda x: torch.sinc(x / 50),
}
BATCH = BatchRange(min=1, opt=2, max=2)
IMAGES = np.random.default_rng(0).permutation(np.linspace(-100, 100, 64, dtype=np.float32)).reshape(2, 32, 1, 1)


class Applies(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x.flatten(1))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_graph_keeps_what_is_small(name: str) -> None:
    graph = to_onnx(Applies(FUNCTIONS[name]).eval(), (32, 1, 1), BATCH, {})
    spec = engine_spec(graph, BATCH)
    with open_plain(serialise(graph), spec) as session:
        found = session.run({spec.inputs[0].name: IMAGES})["logits"].astype(np.float64)
    values = torch.from_numpy(IMAGES).flatten(1)
    wanted = FUNCTIONS[name](values.double()).numpy()
    own = np.abs(FUNCTIONS[name](values).double().numpy() - wanted)  # the rounding of torch itself
    # of a gate that is nearly 0, the size of the product counts; log(1 - 1e-16) is 0 in float64
    gates = name.startswith(("gelu", "silu", "mish", "sinc"))
    least = 1e-9 * np.abs(wanted).max() if gates else 1e-15 if name == "log of sigmoid" else 1e-36
    assert np.isfinite(found).all()
    assert (np.abs(found - wanted) <= 8 * own + 5e-6 * np.abs(wanted) + least).all()


def test_infinite_sums_are_those_of_torch() -> None:
    class Masked(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            first, second = x.flatten(1).chunk(2, 1)
            return torch.logaddexp(first, second)

    graph = to_onnx(Masked().eval(), (4, 1, 1), BATCH, {})
    infinite = np.array([-np.inf, -np.inf, 1, np.inf] * 2, np.float32).reshape(2, 4, 1, 1)
    infinite[1] = infinite[1][[0, 2, 1, 3]]
    spec = engine_spec(graph, BATCH)
    with open_plain(serialise(graph), spec) as session:
        found = session.run({spec.inputs[0].name: infinite})["logits"]
    np.testing.assert_array_equal(found, Masked()(torch.from_numpy(infinite)).numpy())


def test_a_sigmoid_that_nothing_enlarges_stays() -> None:
    def gate(x: Tensor) -> Tensor:
        return x * torch.sigmoid(x) + torch.exp(torch.sigmoid(x)) / 3

    graph = onnx.load_from_string(serialise(to_onnx(Applies(gate).eval(), (32, 1, 1), BATCH, {}))).graph
    operators = [node.op_type for node in graph.node]
    assert "Sigmoid" in operators
    assert "Reciprocal" not in operators


class Classifier(nn.Module):
    """The function on features that reach far below zero, before a head."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.head, self.function = nn.Conv2d(3, 8, 3), nn.Linear(8, 5), function

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.function(-30 * self.conv(x)).mean((2, 3)))
        return logits


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
@pytest.mark.parametrize("name", ["logsigmoid", "log of sigmoid and more", "expm1"])
def test_such_a_network_builds(name: str, precision: str) -> None:
    function: Any = {**FUNCTIONS, "expm1": lambda x: torch.expm1(-x.abs())}[name]
    options = CompileOptions(
        precision=precision, transform=Transform(resolution=(32, 32)), batch=BatchRange(min=1, opt=1, max=2)
    )
    images = np.random.default_rng(1).standard_normal((12, 3, 32, 32), dtype=np.float32)
    result = pcn_deploy.compile(Classifier(function).eval(), options, calibration=images)
    assert result, result.reports[0].failures
