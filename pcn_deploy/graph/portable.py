"""The last change to a typed graph: forms that ONNX Runtime's default session does not spoil.

People run `model.onnx` in a session with default options. Some of its rewrites are wrong on graphs like ours (seen in
1.22 to 1.32); each function here takes away the form that one of them looks for. What the graph computes stays the
same, and so does what TensorRT makes of it: it fuses an addition of constants into the product before it (NVIDIA
ModelOpt's list of fusible patterns), and the engines of TensorRT-RTX keep their kernels and sizes.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from pcn_deploy.engines.onnxruntime import truncates_half

_CONVOLUTIONS = ("Conv", "ConvTranspose")


def make_portable(graph: ir.Graph) -> None:
    """Give a graph the forms that survive ONNX Runtime's rewrites, in place.

    Args:
        graph: With its types and Q/DQ; nothing may change its form after this.
    """
    has_fp8 = any(value.dtype == ir.DataType.FLOAT8E4M3FN for value in graph.initializers.values())
    for node in list(graph):
        if node.op_type in _CONVOLUTIONS and _is_dequantized(node.inputs[1]):
            _separate_bias(graph, node)
        elif node.op_type == "Gemm" and _is_dequantized(node.inputs[1]):
            _widen_bias(graph, node, 2)
        elif node.op_type == "Add":
            _widen_bias_of_product(graph, node)
        elif node.op_type in {"Relu", "Clip"} and has_fp8:
            _write_as_max_and_min(graph, node)
        elif node.op_type == "MatMul":
            _transpose_after(graph, node)
        elif node.op_type == "QuantizeLinear" and truncates_half():
            _quantize_widened(graph, node)
    for value in list(graph.initializers.values()):
        if not value.uses() and not value.is_graph_output():
            del graph.initializers[str(value.name)]


def _separate_bias(graph: ir.Graph, node: ir.Node) -> None:
    """Add the bias of a quantised convolution behind it.

    `WeightBiasQuantization` would make INT32 codes of it, at a scale that is the product of two scales in their own
    type: in FP16 that becomes 0, and in FP32 the codes of a channel of tiny weights overflow.
    """
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    weight = node.inputs[1]
    if bias is None or not bias.is_initializer() or weight is None or weight.shape is None:
        return
    shaped = _reshaped(graph, bias, (1, -1, *[1] * (len(weight.shape) - 2)))
    product = node.outputs[0]
    node.resize_inputs(2)
    add = ir.node("Add", [product, shaped], name=f"{node.name}.bias")
    total = add.outputs[0]
    total.shape, total.type = product.shape, product.type
    ir.convenience.replace_all_uses_with(product, total, replace_graph_outputs=True)
    add.replace_input_with(0, product)
    product.name, total.name = f"{product.name}.product", product.name
    graph.insert_after(node, [add])


def _widen_bias(graph: ir.Graph, node: ir.Node, index: int, rank: int = 2) -> None:
    """Give the bias of a quantised product rank 2 or more: what `WeightBiasQuantization` looks for has rank 1."""
    bias = node.inputs[index] if len(node.inputs) > index else None
    if bias is not None and bias.is_initializer() and bias.shape is not None and len(bias.shape) == 1:
        node.replace_input_with(index, _reshaped(graph, bias, (*[1] * (rank - 1), -1)))


def _widen_bias_of_product(graph: ir.Graph, node: ir.Node) -> None:
    """The same for a bias that is added to a MatMul: ONNX Runtime would make one Gemm of both first."""
    for index, value in enumerate(node.inputs):
        product = value.producer() if value is not None else None
        if product is None or product.op_type != "MatMul" or not _is_dequantized(product.inputs[1]):
            continue
        shape = product.outputs[0].shape
        if shape is not None:
            _widen_bias(graph, node, 1 - index, len(shape))


def _write_as_max_and_min(graph: ir.Graph, node: ir.Node) -> None:
    """Write a Relu or Clip of an FP8 graph as Max and Min.

    `ReluQuantRewrite` drops a Relu before FP8 codes, as if they had no negatives, and `ClipQuantRewrite` refuses the
    graph; `QDQPropagation` may move the codes there.
    """
    lowest = _zero(graph, node.outputs[0]) if node.op_type == "Relu" else _optional(node, 1)
    value, kind = node.inputs[0], node.outputs[0].type
    clamps: list[ir.Node] = []
    for operator, limit in (("Max", lowest), ("Min", _optional(node, 2))):
        if limit is not None:
            clamps.append(ir.node(operator, [value, limit], name=f"{node.name}.{operator.lower()}"))
            value = clamps[-1].outputs[0]
            value.shape, value.type = node.outputs[0].shape, kind
    if value is None or not clamps:
        return
    graph.insert_before(node, clamps)
    name = node.outputs[0].name
    ir.convenience.replace_all_uses_with(node.outputs[0], value, replace_graph_outputs=True)
    graph.remove(node, safe=True)
    value.name = name


def _transpose_after(graph: ir.Graph, node: ir.Node) -> None:
    """Let an FP16 product with constant weights come before a transposition that makes rows of the first axis.

    `MatmulTransposeFusion` fuses the two into a product that ends the process with signal 11 when ONNX Runtime then
    converts the weights to FP32 (1.31, 1.32). `nn.MultiheadAttention` transposes so. Both orders compute the same
    where the last axis, which is summed over, stays the last.
    """
    read, weight = node.inputs
    transpose = read.producer() if read is not None else None
    if transpose is None or transpose.op_type != "Transpose" or weight is None or weight.shape is None:
        return
    order = list(transpose.attributes["perm"].as_ints())
    last = len(order) - 1
    moves_first_axis_to_rows = len(order) > 2 and order[last] == last and order[last - 1] == 0
    constant = weight.is_initializer() and weight.dtype == ir.DataType.FLOAT16 and len(weight.shape) == 2
    source = transpose.inputs[0]
    if not (moves_first_axis_to_rows and constant) or source is None or source.shape is None:
        return
    product = ir.node("MatMul", [source, weight], name=node.name)
    product.outputs[0].shape = ir.Shape([*source.shape[:-1], weight.shape[1]])
    moved = ir.node("Transpose", [product.outputs[0]], attributes={"perm": order}, name=transpose.name)
    for made in (product, moved):
        made.outputs[0].type = node.outputs[0].type
    moved.outputs[0].shape = node.outputs[0].shape
    graph.insert_before(node, [product, moved])
    name = node.outputs[0].name
    ir.convenience.replace_all_uses_with(node.outputs[0], moved.outputs[0], replace_graph_outputs=True)
    graph.remove(node, safe=True)
    moved.outputs[0].name = name
    if not transpose.outputs[0].uses() and not transpose.outputs[0].is_graph_output():
        graph.remove(transpose, safe=True)


def _quantize_widened(graph: ir.Graph, node: ir.Node) -> None:
    """Make INT8 codes of FP16 from the same numbers in FP32.

    Only where the installed runtime cannot do without: TensorRT-RTX makes engines of one size of both forms (within
    0.1 % on a MnasNet), but whether TensorRT still fuses the codes into the layer before them was not measured.
    """
    value, scale = node.inputs[:2]
    kinds = value and value.dtype, node.outputs[0].dtype
    tensor = ir.convenience.get_const_tensor(scale) if scale is not None else None
    if value is None or scale is None or tensor is None or kinds != (ir.DataType.FLOAT16, ir.DataType.INT8):
        return
    wide = ir.node("Cast", [value], attributes={"to": ir.DataType.FLOAT}, name=f"{node.name}.widen")
    wide.outputs[0].shape, wide.outputs[0].type = value.shape, ir.TensorType(ir.DataType.FLOAT)
    graph.insert_before(node, wide)
    node.replace_input_with(0, wide.outputs[0])
    node.replace_input_with(1, _constant(graph, f"{scale.name}.fp32", ir.tensor(tensor.numpy().astype(np.float32))))


def _is_dequantized(value: ir.Value | None) -> bool:
    producer = value.producer() if value is not None else None
    return producer is not None and producer.op_type == "DequantizeLinear"


def _optional(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if len(node.inputs) > index else None


def _zero(graph: ir.Graph, like: ir.Value) -> ir.Value:
    """The constant 0 in the type of a value."""
    kind = like.dtype or ir.DataType.FLOAT
    return _constant(graph, f"zero.{kind.name.lower()}", ir.tensor(np.zeros((), kind.numpy()), dtype=kind))


def _reshaped(graph: ir.Graph, value: ir.Value, shape: tuple[int, ...]) -> ir.Value:
    """An initialiser in another shape."""
    tensor = ir.convenience.get_const_tensor(value)
    if tensor is None:
        return value
    array = tensor.numpy().reshape(shape)
    name = f"{value.name}.{'x'.join(map(str, array.shape))}"
    return _constant(graph, name, ir.tensor(array, dtype=tensor.dtype))


def _constant(graph: ir.Graph, name: str, tensor: ir.TensorProtocol) -> ir.Value:
    """An initialiser; the one of this name if there is one already."""
    if name not in graph.initializers:
        value = ir.Value(
            name=name, const_value=tensor, shape=ir.Shape(tensor.shape.numpy()), type=ir.TensorType(tensor.dtype)
        )
        graph.register_initializer(value)
    return graph.initializers[name]
