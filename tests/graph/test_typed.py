"""Typed graphs: FP16 or BF16 inside, float32 at the borders, and still the same function."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn

from pcn_deploy.calibration.quantized import Quantization, apply_scales
from pcn_deploy.errors import ModelError
from pcn_deploy.graph.export import serialise, to_onnx
from pcn_deploy.graph.typed import reduce_precision
from pcn_deploy.models.patchconvnet import PatchConvNet
from pcn_deploy.network.deploy import to_deploy
from pcn_deploy.specs import BatchRange

MakeNet = Callable[..., PatchConvNet]
SHAPE = (3, 32, 48)


def sqnr_db(expected: np.ndarray[tuple[int, ...], np.dtype[np.float32]], found: object) -> float:
    noise = float(((expected - np.asarray(found)) ** 2).sum())
    return 10 * float(np.log10(float((expected**2).sum()) / max(noise, 1e-30)))


def check_types(data: bytes, precision: int) -> None:
    """Everything but the inputs and outputs, and the tensors of Q/DQ and shapes, has one type."""
    onnx.checker.check_model(data, full_check=True)
    graph = onnx.shape_inference.infer_shapes(onnx.load_from_string(data), strict_mode=True).graph
    inner = {value.name: value.type.tensor_type.elem_type for value in graph.value_info}
    assert onnx.TensorProto.FLOAT not in inner.values()
    assert precision in inner.values()
    stored = {tensor.name: tensor.data_type for tensor in graph.initializer}
    assert onnx.TensorProto.FLOAT not in stored.values()
    assert precision in stored.values()
    for value in (*graph.input, *graph.output):
        assert value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    assert [value.name for value in (*graph.input, *graph.output)] == ["images", "logits"]


@pytest.fixture(scope="module")
def net(make_net: MakeNet) -> nn.Module:
    return to_deploy(make_net(depth=2), torch.rand(1, *SHAPE))[0]


def test_fp16_is_fp16_inside_and_float32_outside(net: nn.Module) -> None:
    graph = to_onnx(net, SHAPE, BatchRange(), {})
    assert reduce_precision(graph, "fp16") == len(graph.graph.initializers) - sum(
        value.dtype == ir.DataType.INT64 for value in graph.graph.initializers.values()
    )
    data = serialise(graph)
    check_types(data, onnx.TensorProto.FLOAT16)
    session = ort.InferenceSession(data, providers=["CPUExecutionProvider"])
    for batch in (1, 3, 16):
        images = np.random.default_rng(batch).standard_normal((batch, *SHAPE)).astype(np.float32)
        (logits,) = session.run(None, {"images": images})
        with torch.inference_mode():
            expected = net(torch.from_numpy(images)).numpy()
        assert logits.dtype == np.float32
        assert 40 < sqnr_db(expected, logits) < 120, "close, yet not computed in float32"


def test_bf16_retypes_too(net: nn.Module) -> None:
    graph = to_onnx(net, SHAPE, BatchRange(), {})
    assert reduce_precision(graph, "bf16") > 20
    onnx.checker.check_model(serialise(graph))  # without type inference: ONNX itself lists BF16 for Conv since opset 22
    inner = {value.dtype for node in graph.graph for value in node.outputs} - {ir.DataType.INT64}
    stored = {value.dtype for value in graph.graph.initializers.values()} - {ir.DataType.INT64}
    assert (inner, stored) == ({ir.DataType.BFLOAT16, ir.DataType.FLOAT}, {ir.DataType.BFLOAT16})
    float32 = [value for node in graph.graph for value in node.outputs if value.dtype == ir.DataType.FLOAT]
    assert float32 == list(graph.graph.outputs)


def test_scales_of_qdq_take_the_type_of_the_rest(net: nn.Module) -> None:
    scales = {
        path: Quantization(1 / 16, np.full(32, 1 / 128, np.float32))
        for path in ("blocks.0.attn.qkv_pos.0", "blocks.1.attn.qkv_pos.5")
    }
    graph = to_onnx(net, SHAPE, BatchRange(), scales)
    reduce_precision(graph, "fp16")
    data = serialise(graph)
    check_types(data, onnx.TensorProto.FLOAT16)
    for node in graph.graph:
        if node.op_type == "DequantizeLinear":
            assert node.inputs[0] is not None and node.inputs[0].dtype == ir.DataType.INT8
            assert node.outputs[0].dtype == ir.DataType.FLOAT16
    images = np.random.default_rng(0).standard_normal((2, *SHAPE)).astype(np.float32)
    (logits,) = ort.InferenceSession(data, providers=["CPUExecutionProvider"]).run(None, {"images": images})
    with torch.inference_mode():
        expected = apply_scales(net, scales)(torch.from_numpy(images)).numpy()
    assert sqnr_db(expected, logits) > 40


@pytest.mark.parametrize(("value", "fits"), [(65504.0, True), (65600.0, False), (-7e4, False)])
def test_a_weight_beyond_the_range_is_an_error(value: float, fits: bool) -> None:
    conv = nn.Conv2d(3, 4, 1)
    net = nn.Sequential(conv, nn.Flatten()).eval()
    with torch.no_grad():
        conv.weight[1, 1, 0, 0] = value
    graph = to_onnx(net, (3, 2, 2), BatchRange(), {})
    if fits:
        assert reduce_precision(graph, "fp16") == 2
    else:
        with pytest.raises(ModelError, match=r"0\.weight reaches .*fp16; build with --precision fp32"):
            reduce_precision(graph, "fp16")


def test_the_advice_against_a_weight_beyond_the_range_fits_what_is_built() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 16, 1), nn.Flatten()).eval()
    with torch.no_grad():
        net.get_submodule("0").weight[1, 1, 0, 0] = 1e5  # type: ignore[operator]
    graph = to_onnx(net, (3, 2, 2), BatchRange(), {"1": Quantization(1 / 16, np.full(16, 1 / 128, np.float32))})
    with pytest.raises(ModelError, match=r"0\.weight reaches .*fp16; build with --remainder fp32"):
        reduce_precision(graph, "fp16")
    graph = to_onnx(net, (3, 2, 2), BatchRange(), {})
    with pytest.raises(ModelError, match=r"0\.weight reaches .*fp16; give its layer precision fp32 in the recipe"):
        reduce_precision(graph, "fp32", {"0": "fp16"})


class Constants(nn.Module):
    """Names float32 in the graph: a tensor made on the way, a cast, an input that is also the output."""

    def forward(self, x: Tensor) -> Tensor:
        mask = (x > 0.5).float()
        return x * mask + torch.full((1, 3, 1, 1), 0.25) + torch.ones_like(x)


def test_constants_and_casts_follow_the_rest() -> None:
    graph = to_onnx(Constants().eval(), (3, 4, 4), BatchRange(), {})
    reduce_precision(graph, "fp16")
    data = serialise(graph)
    onnx.checker.check_model(data, full_check=True)
    images = np.random.default_rng(0).random((2, 3, 4, 4)).astype(np.float32)
    (found,) = ort.InferenceSession(data, providers=["CPUExecutionProvider"]).run(None, {"images": images})
    np.testing.assert_allclose(found, Constants()(torch.from_numpy(images)).numpy(), atol=2e-3)
