"""Explicit quantisation in ONNX: Q/DQ on planned inputs, weights stored as codes, INT8 with a scale per channel."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from pcn_deploy.calibration.plan.rules import CODES
from pcn_deploy.calibration.quantized import Quantization
from pcn_deploy.errors import ModelError
from pcn_deploy.graph.repeat import SCOPES

STORED: dict[str, npt.DTypeLike] = {"int8": np.int8, "fp8": ml_dtypes.float8_e4m3fn}
"""Types of the codes in the file."""


def insert_qdq(graph: ir.Graph, quantized: dict[str, Quantization]) -> None:
    """Quantise the layers of a float32 graph, in place.

    Each layer is found by the name of its weight or, where layers share one, by its module, as a residual addition is.
    One tensor read by several layers at one scale gets one QuantizeLinear; a second would cost a second conversion. The
    codes of a weight that several layers share are stored once.

    Args:
        graph: Graph as exported, not optimised: names of weights are still those of the modules.
        quantized: Scales per layer, by the name of the module.

    Raises:
        ModelError: If a layer to be quantised is not found: the graph would silently be more than 8 bits wide.
    """
    done: dict[tuple[ir.Value, float], ir.Value] = {}
    stored: dict[tuple[Any, ...], list[ir.Value]] = {}
    for path, scales in quantized.items():
        if not scales.weight.size:
            addition = _addition(graph, path)
            _quantize_shared(graph, addition, 1, path, scales, done)
            continue
        weight, reader = _weight_of(graph, path)
        layer, dequantized = _store_codes(graph, path, weight, reader, scales, stored)
        inputs = list(layer.inputs)
        index = next(i for i, value in enumerate(inputs) if value is not None and value is not dequantized)
        _quantize_shared(graph, layer, index, path, scales, done)


def _weight_of(graph: ir.Graph, path: str) -> tuple[ir.Value, ir.Node]:
    """The weight of a layer and its node that reads it; of the names of a shared weight only one is left."""
    weight = graph.initializers.get(f"{path}.weight")
    uses = [(weight, use.node) for use in weight.uses()] if weight is not None else []
    if len(uses) != 1:
        uses = [
            (value, node)
            for node in graph
            if f"'{path}'" in node.metadata_props.get(SCOPES, "")
            for value in node.inputs
            if value is not None and value.is_initializer() and value.shape is not None and len(value.shape) > 1
        ]
    if len(uses) != 1 or uses[0][0].const_value is None:
        msg = (
            f"The exported graph does not use {path}.weight exactly once, so {path} cannot be quantised.\n"
            "Way round: call the layer and use its weight nowhere else, or leave it unquantised in a --recipe."
        )
        raise ModelError(msg)
    return uses[0]


def _addition(graph: ir.Graph, path: str) -> ir.Node:
    """The node of a residual addition; it has no weight to be found by."""
    additions = [node for node in graph if node.op_type == "Add" and f"'{path}'" in node.metadata_props.get(SCOPES, "")]
    if len(additions) != 1:
        msg = f"The exported graph holds {len(additions)} additions of {path} instead of one; it cannot be quantised."
        raise ModelError(msg)
    return additions[0]


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


def _store_codes(
    graph: ir.Graph,
    path: str,
    weight: ir.Value,
    reader: ir.Node,
    scales: Quantization,
    stored: dict[tuple[Any, ...], list[ir.Value]],
) -> tuple[ir.Node, ir.Value]:
    """Replace a float weight by its codes; returns the layer that multiplies by it, and the dequantised weight.

    A Transpose between them is applied to the codes, so that DequantizeLinear is the last step.
    """
    order: tuple[int, ...] = ()
    replaced, layer = weight, reader
    if reader.op_type == "Transpose":
        order = tuple(reader.attributes["perm"].as_ints())
        replaced = reader.outputs[0]
        layer = next(iter(replaced.uses())).node
    key = (weight, order, scales.codes, scales.weight.tobytes())
    if key not in stored:
        stored[key] = _codes(graph, f"{path}.weight", weight, order, scales)
    parameters = stored[key]
    axis = order.index(0) if order else 0
    attributes = {"axis": axis} if parameters[1].shape else {}
    node = ir.node("DequantizeLinear", parameters, attributes=attributes, name=f"{path}.weight.dequantize")
    node.outputs[0].shape, node.outputs[0].type = parameters[0].shape, weight.type
    graph.insert_before(layer, node)
    for use in [use for use in replaced.uses() if replaced is not weight or use.node is reader]:
        use.node.replace_input_with(use.idx, node.outputs[0])
    if replaced is not weight:
        graph.remove(reader, safe=True)
    if not weight.uses():
        del graph.initializers[str(weight.name)]
    return layer, node.outputs[0]


def _codes(
    graph: ir.Graph, name: str, weight: ir.Value, order: tuple[int, ...], scales: Quantization
) -> list[ir.Value]:
    """Store a weight as codes, scales and zero points, transposed in this order."""
    if weight.const_value is None:
        msg = f"{name} has no value."
        raise ModelError(msg)
    values = weight.const_value.numpy()
    scale, largest = scales.weight, CODES[scales.codes]
    if scales.codes == "fp8":
        scale = scale.reshape(())
    codes = (values / (scale.reshape(-1, *[1] * (values.ndim - 1)) if scale.ndim else scale)).clip(-largest, largest)
    codes = (np.rint(codes) if scales.codes == "int8" else codes).astype(STORED[scales.codes])
    if order:
        codes = np.ascontiguousarray(codes.transpose(order))
    return [
        _initializer(graph, f"{name}.{scales.codes}", codes),
        _initializer(graph, f"{name}.scale", scale),
        _initializer(graph, f"{name}.zero_point", np.zeros(scale.shape, codes.dtype)),
    ]


def _initializer(graph: ir.Graph, name: str, array: npt.NDArray[Any] | np.generic) -> ir.Value:
    tensor = ir.tensor(np.asarray(array), name=name)
    value = ir.Value(name=name, const_value=tensor, shape=ir.Shape(np.shape(array)), type=ir.TensorType(tensor.dtype))
    graph.register_initializer(value)
    return value
