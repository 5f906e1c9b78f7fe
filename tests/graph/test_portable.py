"""`model.onnx` in a stock session: what the graph says, by the reference evaluator, is what ONNX Runtime computes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from torch import Tensor, nn

from pcn_deploy.calibration.quantized import Quantization
from pcn_deploy.engines.stock import open_stock
from pcn_deploy.graph.export import engine_spec, serialise, to_onnx
from pcn_deploy.graph.portable import make_portable
from pcn_deploy.graph.typed import reduce_precision
from pcn_deploy.specs import BatchRange
from pcn_deploy.tasks.distance import least_sqnr_db

BATCH = BatchRange(min=1, opt=2, max=2)
SHAPE = (16, 6, 6)
IMAGES = np.random.default_rng(0).standard_normal((2, *SHAPE), dtype=np.float32)


class Convolutions(nn.Sequential):
    """Three convolutions that read codes, each with an activation; the first two make codes."""

    def __init__(self, act: type[nn.Module] = nn.ReLU, *, small: float = 1.0, bias: float = 1.0) -> None:
        torch.manual_seed(1)
        layers = [nn.Conv2d(16, 16, 3, padding=1) for _ in range(3)]
        super().__init__(*(part for layer in layers for part in (layer, act())))
        for layer in layers:
            scale_rows(layer.weight, small)
            nn.init.constant_(layer.bias, bias)  # type: ignore[arg-type] # torch's annotation allows None

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = super().forward(x)  # type: ignore[no-untyped-call]
        return y.mean((2, 3))


def scale_rows(weight: Tensor, factor: float) -> None:
    """Make half of the output channels small."""
    with torch.no_grad():
        weight[:8] *= factor


class Products(nn.Module):
    """Linear layers that read codes: two on tokens, two on the rows of a matrix."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.tokens = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU())
        self.rows = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU())
        for name, value in self.named_parameters():
            if name.endswith("bias"):
                nn.init.ones_(value)
            else:
                scale_rows(value, 1e-2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.rows(self.tokens(x.flatten(2).transpose(1, 2)).mean(1))
        return y


class Attention(nn.Module):
    """PyTorch's own attention, which puts the batch second for its products with weights."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.norm = nn.LayerNorm(16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x.flatten(2).transpose(1, 2))
        y: Tensor = x + self.attention(x, x, x, need_weights=False)[0]
        return y.mean(1)


def scales_of(model: nn.Module, codes: str) -> dict[str, Quantization]:
    """Scales that FP16 holds, for inputs in [-4, 4]."""
    found, largest = {}, {"int8": 127, "fp8": 448}[codes]
    for path, layer in model.named_modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            weight = layer.weight.detach().flatten(1)
            amax = weight.abs().amax(1) if codes == "int8" else weight.abs().max()[None]
            scale = (amax / largest).half().float()
            scale = torch.where(scale > 0, scale, amax / largest)  # what FP16 cannot hold, for a rest in FP32
            found[path] = Quantization(float(np.float16(4 / largest)), scale.numpy(), codes)
    return found


def graph_of(model: nn.Module, codes: str, remainder: str) -> bytes:
    """The typed graph; with `codes`, its listed layers read codes."""
    graph = to_onnx(model.eval(), SHAPE, BATCH, scales_of(model, codes) if codes else {})
    if remainder == "fp16":
        reduce_precision(graph, "fp16")
    return serialise(graph)


def portable(data: bytes) -> bytes:
    graph = ir.from_proto(onnx.load_from_string(data))
    make_portable(graph.graph)
    return serialise(graph)


def reference(data: bytes) -> Any:
    (found,) = ReferenceEvaluator(onnx.load_from_string(data)).run(None, {"images": IMAGES})
    return found


CASES: dict[str, tuple[Callable[[], nn.Module], str, str]] = {
    "int8, rest fp16": (partial(Convolutions, small=1e-2), "int8", "fp16"),
    "int8, rest fp32, channels without weights": (partial(Convolutions, small=1e-12), "int8", "fp32"),
    "int8, relu6": (partial(Convolutions, nn.ReLU6, small=1e-2), "int8", "fp16"),
    "int8, rest fp16, linear": (Products, "int8", "fp16"),
    "fp8, rest fp32": (partial(Convolutions, bias=-0.3), "fp8", "fp32"),
    "fp8, rest fp16": (partial(Convolutions, small=1e-2), "fp8", "fp16"),
    "fp8, relu6": (partial(Convolutions, nn.ReLU6, bias=-0.3), "fp8", "fp32"),
    "fp16, attention": (Attention, "", "fp16"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_stock_session_computes_what_the_graph_says(case: str) -> None:
    make, codes, remainder = CASES[case]
    data = graph_of(make(), codes, remainder)
    spec = engine_spec(ir.from_proto(onnx.load_from_string(data)), BATCH)
    with open_stock(lambda: portable(data), spec) as session:
        found = session.run({"images": IMAGES})["logits"]
    assert least_sqnr_db([reference(data)], [found]) > 40


def test_only_the_form_changes() -> None:
    """In FP32 nothing is rounded between a product and its bias: the same numbers, and no constant is kept twice."""
    before = graph_of(Convolutions(), "int8", "fp32")
    after = portable(before)
    np.testing.assert_allclose(reference(after), reference(before), rtol=1e-6)
    model = onnx.load_from_string(after)
    onnx.checker.check_model(model, full_check=True)
    operators = [(node.op_type, len(node.input)) for node in model.graph.node]
    assert operators.count(("Conv", 2)) == operators.count(("Add", 2)) == 3
    assert len(after) < len(before) + 1000


def test_without_codes_and_attention_nothing_changes() -> None:
    before = graph_of(Convolutions(), "", "fp16")
    assert portable(before) == serialise(ir.from_proto(onnx.load_from_string(before)))


@pytest.mark.parametrize("case", ["int8, rest fp16", "int8, rest fp16, linear"])
def test_codes_are_made_of_fp32_where_the_runtime_cuts_off(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, codes, remainder = CASES[case]
    before = graph_of(make(), codes, remainder)
    monkeypatch.setattr("pcn_deploy.graph.portable.truncates_half", lambda: True)
    after = portable(before)
    model = onnx.shape_inference.infer_shapes(onnx.load_from_string(after), check_type=True, strict_mode=True)
    onnx.checker.check_model(model, full_check=True)
    scales = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    made_by = {name: node for node in model.graph.node for name in node.output}
    quantizing = [node for node in model.graph.node if node.op_type == "QuantizeLinear"]
    assert quantizing
    for node in quantizing:
        assert made_by[node.input[0]].op_type == "Cast"
        assert scales[node.input[1]].dtype == np.float32
    session = ort.InferenceSession(after, providers=["CPUExecutionProvider"])
    assert least_sqnr_db([reference(before)], session.run(None, {"images": IMAGES})) > 40
