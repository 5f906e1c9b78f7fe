"""What is measured on either side of timm_families.py; numpy and onnx only, as a rival's environment has them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

PRODUCTS = {"Conv", "ConvTranspose", "Gemm", "MatMul"}
SAME_VALUES = {"Cast", "Transpose", "Reshape", "Squeeze", "Unsqueeze", "Identity", "Flatten"}
"""Operators between a DequantizeLinear and the product that leave the quantised numbers what they are."""


def sqnr_db(wanted: npt.NDArray[Any], found: npt.NDArray[Any]) -> float:
    """SQNR in dB of what the images change: each logit counts from its mean over the images, `(N, K)`."""
    signal = ((wanted - wanted.mean(0)) ** 2).sum(dtype=np.float64)
    error = ((found - wanted) ** 2).sum(dtype=np.float64)
    return round(float(10 * np.log10(signal / max(error, 1e-30))), 1)


def count_products(model: onnx.ModelProto) -> dict[str, int]:
    """Count the executed products with a constant weight.

    Args:
        model: A graph without subgraphs that compute.

    Returns:
        `products` of all, `int8` those of which both factors are dequantised, and `depthwise`, `int8_depthwise` the
        depthwise convolutions among them.
    """
    made_by = {name: node for node in model.graph.node for name in node.output}
    weights = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}

    def is_constant(name: str) -> bool:
        node = made_by.get(name)
        if node is None:
            return name in weights
        return all(is_constant(given) for given in node.input if given)

    def is_dequantized(name: str) -> bool:
        node = made_by.get(name)
        while node is not None and node.op_type in SAME_VALUES:
            node = made_by.get(node.input[0])
        return node is not None and node.op_type == "DequantizeLinear"

    def is_depthwise(node: onnx.NodeProto) -> bool:
        group = next((attribute.i for attribute in node.attribute if attribute.name == "group"), 1)
        return node.op_type == "Conv" and group > 1 and _inputs_of_group(node, made_by, weights) == 1

    nodes = [node for node in model.graph.node if node.op_type in PRODUCTS and is_constant(node.input[1])]
    quantized = [node for node in nodes if all(is_dequantized(name) for name in node.input[:2])]
    return {
        "products": len(nodes),
        "int8": len(quantized),
        "depthwise": sum(map(is_depthwise, nodes)),
        "int8_depthwise": sum(map(is_depthwise, quantized)),
    }


def _inputs_of_group(
    node: onnx.NodeProto, made_by: dict[str, onnx.NodeProto], weights: dict[str, tuple[int, ...]]
) -> float:
    """Input channels of each group of a convolution; unknown, thus NaN, where its weight is computed."""
    name = node.input[1]
    while name in made_by and made_by[name].op_type in {"DequantizeLinear", "QuantizeLinear", "Cast", "Identity"}:
        name = made_by[name].input[0]
    return weights[name][1] if name in weights else math.nan
