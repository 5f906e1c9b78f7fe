"""A typed graph as a float32 one: with every tensor rounded to the type that it was declared in, or with none rounded.

ONNX Runtime has few FP16 kernels on the CPU: it computes in FP32 from one to the next, so that neither an overflow nor
an underflow of what the graph declares as FP16 can be seen, and it has none for BF16. A device stores what it declares.
Where nothing is rounded but the weights, a graph must equal its module to float32, so that a small fault shows that
rounding would hide.
"""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir

HALVES = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)

_EXACT = {
    *("Abs", "Concat", "Expand", "Flatten", "Gather", "GatherElements", "GatherND", "GlobalMaxPool", "Identity", "Max"),
    *("MaxPool", "Min", "Neg", "Pad", "ReduceMax", "ReduceMin", "Relu", "Reshape", "Slice", "Split", "Squeeze"),
    *("Tile", "Transpose", "Unsqueeze", "Where"),
}
"""Each number that they make is one that they read, but for its sign, or a zero: it has been rounded."""

_SQUARING = ("ReduceL2", "ReduceSumSquare")
"""Their squares may be kept in their own type; nothing says that they are not."""

_SMALL = 1024
"""Numbers of an initialiser that is widened here; larger ones are kept as they are and widened by the runtime."""


def holds_bf16(data: bytes) -> bool:
    """Whether a serialised graph makes or stores BF16 tensors; what is no graph does not."""
    try:
        graph = onnx.load_from_string(data).graph
    except Exception:  # protobuf's own error
        return False
    kinds = {tensor.data_type for tensor in graph.initializer}
    kinds |= {value.type.tensor_type.elem_type for value in graph.value_info}
    return onnx.TensorProto.BFLOAT16 in kinds


def round_to_types(data: bytes) -> bytes:
    """Make a graph that computes in float32 and rounds every FP16 and BF16 tensor to its type, half to even.

    Each operator is executed in float32 and its outputs are rounded, as by a kernel that accumulates in FP32 and stores
    in the declared type; of a norm, the squares and their sum too. Values beyond the largest become infinite, subnormal
    ones lose their bits.

    Args:
        data: A serialised graph, Q/DQ allowed, whose inputs and outputs are float32.

    Returns:
        The serialised graph of the same interface, without FP16 and BF16 but for the casts that round.
    """
    model = ir.from_proto(_with_types(onnx.load_from_string(data)))
    for node in list(model.graph.all_nodes()):
        if node.op_type in _SQUARING and node.outputs[0].dtype in HALVES:
            _spell_out(node)
    nodes = list(model.graph.all_nodes())
    halves = _widen_all(model.graph)
    for node in nodes:
        for value in node.outputs:
            if value in halves and node.op_type not in _EXACT:
                _round(node, value, halves[value])
    return _serialised(model)


def widen(data: bytes) -> bytes:
    """Make a graph that computes in float32 and rounds no activation: it has no codes but those of weights.

    Args:
        data: A serialised graph, Q/DQ allowed, whose inputs and outputs are float32.

    Returns:
        The serialised graph of the same interface. Weights are what their codes, or their FP16 or BF16, stand for.
    """
    model = ir.from_proto(_with_types(onnx.load_from_string(data)))
    _widen_all(model.graph)
    for node in list(model.graph.all_nodes()):
        codes = node.inputs[0].producer() if node.op_type == "DequantizeLinear" and node.inputs[0] else None
        if codes is not None and codes.op_type == "QuantizeLinear" and codes.inputs[0] is not None:
            ir.convenience.replace_all_uses_with(node.outputs[0], codes.inputs[0], replace_graph_outputs=True)
    return _serialised(model)


def _serialised(model: ir.Model) -> bytes:
    """The bytes of a model, which holds no weights afterwards: it refers to itself, and is freed late."""
    data: bytes = ir.to_proto(model).SerializeToString()
    for value in model.graph.initializers.values():
        value.const_value = None
    return data


def _widen_all(graph: ir.Graph) -> dict[ir.Value, ir.DataType]:
    """Make all FP16 and BF16 float32, in place; returns what each computed tensor was."""
    nodes = list(graph.all_nodes())
    halves = {value: value.dtype for node in nodes for value in node.outputs if value.dtype in HALVES}
    for node in nodes:
        _widen_attributes(node)
    for value in list(graph.initializers.values()):
        _widen_initializer(graph, value)
    for value in halves:
        value.type = ir.TensorType(ir.DataType.FLOAT)
    return {value: ir.DataType(kind) for value, kind in halves.items() if kind is not None}


def _with_types(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The graph with a type on every tensor, as ours have it; others are inferred."""
    typed = {value.name for value in (*proto.graph.value_info, *proto.graph.output)}
    complete = all(name in typed for node in proto.graph.node for name in node.output if name)
    return proto if complete else onnx.shape_inference.infer_shapes(proto)


def _spell_out(node: ir.Node) -> None:
    """Write the squares, the sum and the root of a node as nodes of their own."""
    value, kind = node.inputs[0], node.outputs[0].type
    if value is None or node.graph is None:
        return
    square = ir.node("Mul", [value, value], name=f"{node.name}.square")
    total = ir.node("ReduceSum", [square.outputs[0], *node.inputs[1:]], node.attributes, name=f"{node.name}.sum")
    made = [square, total]
    if node.op_type == "ReduceL2":
        made.append(ir.node("Sqrt", [total.outputs[0]], name=f"{node.name}.root"))
    square.outputs[0].shape = value.shape
    for each in made:
        each.outputs[0].type = kind
    ir.convenience.replace_nodes_and_values(node.graph, node, [node], made, node.outputs, made[-1].outputs)


def _widen_attributes(node: ir.Node) -> None:
    """Operators that name FP16 or BF16 in an attribute, or hold values in it, make float32 instead."""
    for name, attribute in list(node.attributes.items()):
        if attribute.type == ir.AttributeType.INT and name in {"to", "dtype"} and attribute.as_int() in HALVES:
            node.attributes[name] = ir.AttrInt64(name, int(ir.DataType.FLOAT))
        elif attribute.type == ir.AttributeType.TENSOR and attribute.as_tensor().dtype in HALVES:
            array = attribute.as_tensor().numpy().astype(np.float32)
            node.attributes[name] = ir.AttrTensor(name, ir.tensor(array))


def _widen_initializer(graph: ir.Graph, value: ir.Value) -> None:
    if value.dtype not in HALVES or value.const_value is None:
        return
    if value.const_value.size <= _SMALL:
        value.const_value = ir.tensor(value.const_value.numpy().astype(np.float32), name=value.name)
        value.type = ir.TensorType(ir.DataType.FLOAT)
        return
    widened = ir.node("Cast", [value], attributes={"to": int(ir.DataType.FLOAT)}, name=f"{value.name}.widened")
    widened.outputs[0].type, widened.outputs[0].shape = ir.TensorType(ir.DataType.FLOAT), value.shape
    uses = list(value.uses())
    graph.insert_before(graph[0], widened)
    for use in uses:
        if use.node is not widened:
            use.node.replace_input_with(use.idx, widened.outputs[0])


def _round(node: ir.Node, value: ir.Value, kind: ir.DataType) -> None:
    """Put casts to a type and back between a tensor and its readers."""
    uses = list(value.uses())
    narrow = ir.node("Cast", [value], attributes={"to": int(kind)}, name=f"{value.name}.narrowed")
    widen = ir.node(
        "Cast", [narrow.outputs[0]], attributes={"to": int(ir.DataType.FLOAT)}, name=f"{value.name}.rounded"
    )
    for made, made_kind in ((narrow.outputs[0], kind), (widen.outputs[0], ir.DataType.FLOAT)):
        made.type, made.shape = ir.TensorType(made_kind), value.shape
    owner = node.graph
    if owner is None:
        return
    owner.insert_after(node, [narrow, widen])
    for use in uses:
        use.node.replace_input_with(use.idx, widen.outputs[0])
    for index, output in enumerate(owner.outputs):  # of a body: those of a graph of ours are float32
        if output is value:
            owner.outputs[index] = widen.outputs[0]
