"""Give a float32 graph its types: FP16 or BF16 with explicit casts, FP32 where the plan or the operator needs it.

TensorRT networks are strongly typed since version 11: the precision of an engine is the precision of the graph.
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from pcn_deploy.calibration.plan.rules import in_fp32
from pcn_deploy.errors import ModelError
from pcn_deploy.graph.repeat import SCOPES
from pcn_deploy.graph.schemas import Slots, slots

TYPES = {"fp32": ir.DataType.FLOAT, "fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}
_LARGEST = {ir.DataType.FLOAT16: float(np.finfo(np.float16).max), ir.DataType.BFLOAT16: 3.38e38}
_NAMES = {kind: name for name, kind in TYPES.items()}

_FOLLOWS_INPUT = {
    *("Concat", "Expand", "Flatten", "Gather", "Identity", "QuantizeLinear", "Reshape", "Shape", "Size", "Slice"),
    *("Split", "Squeeze", "Transpose", "Unsqueeze"),
}
"""They move values or look at their shape: in the type of what they read, they need no cast."""

_FOLLOWS_READERS = {"Constant", "ConstantOfShape", "DequantizeLinear"}
"""They make values out of no floating-point tensor: in the type of who reads them, they need no cast."""

_TYPE_ATTRIBUTES = ("to", "dtype", "output_datatype")
"""Attributes in which an operator names the type of what it makes."""


def reduce_precision(
    model: ir.Model,
    precision: str,
    layers: Mapping[str, str] | None = None,
    operations: Mapping[str, str] | None = None,
    single: Mapping[str, Mapping[str, str]] | None = None,
) -> int:
    """Give every float32 tensor inside the graph its type, in place; inputs and outputs stay float32.

    What an operator does not take in the type, by its schema, is given to it in float32: the scales of a Resize, or all
    of a Celu. LayerNormalization keeps its float32 statistics (`stash_type`), and scales of Q/DQ take the type of what
    they dequantise to, so that no cast stands between a DequantizeLinear and its reader. A cast stands only between
    two nodes of different types, and one tensor is cast to a type once.

    Args:
        model: A float32 graph with the exporter's notes, Q/DQ allowed.
        precision: Type of what is named in neither mapping: `fp32`, `fp16` or `bf16`.
        layers: Type of all nodes of a module, by the name of the module.
        operations: Type of the nodes that a module holds itself, those of its parts left out, by its name.
        single: Type of single nodes, by the name of their module and their name in it, as `node_places` gives them.

    Returns:
        Number of initialisers converted.

    Raises:
        ModelError: If a weight does not fit the range of its type.
    """
    nodes = list(model.graph.all_nodes())
    opsets = dict(model.opset_imports)
    types = _assign(nodes, TYPES[precision], layers or {}, operations or {}, single or {}, opsets)
    graph = _TypedGraph(model.graph, TYPES[precision], types, opsets)
    converted = graph.convert_initializers(nodes)
    for node in nodes:
        _retype_attributes(node, types[node])
    for node in nodes:
        graph.cast_inputs(node)
    graph.set_types(nodes)
    graph.cast_outputs()
    return converted


def _assign(
    nodes: list[ir.Node],
    default: ir.DataType,
    layers: Mapping[str, str],
    operations: Mapping[str, str],
    single: Mapping[str, Mapping[str, str]],
    opsets: Mapping[str, int],
) -> dict[ir.Node, ir.DataType]:
    """The type in which each node computes."""
    types: dict[ir.Node, ir.DataType] = {}
    places = node_places(nodes) if single else {}
    for node in nodes:
        if node.op_type in _FOLLOWS_READERS:
            continue
        path, name = places.get(node, ("", ""))
        if name in single.get(path, {}):
            types[node] = TYPES[single[path][name]]
            continue
        noted = _noted_type(node, default, layers, operations)
        read = {
            types[producer]
            for value in node.inputs
            if value is not None and value.dtype == ir.DataType.FLOAT
            if (producer := value.producer()) is not None and producer in types
        }
        follows = len(read) == 1 and (noted is None or node.op_type in _FOLLOWS_INPUT)
        kind = read.pop() if follows else (noted or default)
        types[node] = kind if _can_make(node, kind, opsets) else ir.DataType.FLOAT
    for node in reversed(nodes):
        if node.op_type in _FOLLOWS_READERS:
            readers = {types[use.node] for value in node.outputs for use in value.uses()}
            types[node] = readers.pop() if len(readers) == 1 else default
    return types


def takes_its_type(node: ir.Node) -> bool:
    """Whether a node moves the values of one tensor, and so is of the type of that."""
    return node.op_type in _FOLLOWS_INPUT and sum(map(_is_float, node.inputs)) == 1


def node_places(nodes: Iterable[ir.Node]) -> dict[ir.Node, tuple[str, str]]:
    """The module that holds each node itself, and a name of the node in it: its operator, and which of those it is."""
    counts: Counter[tuple[str, str]] = Counter()
    places: dict[ir.Node, tuple[str, str]] = {}
    for node in nodes:
        modules: list[str] = ast.literal_eval(node.metadata_props.get(SCOPES, "[]"))[:-1]
        path = modules[-1] if modules else ""
        places[node] = path, f"{node.op_type}.{counts[path, node.op_type]}"
        counts[path, node.op_type] += 1
    return places


def _noted_type(
    node: ir.Node, default: ir.DataType, layers: Mapping[str, str], operations: Mapping[str, str]
) -> ir.DataType | None:
    """The type of the module that a node belongs to; None if the exporter did not note any."""
    if SCOPES not in node.metadata_props:
        return None
    modules: list[str] = ast.literal_eval(node.metadata_props[SCOPES])[:-1]  # the last is the name of the node
    if modules and modules[-1] in operations:
        return TYPES[operations[modules[-1]]]
    return next((TYPES[layers[path]] for path in reversed(modules) if path in layers), default)


def _is_float(value: ir.Value | None) -> bool:
    return value is not None and isinstance(value.type, ir.TensorType) and value.dtype == ir.DataType.FLOAT


def _slots(node: ir.Node, kind: ir.DataType, opsets: Mapping[str, int]) -> tuple[Slots, Slots]:
    return slots(node.domain, node.op_type, opsets.get(node.domain, 1), kind)


def _can_make(node: ir.Node, kind: ir.DataType, opsets: Mapping[str, int]) -> bool:
    """Whether the first floating-point tensor that a node makes may be of a type; sequences stay float32."""
    if kind == ir.DataType.FLOAT or _control_flow(node):
        return True
    values = [value for value in (*node.inputs, *node.outputs) if value is not None]
    if any(value.type is not None and not isinstance(value.type, ir.TensorType) for value in values):
        return False
    made = [index for index, value in enumerate(node.outputs) if _is_float(value)]
    return not made or _slots(node, kind, opsets)[1][made[0]]


def _control_flow(node: ir.Node) -> bool:
    kinds = {ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS}
    return any(attribute.type in kinds for attribute in node.attributes.values())


def _retype_attributes(node: ir.Node, kind: ir.DataType) -> None:
    """Operators that name a float32 type or value in an attribute follow their node."""
    for name in _TYPE_ATTRIBUTES:
        if name in node.attributes and node.attributes[name].as_int() == ir.DataType.FLOAT:
            node.attributes[name] = ir.AttrInt64(name, int(kind))
    if node.op_type == "ConstantOfShape" and "value" not in node.attributes:  # a float32 zero
        node.attributes["value"] = ir.AttrTensor("value", ir.tensor(np.zeros(1, np.float32)))
    constant = node.attributes.get("value") if node.op_type in {"Constant", "ConstantOfShape"} else None
    if constant is not None and constant.as_tensor().dtype == ir.DataType.FLOAT:
        array = constant.as_tensor().numpy().astype(kind.numpy())
        node.attributes["value"] = ir.AttrTensor("value", ir.tensor(array, dtype=kind))


@dataclass
class _TypedGraph:
    """A graph on its way from float32 to its types; values keep the type float32 until `set_types`.

    Attributes:
        graph: The graph.
        default: Type of what no rule names.
        types: Type in which each node computes.
        opsets: Versions of the operator sets that the graph imports, by domain.
        casts: The result of a cast, by the graph it stands in, what it casts, and to which type.
    """

    graph: ir.Graph
    default: ir.DataType
    types: dict[ir.Node, ir.DataType]
    opsets: Mapping[str, int]
    casts: dict[tuple[int, ir.Value, ir.DataType], ir.Value] = field(default_factory=dict)

    def _read_as(self, node: ir.Node, index: int) -> ir.DataType:
        """The type in which a node reads one of its floating-point inputs."""
        kind = self.types[node]
        return kind if kind == ir.DataType.FLOAT or _slots(node, kind, self.opsets)[0][index] else ir.DataType.FLOAT

    def _made_as(self, value: ir.Value) -> ir.DataType:
        """The type that a computed value will have; inputs of the graph stay float32."""
        node, index = value.producer(), value.index() or 0
        if node is None:
            return ir.DataType.FLOAT
        kind = self.types[node]
        return kind if kind == ir.DataType.FLOAT or _slots(node, kind, self.opsets)[1][index] else ir.DataType.FLOAT

    def convert_initializers(self, nodes: list[ir.Node]) -> int:
        """Store every initialiser in the type of its readers; one copy per type where they differ."""
        readers: dict[ir.Value, dict[ir.DataType, list[tuple[ir.Node, int]]]] = {}
        for node in nodes:
            for index, value in enumerate(node.inputs):
                if value is not None and _is_float(value) and value.is_initializer():
                    readers.setdefault(value, {}).setdefault(self._read_as(node, index), []).append((node, index))
        converted = 0
        for value in list(self.graph.initializers.values()):
            if not _is_float(value) or value.const_value is None:
                continue
            values = dict.fromkeys(readers.get(value, {self.default: []}), value)
            for kind in list(values)[1:]:
                values[kind] = self._copy(value, kind)
                for node, index in readers[value][kind]:
                    node.replace_input_with(index, values[kind])
            for kind, each in values.items():
                self._check_range(each, kind)
                converted += _convert(each, kind)
        return converted

    def _check_range(self, value: ir.Value, kind: ir.DataType) -> None:
        """Refuse a weight that its type cannot hold."""
        array = value.const_value.numpy() if value.const_value is not None else np.zeros(0, np.float32)
        largest = float(np.abs(array).max(where=np.isfinite(array), initial=0))  # infinity is as good in any type
        if kind == ir.DataType.FLOAT or largest <= _LARGEST[kind]:
            return
        codes = any(node.op_type == "DequantizeLinear" for node in self.graph)
        way = f"build with {in_fp32('int8' if codes else 'fp16', 'fp16')}"
        if self.default == ir.DataType.FLOAT:
            way = "give its layer precision fp32 in the recipe"
        msg = f"Weight {value.name} reaches {largest:.3g}, beyond {_NAMES[kind]}; {way}."
        raise ModelError(msg)

    def _copy(self, value: ir.Value, kind: ir.DataType) -> ir.Value:
        name = f"{value.name}.{_NAMES[kind]}"
        copied = ir.Value(name=name, const_value=value.const_value, shape=value.shape, type=value.type)
        self.graph.register_initializer(copied)
        return copied

    def cast_inputs(self, node: ir.Node) -> None:
        """Put casts before a node where what it reads is of another type."""
        for index, value in enumerate(node.inputs):
            if value is None or not _is_float(value) or value.is_initializer() or node.op_type == "Cast":
                continue
            kind = self._read_as(node, index)
            if self._made_as(value) != kind:
                node.replace_input_with(index, self._cast(value, kind, node))

    def _cast(self, value: ir.Value, kind: ir.DataType, reader: ir.Node) -> ir.Value:
        key = (id(reader.graph), value, kind)
        if key not in self.casts:
            cast = ir.node("Cast", [value], attributes={"to": int(kind)}, name=f"{value.name}.to_{_NAMES[kind]}")
            cast.outputs[0].type, cast.outputs[0].shape = ir.TensorType(kind), value.shape
            (reader.graph or self.graph).insert_before(reader, cast)
            self.casts[key] = cast.outputs[0]
        return self.casts[key]

    def set_types(self, nodes: list[ir.Node]) -> None:
        """Note on every value the type of the node that makes it."""
        for node in nodes:
            for value in node.outputs:
                if _is_float(value):
                    value.type = ir.TensorType(self._made_as(value))

    def cast_outputs(self) -> None:
        """Cast the outputs of the graph back to float32."""
        for index, value in enumerate(list(self.graph.outputs)):
            if value.producer() is None or value.dtype not in TYPES.values() or _is_float(value):
                continue
            name = value.name
            value.name = f"{name}.{self._made_as(value).name.lower()}"
            cast = ir.node("Cast", [value], attributes={"to": int(ir.DataType.FLOAT)}, name=f"{name}.cast")
            final = cast.outputs[0]
            final.name, final.shape, final.type = name, value.shape, ir.TensorType(ir.DataType.FLOAT)
            self.graph.append(cast)
            self.graph.outputs[index] = final


def _convert(value: ir.Value, kind: ir.DataType) -> bool:
    """Store an initialiser in another type; returns whether it was converted."""
    if value.const_value is None or kind == ir.DataType.FLOAT:
        return False
    value.const_value = ir.tensor(value.const_value.numpy().astype(kind.numpy()), dtype=kind, name=value.name)
    value.type = ir.TensorType(kind)
    return True
