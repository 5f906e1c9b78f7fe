"""A typed graph run with every tensor rounded to its type shows what ONNX Runtime's own execution hides."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import pytest
import torch
from declared import run_declared
from torch import Tensor, nn

from pcn_deploy.calibration.quantized import Quantization
from pcn_deploy.engines.onnxruntime import OnnxRuntimeBackend
from pcn_deploy.engines.rounded import round_to_types
from pcn_deploy.graph.export import engine_spec, serialise, to_onnx
from pcn_deploy.graph.typed import reduce_precision
from pcn_deploy.specs import BatchRange, EngineSpec

SHAPE = (16, 4, 4)
IMAGES = np.random.default_rng(0).standard_normal((2, *SHAPE)).astype(np.float32)


class Net(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm, self.head = nn.Conv2d(16, 16, 1), nn.LayerNorm(4), nn.Linear(16, 5)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.function(self.norm(self.conv(x).relu()) + x).mean((2, 3)))
        return y


def typed(
    function: Callable[[Tensor], Tensor], kind: str, quantized: dict[str, Quantization]
) -> tuple[bytes, EngineSpec]:
    graph = to_onnx(Net(function).eval(), SHAPE, BatchRange(max=4), quantized)
    reduce_precision(graph, kind)
    return serialise(graph), engine_spec(graph, BatchRange(max=4))


def run(data: bytes, spec: EngineSpec, images: np.ndarray[tuple[int, ...], np.dtype[np.float32]]) -> Tensor:
    with OnnxRuntimeBackend().open(data, spec) as session:
        return torch.from_numpy(session.run({"images": images})["logits"])


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "attention": lambda x: torch.softmax(x.flatten(2) @ x.flatten(2).transpose(1, 2), -1).unsqueeze(-1) * 3,
    "constants": lambda x: x * torch.full((1, 1, 4, 4), 0.1) + torch.ones_like(x) * 0.3,
    "a mask": lambda x: torch.where(x > 0.3, x, 0.1).sigmoid(),
}


@pytest.mark.parametrize("kind", ["fp16", "bf16"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_tensor_is_rounded_to_its_type(name: str, kind: str) -> None:
    data, spec = typed(FUNCTIONS[name], kind, {})
    expected = run_declared(data, IMAGES)
    found = run(round_to_types(data), spec, IMAGES).numpy()
    step = {"fp16": 2.0**-11, "bf16": 2.0**-8}[kind]
    exact = Net(FUNCTIONS[name]).eval()(torch.from_numpy(IMAGES)).detach().numpy()
    assert np.abs(found - expected).max() <= 2 * step * np.abs(expected).max()
    assert np.abs(found - exact).max() > 0.02 * step * np.abs(exact).max(), "not computed in float32"


def test_scales_of_fp16_are_widened() -> None:
    scales = {"conv": Quantization(2.0**-5, np.full(16, 2.0**-8, np.float32))}
    data, spec = typed(FUNCTIONS["a mask"], "fp16", scales)
    expected = run_declared(data, IMAGES)
    found = run(round_to_types(data), spec, IMAGES).numpy()
    assert np.abs(found - expected).max() <= 2.0**-8 * np.abs(expected).max()


@pytest.mark.parametrize("level", ["above", "below"])
def test_overflow_and_underflow_show(level: str) -> None:
    factor = {"above": 400.0, "below": 2e-5}[level]
    data, spec = typed(lambda x: ((x * factor) ** 2).mean(1, keepdim=True).sqrt().expand_as(x) / factor, "fp16", {})
    exact = Net(lambda x: (x**2).mean(1, keepdim=True).sqrt().expand_as(x)).eval()(torch.from_numpy(IMAGES)).detach()
    hidden, shown = run(data, spec, IMAGES), run(round_to_types(data), spec, IMAGES)
    reference = torch.from_numpy(run_declared(data, IMAGES))
    torch.testing.assert_close(hidden, exact, atol=0.01, rtol=0.01)
    if level == "above":
        assert not shown.isfinite().any() and not reference.isfinite().any()
    else:
        torch.testing.assert_close(shown, reference, atol=0.01, rtol=0.01)
        assert (shown - exact).abs().max() > 0.1


def test_squares_inside_a_norm_show() -> None:
    data, spec = typed(lambda x: (x * 400) / (x * 400).norm(p=2, dim=1, keepdim=True), "fp16", {})
    assert "ReduceL2" in {node.op_type for node in onnx.load_from_string(data).graph.node}
    exact = Net(lambda x: x / x.norm(p=2, dim=1, keepdim=True)).eval()(torch.from_numpy(IMAGES)).detach()
    torch.testing.assert_close(run(data, spec, IMAGES), exact, atol=0.01, rtol=0.01)
    bias = Net(lambda x: x).head.bias.detach()
    shown = run(round_to_types(data), spec, IMAGES)
    torch.testing.assert_close(shown, bias.expand_as(shown), atol=0.01, rtol=0.01)  # everything by infinity is 0


def test_no_half_is_left_but_in_casts() -> None:
    data, _ = typed(FUNCTIONS["attention"], "fp16", {})
    proto = onnx.load_from_string(round_to_types(data))
    onnx.checker.check_model(proto, full_check=True)
    half = {value.name for value in proto.graph.value_info if value.type.tensor_type.elem_type == 10}
    assert half
    readers = {node.op_type for node in proto.graph.node for name in node.input if name in half}
    assert readers == {"Cast"}


def test_a_graph_without_notes_is_rounded_too() -> None:
    data, spec = typed(FUNCTIONS["attention"], "fp16", {})
    proto = onnx.load_from_string(data)
    del proto.graph.value_info[:]
    found = run(round_to_types(proto.SerializeToString()), spec, IMAGES)
    assert torch.equal(found, run(round_to_types(data), spec, IMAGES))
