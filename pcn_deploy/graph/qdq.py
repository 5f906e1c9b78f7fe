"""Explicit quantisation in ONNX: Q/DQ on planned inputs, weights stored as codes, INT8 with a scale per channel."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from pcn_deploy.calibration.plan import CODES
from pcn_deploy.calibration.quantized import Quantization
from pcn_deploy.errors import ModelError
from pcn_deploy.graph.repeat import SCOPES

STORED: dict[str, npt.DTypeLike] = {"int8": np.int8, "fp8": ml_dtypes.float8_e4m3fn}
"""Types of the codes in the file."""


def insert_qdq(graph: ir.Graph, quantized: dict[str, Quantization]) -> None:
    """Quantise the layers of a float32 graph, in place.

    Each layer is found by the name of its weight, a residual addition by its module. One tensor read by several
    layers at one scale gets one QuantizeLinear; a second would cost a second conversion.

    Args:
        graph: Graph as exported, not optimised: names of weights are still those of the modules.
        quantized: Scales per layer, by the name of the module.

    Raises:
        ModelError: If a layer to be quantised is not found: the graph would silently be more than 8 bits wide.
    """
    done: dict[tuple[ir.Value, float], ir.Value] = {}
    for path, scales in quantized.items():
        if not scales.weight.size:
            addition = _addition(graph, path)
            _quantize_shared(graph, addition, 1, path, scales, done)
            continue
        weight = graph.initializers.get(f"{path}.weight")
        readers = [use.node for use in weight.uses()] if weight is not None else []
        if weight is None or weight.const_value is None or len(readers) != 1:
            msg = (
                f"The exported graph does not use {path}.weight exactly once, so {path} cannot be quantised.\n"
                "Way round: call the layer and use its weight nowhere else, or give it precision fp16 in a --recipe."
            )
            raise ModelError(msg)
        layer, dequantized = _store_codes(graph, weight, readers[0], scales)
        inputs = list(layer.inputs)
        index = next(i for i, value in enumerate(inputs) if value is not None and value is not dequantized)
        _quantize_shared(graph, layer, index, path, scales, done)


def _addition(graph: ir.Graph, path: str) -> ir.Node:
    """The node of a residual addition; it has no weight to be found by."""
    found = [node for node in graph if node.op_type == "Add" and f"'{path}'" in node.metadata_props.get(SCOPES, "")]
    if len(found) != 1:
        msg = f"The exported graph holds {len(found)} additions of {path} instead of one; it cannot be quantised."
        raise ModelError(msg)
    return found[0]


def _quantize_shared(
    graph: ir.Graph,
    reader: ir.Node,
    index: int,
    path: str,
    scales: Quantization,
    done: dict[tuple[ir.Value, float], ir.Value],
) -> None:
    """Quantise one input of a node, by the Q/DQ pair that the tensor has at this scale already if there is one."""
    value = reader.inputs[index]
    if value is None:
        msg = f"{path} reads nothing."
        raise ModelError(msg)
    if (value, scales.input) not in done:
        done[value, scales.input] = _quantize_input(graph, value, reader, path, scales)
    reader.replace_input_with(index, done[value, scales.input])


def _quantize_input(graph: ir.Graph, value: ir.Value, reader: ir.Node, path: str, scales: Quantization) -> ir.Value:
    """Put QuantizeLinear and DequantizeLinear between a tensor and its reader."""
    parameters = [
        _initializer(graph, f"{path}.input_scale", np.float32(scales.input)),
        _initializer(graph, f"{path}.input_zero_point", np.zeros((), STORED[scales.codes])),
    ]
    quantize = ir.node("QuantizeLinear", [value, *parameters], name=f"{path}.quantize")
    dequantize = ir.node("DequantizeLinear", [quantize.outputs[0], *parameters], name=f"{path}.dequantize")
    quantize.outputs[0].type, dequantize.outputs[0].type = parameters[1].type, value.type
    for node in (quantize, dequantize):
        node.outputs[0].shape = value.shape
    graph.insert_before(reader, [quantize, dequantize])
    return dequantize.outputs[0]


def _store_codes(graph: ir.Graph, weight: ir.Value, reader: ir.Node, scales: Quantization) -> tuple[ir.Node, ir.Value]:
    """Replace a float weight by its codes; returns the layer that multiplies by it, and the dequantised weight.

    A Transpose between them is applied to the codes, so that DequantizeLinear is the last step.
    """
    name = str(weight.name)
    if weight.const_value is None:
        msg = f"{name} has no value."
        raise ModelError(msg)
    values = weight.const_value.numpy()
    scale, largest = scales.weight, CODES[scales.codes]
    if scales.codes == "fp8":
        scale = scale.reshape(())
    codes = (values / (scale.reshape(-1, *[1] * (values.ndim - 1)) if scale.ndim else scale)).clip(-largest, largest)
    codes = (np.rint(codes) if scales.codes == "int8" else codes).astype(STORED[scales.codes])
    axis, replaced, layer = 0, weight, reader
    if reader.op_type == "Transpose":
        order = list(reader.attributes["perm"].as_ints())
        codes, axis, replaced = (
            np.ascontiguousarray(codes.transpose(order)),
            order.index(0),
            reader.outputs[0],
        )
        layer = next(iter(replaced.uses())).node
    parameters = [
        _initializer(graph, f"{name}.{scales.codes}", codes),
        _initializer(graph, f"{name}.scale", scale),
        _initializer(graph, f"{name}.zero_point", np.zeros(scale.shape, codes.dtype)),
    ]
    attributes = {"axis": axis} if scale.ndim else {}
    node = ir.node("DequantizeLinear", parameters, attributes=attributes, name=f"{name}.dequantize")
    node.outputs[0].shape, node.outputs[0].type = ir.Shape(codes.shape), weight.type
    graph.insert_before(layer, node)
    ir.convenience.replace_all_uses_with(replaced, node.outputs[0])
    if replaced is not weight:
        graph.remove(reader, safe=True)
    del graph.initializers[name]
    return layer, node.outputs[0]


def _initializer(graph: ir.Graph, name: str, array: npt.NDArray[Any] | np.generic) -> ir.Value:
    tensor = ir.tensor(np.asarray(array), name=name)
    value = ir.Value(name=name, const_value=tensor, shape=ir.Shape(np.shape(array)), type=ir.TensorType(tensor.dtype))
    graph.register_initializer(value)
    return value
