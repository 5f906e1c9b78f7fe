"""Every way in which one place of an ONNX graph can be wrong: what `mutation.py` draws from.

A mutation changes a copy of the graph in one place and leaves the rest. It knows nothing of how the graph was made:
only the ONNX protobuf, and the shapes and types that ONNX itself infers, are used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx
from onnx import AttributeProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

SMALL = 1e-2
"""A scalar constant up to this magnitude that is added or compared with counts as an epsilon."""

REPLACEMENTS: dict[str, list[tuple[str, dict[str, object]]]] = {
    "Relu": [("LeakyRelu", {"alpha": 0.1}), ("Abs", {})],
    "Add": [("Sub", {}), ("Max", {})],
    "Sub": [("Add", {})],
    "Mul": [("Add", {}), ("Max", {})],
    "Div": [("Mul", {})],
    "Sigmoid": [("HardSigmoid", {}), ("Tanh", {})],
    "HardSigmoid": [("Sigmoid", {})],
    "Gelu": [("Relu", {}), ("Sigmoid", {})],
    "HardSwish": [("Relu", {})],
    "Erf": [("Tanh", {})],
    "Softmax": [("Sigmoid", {}), ("LogSoftmax", {})],
    "Sqrt": [("Abs", {})],
    "Clip": [("Relu", {})],
    "GlobalAveragePool": [("GlobalMaxPool", {})],
    "ReduceMean": [("ReduceMax", {}), ("ReduceSum", {})],
    "ReduceSum": [("ReduceMean", {})],
}
KEPT = {"axis", "axes", "keepdims", "noop_with_empty_axes", "kernel_shape", "strides", "pads", "ceil_mode"}
"""Attributes that a replacement takes over where it has them."""
POOLS = {"MaxPool": "AveragePool", "AveragePool": "MaxPool"}


@dataclass(frozen=True)
class Mutation:
    """One change of a graph.

    Attributes:
        kind: What is done, for tables.
        place: Where: a node or an initialiser.
        apply: Changes a graph in place.
    """

    kind: str
    place: str
    apply: Callable[[ModelProto], None]


def mutations(model: ModelProto) -> list[Mutation]:
    """Every mutation of a graph, in a fixed order."""
    graph = _Graph(onnx.shape_inference.infer_shapes(model))
    found: list[Mutation] = []
    for index, node in enumerate(model.graph.node):
        for make in (_dropped, _replaced, _swapped, _cast, _moved, _without_epsilon):
            found += make(graph, index, node)
    for tensor in model.graph.initializer:
        found += _constants(graph, tensor)
    return found


class _Graph:
    """What is asked of a graph: shapes and types of its tensors, its constants, who reads what at which input."""

    def __init__(self, model: ModelProto) -> None:
        values = [*model.graph.value_info, *model.graph.input, *model.graph.output]
        self.types = {value.name: value.type.tensor_type.elem_type for value in values}
        self.shapes = {
            value.name: tuple(dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim)
            for value in values
        }
        self.constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
        self.readers: dict[str, list[tuple[NodeProto, int]]] = {}
        for node in model.graph.node:
            for position, name in enumerate(node.input):
                self.readers.setdefault(name, []).append((node, position))

    def alike(self, first: str, second: str) -> bool:
        """Whether two tensors have the same known shape and type."""
        known = first in self.types and first in self.shapes and second in self.types
        return known and self.types[first] == self.types[second] and self.shapes[first] == self.shapes.get(second)


def _place(node: NodeProto) -> str:
    return f"{node.op_type} {node.name or node.output[0]}"


def _dropped(graph: _Graph, index: int, node: NodeProto) -> Iterator[Mutation]:
    """The operator is left out: its output is one of its inputs."""
    if node.op_type in {"Identity", "Cast", "Reshape", "QuantizeLinear", "DequantizeLinear"}:
        return
    for position, name in enumerate(node.input):
        if name in graph.constants or not graph.alike(name, node.output[0]):
            continue

        def apply(model: ModelProto, name: str = name) -> None:
            _exchange(model, index, helper.make_node("Identity", [name], list(node.output)))

        kind = "ReLU removed" if node.op_type in {"Relu", "Clip"} else "operator dropped"
        yield Mutation(kind, f"{_place(node)} (input {position} passes)", apply)


def _replaced(_graph: _Graph, index: int, node: NodeProto) -> Iterator[Mutation]:
    """The operator is another one."""
    kept = {each.name: helper.get_attribute_value(each) for each in node.attribute if each.name in KEPT}
    choices = [(op, {**kept, **more}, 2) for op, more in REPLACEMENTS.get(node.op_type, [])]
    if node.op_type in POOLS:
        choices.append((POOLS[node.op_type], kept, 1))
    for op, attributes, inputs in choices:
        if op in {"Relu", "Abs", "Tanh", "Sigmoid", "GlobalMaxPool"}:
            attributes, inputs = {}, 1

        def apply(model: ModelProto, op: str = op, attributes: dict = attributes, inputs: int = inputs) -> None:  # type: ignore[type-arg]
            _exchange(model, index, helper.make_node(op, list(node.input)[:inputs], list(node.output), **attributes))

        yield Mutation("operator replaced", f"{_place(node)} -> {op}", apply)


def _swapped(graph: _Graph, index: int, node: NodeProto) -> Iterator[Mutation]:
    """Two inputs stand in the other's place: of the operator, or of it and the next of its kind."""
    if node.op_type in {"Sub", "Div", "Pow", "MatMul", "Concat"} and len(node.input) > 1:

        def apply(model: ModelProto) -> None:
            inputs = model.graph.node[index].input
            inputs[0], inputs[1] = inputs[1], inputs[0]

        yield Mutation("inputs swapped", _place(node), apply)
    for other, _ in graph.readers.get(node.input[0] if node.input else "", []):
        if other.name == node.name or len(other.input) < 2 or other.op_type in {"QuantizeLinear", "DequantizeLinear"}:
            continue
        for position in range(1, len(other.input)):
            if graph.alike(other.input[position], other.input[0]):

                def cross(model: ModelProto, output: str = other.output[0], position: int = position) -> None:
                    target = next(each for each in model.graph.node if each.output[0] == output)
                    target.input[0], target.input[position] = target.input[position], target.input[position]

                yield Mutation("inputs swapped", f"{_place(other)} reads input {position} twice", cross)


def _cast(graph: _Graph, index: int, node: NodeProto) -> Iterator[Mutation]:
    """A float32 tensor goes through FP16."""
    name = node.output[0]
    if graph.types.get(name) != TensorProto.FLOAT or node.op_type in {"Constant", "DequantizeLinear"}:
        return

    def apply(model: ModelProto) -> None:
        target = model.graph.node[index]
        target.output[0] = f"{name}.exact"
        casts = [
            helper.make_node("Cast", [f"{name}.exact"], [f"{name}.half"], to=TensorProto.FLOAT16),
            helper.make_node("Cast", [f"{name}.half"], [name], to=TensorProto.FLOAT),
        ]
        nodes = list(model.graph.node)
        del model.graph.node[:]
        model.graph.node.extend([*nodes[: index + 1], *casts, *nodes[index + 1 :]])

    yield Mutation("cast to FP16", _place(node), apply)


def _moved(graph: _Graph, index: int, node: NodeProto) -> Iterator[Mutation]:
    """An axis, a padding or an order of axes is another one."""
    for attribute in node.attribute:
        values = helper.get_attribute_value(attribute)
        changed: list[object] = []
        if attribute.name == "axis" and node.op_type not in {"QuantizeLinear", "DequantizeLinear"}:
            changed = [values - 1, values + 1]
        elif attribute.name == "pads" and any(values):
            half = len(values) // 2
            changed = [
                [max(0, first - 1) for first in values[:half]] + [second + 1 for second in values[half:]],
                [first + 1 for first in values[:half]] + [max(0, second - 1) for second in values[half:]],
            ]
        elif attribute.name == "perm" and len(values) > 2:
            changed = [[*values[:-2], values[-1], values[-2]]]
        for value in changed:

            def apply(model: ModelProto, name: str = attribute.name, value: object = value) -> None:
                _set_attribute(model.graph.node[index], name, value)

            yield Mutation("axis or padding changed", f"{_place(node)} {attribute.name}={value}", apply)


def _without_epsilon(graph: _Graph, index: int, node: NodeProto) -> Iterator[Mutation]:
    """An epsilon is zero: an attribute, or a small scalar that is added or compared with."""
    for attribute in node.attribute:
        if attribute.name == "epsilon":

            def apply(model: ModelProto) -> None:
                _set_attribute(model.graph.node[index], "epsilon", 0.0)

            yield Mutation("epsilon removed", _place(node), apply)
    if node.op_type not in {"Add", "Max", "Clip"}:
        return
    for name in node.input:
        value = graph.constants.get(name)
        if value is not None and value.size == 1 and 0 < abs(float(value.reshape(()))) <= SMALL:

            def zero(model: ModelProto, name: str = name) -> None:
                _change_constant(model, name, np.zeros_like)

            yield Mutation("epsilon removed", f"{_place(node)} {name}", zero)


Array = npt.NDArray[np.generic]


def _constants(graph: _Graph, tensor: TensorProto) -> Iterator[Mutation]:
    """What can be wrong with an initialiser, by what reads it."""
    values, readers = graph.constants[tensor.name], graph.readers.get(tensor.name, [])
    if not readers or values.size == 0:
        return
    middle = len(values) // 2 if values.ndim else 0
    node, position = readers[0]
    quantises = node.op_type in {"QuantizeLinear", "DequantizeLinear"}
    changes: list[tuple[str, str, Callable[[Array], Array]]] = []
    if quantises and position == 1:
        changes = [
            ("scale halved", "", lambda array: array / np.asarray(2, array.dtype)),
            ("scale doubled", "", lambda array: array * np.asarray(2, array.dtype)),
        ]
        if values.size > 1:
            changes.append(("scale doubled", "one channel", lambda array: _in_row(array, middle, 2.0)))
            changes.append(("scale halved", "one channel", lambda array: _in_row(array, middle, 0.5)))
    elif values.dtype.kind == "f" or (quantises and position == 0):
        is_bias = node.op_type in {"Conv", "Gemm"} and position == 2
        if is_bias or (node.op_type == "Add" and values.size > 1):
            changes.append(("bias zeroed", "", np.zeros_like))
            changes.append(("bias zeroed", "one channel", lambda array: _in_row(array, middle, 0.0)))
        if values.dtype.kind == "f":
            changes.append(("constant nudged", "all x 1.1", lambda array: (array * 1.1).astype(array.dtype)))
        if values.size > 1:
            changes.append(("constant nudged", "one channel x 0.5", lambda array: _in_row(array, middle, 0.5)))
            changes.append(("constant nudged", "largest value negated", _negated))
    for kind, detail, change in changes:

        def apply(model: ModelProto, change: Callable[[Array], Array] = change) -> None:
            _change_constant(model, tensor.name, change)

        yield Mutation(kind, f"{tensor.name} {detail}".strip(), apply)
    if quantises and position == 1 and len(readers) > 1 and not values.ndim:
        yield _scale_of_one_reader(tensor.name, values)


def _scale_of_one_reader(name: str, values: Array) -> Mutation:
    """DequantizeLinear multiplies by another scale than QuantizeLinear divided by."""

    def apply(model: ModelProto) -> None:
        model.graph.initializer.append(numpy_helper.from_array(values * np.asarray(2, values.dtype), f"{name}.doubled"))
        reader = next(each for each in model.graph.node if each.op_type == "DequantizeLinear" and name in each.input)
        reader.input[1] = f"{name}.doubled"

    return Mutation("scale doubled", f"{name} of DequantizeLinear only", apply)


def _in_row(array: Array, row: int, factor: float) -> Array:
    changed = array.copy()
    changed[row] = (array[row] * factor).astype(array.dtype)
    return changed


def _negated(array: Array) -> Array:
    changed = array.copy()
    flat = changed.reshape(-1)
    largest = int(np.abs(flat.astype(np.float64)).argmax())
    flat[largest] = -flat[largest]
    return changed


def _exchange(model: ModelProto, index: int, node: NodeProto) -> None:
    node.name = model.graph.node[index].name
    model.graph.node[index].CopyFrom(node)


def _set_attribute(node: NodeProto, name: str, value: object) -> None:
    for attribute in node.attribute:
        if attribute.name == name:
            made: AttributeProto = helper.make_attribute(name, value)
            attribute.CopyFrom(made)


def _change_constant(model: ModelProto, name: str, change: Callable[[Array], Array]) -> None:
    for tensor in model.graph.initializer:
        if tensor.name == name:
            values = numpy_helper.to_array(tensor)
            tensor.CopyFrom(numpy_helper.from_array(np.asarray(change(values)).astype(values.dtype), name))
