"""What FP16 cannot compute stays FP32, node by node: constants, statistics written by hand, and what is too large."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from declared import run_declared
from torch import Tensor, nn
from torch.nn import functional as F

from pcn_deploy.calibration.plan.recipe import parse_recipe, write_recipe
from pcn_deploy.calibration.plan.rules import PlanEntry, PrecisionPlan
from pcn_deploy.errors import OptionError
from pcn_deploy.graph.export import serialise, to_onnx
from pcn_deploy.graph.keep import keep_nodes
from pcn_deploy.graph.observed import observe_graph
from pcn_deploy.graph.typed import reduce_precision
from pcn_deploy.specs import BatchRange

SHAPE = (8, 6, 6)
Images = np.ndarray[tuple[int, ...], np.dtype[np.float32]]
Function = Callable[[Tensor], Tensor]
NOTHING = PrecisionPlan(precision="fp16", remainder="fp16", entries=())
NOISE = np.random.default_rng(0).standard_normal((2, *SHAPE)).astype(np.float32)


class Net(nn.Module):
    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x).mean((2, 3))


def rms_norm(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-6)


def layer_norm(x: Tensor) -> Tensor:
    centred = x - x.mean(1, keepdim=True)
    return centred / torch.sqrt((centred * centred).mean(1, keepdim=True) + 1e-6) + x.sign()


def variance_of_squares(x: Tensor) -> Tensor:
    return x / torch.sqrt(((x * x).mean(1, keepdim=True) - x.mean(1, keepdim=True) ** 2).clamp(min=0) + 1e-12)


def softmax(x: Tensor) -> Tensor:
    powers = torch.exp(x - x.amax(1, keepdim=True))
    return powers / powers.sum(1, keepdim=True)


def distances(x: Tensor) -> Tensor:
    difference = x.unsqueeze(1) - x.unsqueeze(2)
    return (difference**2).sum(2).sqrt()


def attention(x: Tensor) -> Tensor:
    q = F.normalize(x.flatten(2), dim=-1)
    return (q @ q.transpose(1, 2) * 4).softmax(-1).unsqueeze(-1)


def response(x: Tensor) -> Tensor:  # GRN of ConvNeXt V2
    norm: Tensor = x.norm(p=2, dim=(2, 3), keepdim=True)
    return x.sign() + norm / (norm.mean(1, keepdim=True) + 1e-6)


STATISTICS: dict[str, Function] = {
    "normalize": lambda x: F.normalize(x, dim=1),
    "sum + 1e-8": lambda x: x.abs() / (x.abs().sum(1, keepdim=True) + 1e-8),
    "clamp 1e-12": lambda x: x.abs() / x.abs().sum(1, keepdim=True).clamp(min=1e-12),
    "maximum 1e-12": lambda x: x.abs() / torch.maximum(x.abs().sum(1, keepdim=True), torch.tensor(1e-12)),
    "rms norm": rms_norm,
    "layer norm": layer_norm,
    "variance of squares": variance_of_squares,
    "std": lambda x: x.abs() / (x.std(1, keepdim=True) + 1e-6),
    "var": lambda x: x.abs() * (x.var((2, 3), keepdim=True) + 1e-6) ** -0.5,
    "softmax": softmax,
    "distances": lambda x: distances(x) / (distances(x).amax((1, 2), keepdim=True) + 1e-6),
    "attention": attention,
    "response": response,
    "log": lambda x: torch.log(x.abs() + 1e-10) / 10,
    "log of softmax": lambda x: torch.log(x.softmax(1) + 1e-10),
    "generalised mean": lambda x: F.avg_pool2d(x.abs().clamp(min=1e-3).pow(3), 6).pow(1 / 3),
    "response over channels": lambda x: F.local_response_norm(x, 3),
}


def typed(function: Function, images: Images | None, plan: PrecisionPlan = NOTHING) -> tuple[bytes, PrecisionPlan]:
    net = Net(function).eval()
    graph = to_onnx(net, SHAPE, BatchRange(max=4), {})
    plan = keep_nodes(plan, graph, net, images)
    reduce_precision(graph, "fp16", plan.types(), plan.types(operations=True), plan.nodes())
    data = serialise(graph)
    onnx.checker.check_model(data, full_check=True)
    return data, plan


def error(function: Function, data: bytes, images: Images, kind: type[np.floating[Any]] = np.float64) -> float:
    """Worst error of the FP16 graph, each tensor stored as declared, relative to the largest exact answer."""
    exact = Net(function)(torch.from_numpy(images.astype(np.float16).astype(kind))).numpy()
    found = run_declared(data, images)
    assert np.isfinite(found).all()
    return float(np.abs(found - exact).max() / max(np.abs(exact).max(), 1e-30))


@pytest.mark.parametrize("name", STATISTICS)
def test_statistics_hold_at_any_scale_whatever_was_observed(name: str) -> None:
    data, plan = typed(STATISTICS[name], None)
    for scale in (0.0, 2e-4, 1.0, 2127.0):
        images = (NOISE * scale).astype(np.float16).astype(np.float32)
        assert error(STATISTICS[name], data, images) < 0.01, scale
    (entry,) = plan.entries
    assert (entry.op, entry.kind, entry.precision, entry.operations) == ("", "Net", "fp32", True)


LARGE: dict[str, Function] = {
    "a cube": lambda x: x**3 / 5e3,
    "squared relu": lambda x: x.relu() ** 2 / 1e3,
    "an exponential": lambda x: torch.exp(x / 20) / 1e4,
    "a product": lambda x: (x * x.flip(1)).clamp(max=1e6).sigmoid(),
    "a sum of squares": lambda x: (x**2).sum(1, keepdim=True).expand_as(x) / 1e4,
    "a matrix product": lambda x: ((x.flatten(2) @ x.flatten(2).transpose(1, 2)) / 1e4).softmax(-1).unsqueeze(-1),
    "group norm": lambda x: F.group_norm(x * 30, 2) + x.sign(),
    "instance norm": lambda x: F.instance_norm(x * 30) + x.sign(),
}


@pytest.mark.parametrize("name", LARGE)
def test_what_overflows_on_the_images_stays_fp32(name: str) -> None:
    images = (NOISE * 100).astype(np.float16).astype(np.float32)
    data, plan = typed(LARGE[name], images)
    assert error(LARGE[name], data, images) < 0.01
    if "norm" not in name:
        assert "above 8188 = FP16's largest / 8" in plan.entries[0].reason


@pytest.mark.parametrize("value", [-1e9, float(torch.finfo(torch.float32).min), float("-inf")])
def test_masks_mean_what_they_meant(value: float) -> None:
    """Rows of which everything is masked are uniform by a finite mask: FP16 would make it infinite, and them NaN."""

    def masked(x: Tensor) -> Tensor:
        return x.masked_fill(x.amax(-1, keepdim=True) < 0.9, value).softmax(-1) * x

    def added(x: Tensor) -> Tensor:
        return (torch.where(x < 0.9, value, 0.0) + x).softmax(-1) * x

    if value == float("-inf"):
        assert typed(lambda x: x.masked_fill(x < x.amax(-1, keepdim=True), value).softmax(-1), NOISE)[1] == NOTHING
        return
    for function in (masked, added):
        data, _ = typed(function, NOISE)
        assert error(function, data, NOISE.astype(np.float16).astype(np.float32), np.float32) < 0.01  # -1e9 + x is -1e9


def test_ordinary_operations_stay_fp16() -> None:
    def ordinary(x: Tensor) -> Tensor:
        gate = F.avg_pool2d(x, 6).sigmoid()
        y = x * gate + x.clamp(min=0, max=6) * 0.125 + 1e-3
        return F.layer_norm(F.gelu(y), (6,)) + F.softmax(y / 3, -1) + y.relu() / 2

    data, plan = typed(ordinary, NOISE)
    assert plan == NOTHING
    kinds = {value.type.tensor_type.elem_type for value in onnx.load_from_string(data).graph.value_info}
    assert onnx.TensorProto.FLOAT not in kinds


def test_tiny_biases_and_dead_channels_stay_fp16() -> None:
    conv = nn.Conv2d(8, 8, 1)
    conv.load_state_dict({"weight": conv.weight.data, "bias": torch.full((8,), 1e-9)})
    conv.weight.data[3] = 1e-12

    class Biased(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.shift = conv, nn.Parameter(torch.full((8, 1, 1), 1e-9))

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.conv(x) + self.shift
            return y.mean((2, 3))

    net = Biased().eval()
    graph = to_onnx(net, SHAPE, BatchRange(max=4), {})
    assert keep_nodes(NOTHING, graph, net, NOISE) == NOTHING


def test_lost_weights_keep_their_operation_in_fp32() -> None:
    weight = torch.full((8, 8, 1, 1), 1e-7)
    data, plan = typed(lambda x: F.conv2d(x, weight) * 1e6, None)
    assert "loses" in plan.entries[0].reason
    assert (
        error(lambda x: F.conv2d(x, weight.to(x.dtype)) * 1e6, data, NOISE.astype(np.float16).astype(np.float32)) < 0.01
    )


def test_magnitudes_are_those_of_the_graph() -> None:
    net = Net(
        lambda x: (
            torch.where(x > 0, x * 3, float("-inf")).softmax(-1) + (x @ x.transpose(2, 3)).amax((2, 3), keepdim=True)
        )
    )
    graph = to_onnx(net, SHAPE, BatchRange(max=4), {})
    seen = {value.name: amax for value, amax in observe_graph(graph, NOISE).items()}
    by_operator = {node.op_type: seen.get(node.outputs[0].name) for node in graph.graph}
    x = torch.from_numpy(NOISE)
    assert by_operator["Mul"] == pytest.approx(float((x * 3).abs().max()))
    assert by_operator["MatMul"] == pytest.approx(float((x @ x.transpose(2, 3)).abs().max()), rel=1e-5)
    infinite = Net(lambda x: (x + torch.tensor([0.0, 0, 0, 0, 0, -torch.inf])) * 2)
    graph = to_onnx(infinite, SHAPE, BatchRange(max=4), {})
    seen = {node.op_type: observe_graph(graph, NOISE)[node.outputs[0]] for node in graph.graph if node.op_type == "Mul"}
    assert seen["Mul"] == pytest.approx(float((2 * x[..., :5]).abs().max()))


def test_an_observation_leaves_the_graph_as_it_is() -> None:
    net = nn.Sequential(nn.Conv2d(8, 200, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    graph = to_onnx(net, SHAPE, BatchRange(max=4), {})
    before = ir.to_proto(graph).SerializeToString()
    observe_graph(graph, NOISE)
    assert ir.to_proto(graph).SerializeToString() == before


def test_what_a_recipe_decides_is_left() -> None:
    normalize = STATISTICS["normalize"]
    _, plan = typed(normalize, NOISE)
    given = parse_recipe(write_recipe(plan))
    assert given.entries == plan.entries
    assert typed(normalize, NOISE, replace(NOTHING, entries=given.entries))[0] == typed(normalize, None)[0]
    own = PlanEntry(op="", kind="Net", precision="fp16", reason="as the recipe says", operations=True)
    _, kept = typed(normalize, NOISE, replace(NOTHING, entries=(own,)))
    assert kept.entries == (own,)
    assert PrecisionPlan.from_json(plan.to_json()) == plan
    with pytest.raises(OptionError, match="nodes is a list of texts"):
        parse_recipe('precision = "fp16"\n[layers."a"]\nprecision = "fp32"\nnodes = ["Pow.0"]')
