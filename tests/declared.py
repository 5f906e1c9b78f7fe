"""A slow and plain reference for typed graphs: node by node, each tensor stored in the type that the graph declares."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx
from onnx.reference import ReferenceEvaluator

Array = npt.NDArray[np.generic]
HALVES: dict[int, npt.DTypeLike] = {
    int(onnx.TensorProto.FLOAT16): np.float16,
    int(onnx.TensorProto.BFLOAT16): ml_dtypes.bfloat16,
}


def run_declared(data: bytes, images: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """The first output of a typed graph of one input, every operator computed in float32 by ONNX's reference."""
    model = onnx.shape_inference.infer_shapes(onnx.load_from_string(data))
    graph = model.graph
    declared = {value.name: value.type.tensor_type.elem_type for value in (*graph.value_info, *graph.output)}
    values: dict[str, Array] = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    values[graph.input[0].name] = images
    for node in graph.node:
        inputs = {name: _widened(values[name]) for name in node.input if name}
        for name, made in zip(node.output, _run(node, inputs, model.opset_import), strict=True):
            values[name] = _stored(made, declared[name])
    return np.asarray(values[graph.output[0].name], np.float32)


def _run(node: onnx.NodeProto, inputs: dict[str, Array], opsets: list[onnx.OperatorSetIdProto]) -> list[Array]:
    if node.op_type == "Cast":
        return list(inputs.values())
    any_type = onnx.TypeProto()
    graph = onnx.helper.make_graph(
        [node],
        "one",
        [onnx.helper.make_value_info(name, any_type) for name in inputs],
        [onnx.helper.make_value_info(name, any_type) for name in node.output],
    )
    evaluator = ReferenceEvaluator(onnx.helper.make_model(graph, opset_imports=opsets))
    with np.errstate(all="ignore"):  # an overflow is what one looks for
        return evaluator.run(None, inputs)  # type: ignore[return-value]


def _widened(array: Array) -> Array:
    return array.astype(np.float32) if array.dtype in (np.float16, ml_dtypes.bfloat16) else array


def _stored(array: Array, kind: int) -> Array:
    with np.errstate(all="ignore"):
        return np.asarray(array).astype(HALVES[kind] if kind in HALVES else onnx.helper.tensor_dtype_to_np_dtype(kind))
