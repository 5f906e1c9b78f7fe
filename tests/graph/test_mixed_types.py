"""Graphs of several types: each module in its own, and no cast that is not needed."""

from __future__ import annotations

from collections import Counter
from importlib.util import find_spec

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn

from pcn_deploy.calibration.quantized import Quantization
from pcn_deploy.engines.base import GraphSource
from pcn_deploy.engines.registry import get_backend
from pcn_deploy.graph.export import engine_spec, serialise, to_onnx
from pcn_deploy.graph.typed import reduce_precision
from pcn_deploy.specs import BatchRange

FLOAT, HALF = onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16
SHAPE = (16, 8, 8)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(16, 16, 1), nn.Conv2d(16, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.second(self.first(x).transpose(2, 3))
        return y


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(Block(), Block())
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.blocks(x).mean((2, 3)))
        return y


def typed(
    layers: dict[str, str], operations: dict[str, str], quantized: dict[str, Quantization] | None = None
) -> bytes:
    torch.manual_seed(0)
    net = Net().eval()
    graph = to_onnx(net, SHAPE, BatchRange(max=4), quantized or {})
    reduce_precision(graph, "fp16", layers, operations)
    data = serialise(graph)
    onnx.checker.check_model(data, full_check=True)
    images = np.random.default_rng(0).standard_normal((2, *SHAPE)).astype(np.float32)
    (found,) = ort.InferenceSession(data, providers=["CPUExecutionProvider"]).run(None, {"images": images})
    with torch.inference_mode():
        expected = net(torch.from_numpy(images)).numpy()
    np.testing.assert_allclose(found, expected, atol=0.05)
    return data


def weights(data: bytes) -> dict[str, int]:
    return {tensor.name: tensor.data_type for tensor in onnx.load_from_string(data).graph.initializer}


def casts(data: bytes) -> int:
    return Counter(node.op_type for node in onnx.load_from_string(data).graph.node)["Cast"]


def test_each_module_has_its_type() -> None:
    stored = weights(typed({"blocks.1.first": "fp32"}, {}))
    assert stored["blocks.1.first.weight"] == stored["blocks.1.first.bias"] == FLOAT
    assert {stored[f"blocks.{name}.weight"] for name in ("0.first", "0.second", "1.second")} == {HALF}


@pytest.mark.parametrize(
    ("layers", "operations", "count"),
    [
        ({}, {}, 2),  # input and output
        ({"blocks.1.first": "fp32"}, {}, 4),
        ({"blocks.1.first": "fp32", "blocks.1.second": "fp32"}, {}, 4),  # nothing around the transposition between them
        ({}, {"blocks.1": "fp32"}, 5),  # two inputs of the addition, one output
        ({"blocks.1.second": "fp32"}, {"blocks.1": "fp32"}, 5),
        ({"head": "fp32"}, {}, 2),  # the output needs none
        (dict.fromkeys(("blocks.0.first", "blocks.0.second"), "fp32"), {"blocks.0": "fp32"}, 2),
        (dict.fromkeys(("", "blocks.0", "blocks.1", "head"), "fp32"), {}, 0),
    ],
)
def test_casts_stand_only_between_types(layers: dict[str, str], operations: dict[str, str], count: int) -> None:
    assert casts(typed(layers, operations)) == count


def int8_scales() -> dict[str, Quantization]:
    return {
        path: Quantization(2.0**-5, np.full(16, 2.0**-9, np.float32)) for path in ("blocks.0.second", "blocks.1.first")
    }


def test_scales_take_the_type_of_what_they_dequantise_to() -> None:
    data = typed({"blocks.0.first": "fp32"}, {"blocks.0": "fp32"}, int8_scales())
    graph = onnx.shape_inference.infer_shapes(onnx.load_from_string(data), strict_mode=True).graph
    kinds = {value.name: value.type.tensor_type.elem_type for value in graph.value_info}
    readers = [node for node in graph.node if node.op_type == "DequantizeLinear"]
    assert [kinds[node.output[0]] for node in readers] == [HALF] * 4
    assert not any(node.op_type == "Cast" and node.input[0] in {x.output[0] for x in readers} for node in graph.node)


@pytest.mark.skipif(find_spec("tensorrt_rtx") is None, reason="TensorRT-RTX is not installed")
def test_tensorrt_builds_it() -> None:
    torch.manual_seed(0)
    graph = to_onnx(Net().eval(), SHAPE, BatchRange(max=4), int8_scales())
    reduce_precision(graph, "fp16", {"blocks.0.first": "fp32"}, {"blocks.0": "fp32"})
    source = GraphSource(onnx=serialise(graph), torchscript=b"", spec=engine_spec(graph, BatchRange(max=4)))
    built_with = get_backend("tensorrt-rtx").build(source).built_with
    assert "HALF" in built_with["layers"]
    assert "FLOAT" in built_with["layers"]
