"""Give a float32 graph its types: FP16 or BF16 with explicit casts, FP32 where the operator needs it.

TensorRT networks are strongly typed since version 11: the precision of an engine is the precision of the graph.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from pcn_deploy.errors import ModelError

REDUCED = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}
_LARGEST = {"fp16": float(np.finfo(np.float16).max), "bf16": 3.38e38}


def reduce_precision(model: ir.Model, precision: str) -> int:
    """Turn every float32 tensor inside the graph into FP16 or BF16, in place; inputs and outputs stay float32.

    LayerNormalization keeps its float32 statistics (`stash_type`), and scales of Q/DQ take the type of what they
    dequantise to, so that no cast stands between a DequantizeLinear and its reader.

    Args:
        model: A float32 graph, Q/DQ allowed.
        precision: `fp16` or `bf16`.

    Returns:
        Number of initialisers converted.

    Raises:
        ModelError: If a weight does not fit the range of the type.
    """
    reduced, graph = REDUCED[precision], model.graph
    converted = 0
    for value in list(graph.initializers.values()):
        if value.dtype == ir.DataType.FLOAT and value.const_value is not None:
            _convert_initializer(value, reduced, precision)
            converted += 1
    outputs = set(graph.outputs)
    for node in graph.all_nodes():
        _retype_attributes(node, reduced)
        for value in node.outputs:
            if value.dtype == ir.DataType.FLOAT and value not in outputs:
                value.type = ir.TensorType(reduced)
    _cast_inputs(graph, reduced)
    _cast_outputs(graph, reduced)
    return converted


def _convert_initializer(value: ir.Value, reduced: ir.DataType, precision: str) -> None:
    if value.const_value is None:
        return
    array = value.const_value.numpy()
    largest = float(np.abs(array).max()) if array.size else 0.0
    if largest > _LARGEST[precision]:
        msg = f"Weight {value.name} reaches {largest:.3g}, beyond {precision}; build with --precision fp32."
        raise ModelError(msg)
    value.const_value = ir.tensor(array.astype(reduced.numpy()), dtype=reduced, name=value.name)
    value.type = ir.TensorType(reduced)


def _retype_attributes(node: ir.Node, reduced: ir.DataType) -> None:
    """Operators that name a float32 type or value in an attribute follow the rest of the graph."""
    if node.op_type == "Cast" and node.attributes["to"].as_int() == ir.DataType.FLOAT:
        node.attributes["to"] = ir.AttrInt64("to", int(reduced))
    constant = node.attributes.get("value") if node.op_type in {"Constant", "ConstantOfShape"} else None
    if constant is not None and constant.as_tensor().dtype == ir.DataType.FLOAT:
        array = constant.as_tensor().numpy().astype(reduced.numpy())
        node.attributes["value"] = ir.AttrTensor("value", ir.tensor(array, dtype=reduced))


def _cast_inputs(graph: ir.Graph, reduced: ir.DataType) -> None:
    for value in graph.inputs:
        if value.dtype != ir.DataType.FLOAT:
            continue
        readers = [(use.node, use.idx) for use in value.uses()]
        cast = ir.node("Cast", [value], attributes={"to": int(reduced)}, name=f"{value.name}.cast")
        cast.outputs[0].type, cast.outputs[0].shape = ir.TensorType(reduced), value.shape
        for node, index in readers:
            node.replace_input_with(index, cast.outputs[0])
        graph.insert_before(graph[0], cast)


def _cast_outputs(graph: ir.Graph, reduced: ir.DataType) -> None:
    for index, value in enumerate(list(graph.outputs)):
        if value.dtype != ir.DataType.FLOAT or value.producer() is None:
            continue
        name = value.name
        value.name = f"{name}.{reduced.name.lower()}"
        cast = ir.node("Cast", [value], attributes={"to": int(ir.DataType.FLOAT)}, name=f"{name}.cast")
        final = cast.outputs[0]
        final.name, final.shape, final.type = name, value.shape, ir.TensorType(ir.DataType.FLOAT)
        value.type = ir.TensorType(reduced)
        graph.append(cast)
        graph.outputs[index] = final
