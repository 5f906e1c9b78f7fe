"""Typed graphs hold only the types that operators take: every operator of the opset is walked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pcn_deploy.graph.export import OPSET, serialise, to_onnx
from pcn_deploy.graph.typed import reduce_precision
from pcn_deploy.specs import BatchRange

KINDS = {"tensor(float)": ir.DataType.FLOAT, "tensor(int64)": ir.DataType.INT64, "tensor(bool)": ir.DataType.BOOL}
SPELT = {ir.DataType.FLOAT16: "tensor(float16)", ir.DataType.BFLOAT16: "tensor(bfloat16)"} | {
    kind: name for name, kind in KINDS.items()
}
TYPE_NAMING = {"Cast": "to", "EyeLike": "dtype", "HannWindow": "output_datatype", "RandomNormal": "dtype"}


def operators() -> list[str]:
    """All that take or make float32 tensors, but for those that hold graphs."""
    found = []
    known = onnx.defs.get_all_schemas_with_history()
    for name in sorted({x.name for x in known if not x.domain and x.since_version <= OPSET}):
        schema = onnx.defs.get_schema(name, OPSET)
        if schema.deprecated or name in {"If", "Loop", "Scan", "SequenceMap"}:
            continue
        if any("tensor(float)" in parameter.types for parameter in (*schema.inputs, *schema.outputs)):
            found.append(name)
    return found


def one_node(name: str) -> ir.Model:
    """A float32 graph of one node with all its inputs and outputs."""

    def value(label: str, parameter: Any) -> ir.Value:
        known = [text for text in KINDS if text in parameter.types]
        kind = KINDS[known[0]] if known else ir.DataType.INT8
        text = next(iter(parameter.types))
        sequence = not known and text.startswith(("seq", "optional"))
        made = ir.SequenceType(ir.TensorType(ir.DataType.FLOAT)) if sequence else ir.TensorType(kind)
        return ir.Value(name=label, shape=None if sequence else ir.Shape([1]), type=made)

    schema = onnx.defs.get_schema(name, OPSET)
    inputs = [value(f"in{index}", parameter) for index, parameter in enumerate(schema.inputs)]
    outputs = [value(f"out{index}", parameter) for index, parameter in enumerate(schema.outputs)]
    attributes = {TYPE_NAMING[name]: ir.AttrInt64(TYPE_NAMING[name], 1)} if name in TYPE_NAMING else {}
    node = ir.Node("", name, inputs, attributes.values(), outputs=outputs)
    graph = ir.Graph(inputs, outputs, nodes=[node], opset_imports={"": OPSET}, name="one")
    return ir.Model(graph, ir_version=9)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_every_operator_of_the_opset_gets_types_that_it_takes(precision: str) -> None:
    wrong, reduced = [], set()
    for name in operators():
        model = one_node(name)
        reduce_precision(model, precision)
        node = next(node for node in model.graph if node.op_type == name and "." not in (node.name or ""))
        schema = onnx.defs.get_schema(name, OPSET if precision == "fp16" else onnx.defs.onnx_opset_version())
        bound: dict[str, set[str]] = {}
        for values, parameters in ((node.inputs, schema.inputs), (node.outputs, schema.outputs)):
            for value, parameter in zip(values, parameters, strict=False):
                if value is None or not isinstance(value.type, ir.TensorType) or value.dtype not in SPELT:
                    continue
                spelt = SPELT[value.dtype]
                bound.setdefault(parameter.type_str, set()).add(spelt)
                if spelt not in parameter.types and not set(KINDS).isdisjoint(parameter.types):
                    wrong.append((name, parameter.name, spelt))
                if spelt in {"tensor(float16)", "tensor(bfloat16)"}:
                    reduced.add(name)
        wrong += [(name, variable, str(kinds)) for variable, kinds in bound.items() if len(kinds) > 1]
        for value in model.graph.outputs:
            if isinstance(value.type, ir.TensorType) and value.dtype in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16):
                wrong.append((name, str(value.name), "an output of the graph"))
    assert wrong == []
    assert {"Conv", "MatMul", "Gemm", "Resize", "Add", "Softmax", "QuantizeLinear", "Concat"} <= reduced
    assert precision == "bf16" or not {"Celu", "Range"} & reduced


class Resized(nn.Module):
    def __init__(self, resize: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.resize = nn.Conv2d(3, 4, 3, padding=1), resize

    def forward(self, x: Tensor) -> Tensor:
        return self.resize(self.first(x)).mean((2, 3))


RESIZES: dict[str, Callable[[Tensor], Tensor]] = {
    "nearest": nn.Upsample(scale_factor=2),
    "nearest, odd": nn.Upsample(scale_factor=(1.5, 3.0)),
    "bilinear": nn.Upsample(scale_factor=2, mode="bilinear"),
    "bilinear, aligned": nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True),
    "bicubic": nn.Upsample(scale_factor=1.5, mode="bicubic"),
    "to a size": nn.Upsample(size=(9, 5), mode="bilinear"),
    "smaller": lambda x: F.interpolate(x, scale_factor=0.5),
    "celu": nn.CELU(),
    "a range": lambda x: x * torch.arange(x.shape[-1], dtype=torch.float32),
}


@pytest.mark.parametrize("name", RESIZES)
def test_resized_networks_run_in_fp16(name: str) -> None:
    torch.manual_seed(0)
    net = Resized(RESIZES[name]).eval()
    graph = to_onnx(net, (3, 6, 8), BatchRange(max=4), {})
    reduce_precision(graph, "fp16")
    data = serialise(graph)
    onnx.checker.check_model(data, full_check=True)
    images = np.random.default_rng(0).standard_normal((2, 3, 6, 8)).astype(np.float32)
    (found,) = ort.InferenceSession(data, providers=["CPUExecutionProvider"]).run(None, {"images": images})
    with torch.inference_mode():
        np.testing.assert_allclose(found, net(torch.from_numpy(images)).numpy(), atol=5e-3)
