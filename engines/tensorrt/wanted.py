"""What an ONNX graph asks for in precision, read from its bytes, and whether TensorRT's network holds it.

The `onnx` package is not needed for that: a few fields of the protobuf encoding are enough.
Source: https://protobuf.dev/programming-guides/encoding and onnx.proto of https://github.com/onnx/onnx.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from pcn_deploy.errors import BuildError

_GRAPH = 7  # ModelProto.graph
_NODE, _INITIALIZER = 1, 5  # GraphProto.node and .initializer
_OP_TYPE = 4  # NodeProto.op_type
_DATA_TYPE = 2  # TensorProto.data_type
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5

_LAYERS = {"QuantizeLinear": "QUANTIZE", "DequantizeLinear": "DEQUANTIZE"}
_TYPES = {10: "HALF", 16: "BF16", 17: "FP8", 22: "INT4"}  # TensorProto.DataType to the name in TensorRT


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at


def _fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Field numbers of one protobuf message with their values; bytes are not copied."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        number, kind = key >> 3, key & 7
        if kind == _VARINT:
            value, at = _varint(data, at)
            yield number, value
        elif kind == _BYTES:
            size, at = _varint(data, at)
            yield number, data[at : at + size]
            at += size
        elif kind in (_FIXED64, _FIXED32):
            at += 8 if kind == _FIXED64 else 4
        else:
            msg = f"The ONNX graph is not valid protobuf (wire type {kind}). Export it again."
            raise BuildError(msg)


def _parts(data: memoryview, number: int) -> Iterator[memoryview]:
    return (value for field, value in _fields(data) if field == number and isinstance(value, memoryview))


def wanted_by(onnx: bytes) -> tuple[Counter[str], set[str]]:
    """Read what a graph asks for. Subgraphs of control flow are not looked into.

    Args:
        onnx: A serialised ONNX model.

    Returns:
        How many nodes there are of each operator, and the low precisions its weights are stored in,
        under TensorRT's names (`HALF`, `BF16`, ...).

    Raises:
        BuildError: If the bytes are not protobuf.
    """
    operators: Counter[str] = Counter()
    types: set[str] = set()
    for graph in _parts(memoryview(onnx), _GRAPH):
        for number, value in _fields(graph):
            if not isinstance(value, memoryview):
                continue
            if number == _NODE:
                operators.update(bytes(text).decode() for text in _parts(value, _OP_TYPE))
            elif number == _INITIALIZER:
                types.update(_TYPES[kind] for field, kind in _fields(value) if field == _DATA_TYPE and kind in _TYPES)
    return operators, types


def check_precision(trt: Any, network: Any, onnx: bytes) -> dict[str, str]:
    """Compare the parsed network with the graph it was parsed from: nothing may lose precision on the way.

    Args:
        trt: The loaded bindings.
        network: The network, parsed.
        onnx: The graph it was parsed from.

    Returns:
        Counts of what the network holds, as text: layers by type of their first output, quantize, dequantize.

    Raises:
        BuildError: If the network is not strongly typed, or lacks Q/DQ layers or types that the graph has.
    """
    if not network.get_flag(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED):
        msg = "TensorRT did not take the network as strongly typed: precisions could change. Use 10.3 or newer."
        raise BuildError(msg)
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    kinds = Counter(layer.type.name for layer in layers)
    types = Counter(layer.get_output(0).dtype.name for layer in layers if layer.num_outputs)
    operators, stored = wanted_by(onnx)
    lost = [
        f"{operators[operator]} {operator} nodes became {kinds[kind]}"
        for operator, kind in _LAYERS.items()
        if kinds[kind] < operators[operator]
    ]
    lost += [f"no layer computes in {name}, in which weights are stored" for name in sorted(stored - set(types))]
    if lost:
        msg = (
            f"TensorRT's parser lost precision that the graph asks for: {'; '.join(lost)}. "
            "No engine was built, since it would not be the network that was planned. Try a newer TensorRT."
        )
        raise BuildError(msg)
    return {
        "layers": ", ".join(f"{name} {count}" for name, count in sorted(types.items())),
        "quantize": str(kinds["QUANTIZE"]),
        "dequantize": str(kinds["DEQUANTIZE"]),
    }
