"""Which nodes of a graph FP16 cannot compute, whatever the image: statistics written by hand, and lost constants.

A LayerNormalization has its statistics in FP32 in every graph. A network that writes its own normalisation (the root of
a mean of squares, a norm, a sum of exponentials) means the same: from the squares to the division it stays FP32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from pcn_deploy.calibration.plan.half import LARGEST, SMALLEST_STEP, WORST_ERROR

MOVES = frozenset(
    {"Concat", "Expand", "Flatten", "Gather", "Identity", "Pad", "Reshape", "Slice", "Split", "Squeeze", "Tile"}
    | {"Transpose", "Unsqueeze"}
)
"""They hand on values as they are."""

SQUARING = frozenset(
    {"GlobalLpPool", "LRN", "LpNormalization", "LpPool", "MeanVarianceNormalization", "ReduceL2", "ReduceLogSumExp"}
    | {"ReduceSumSquare"}
)
"""They square or exponentiate inside, in a type that no standard names."""

_EXPONENTIAL = frozenset({"Exp", "ReduceProd", "Sigmoid", "Softmax"})
_REDUCTIONS = frozenset(
    {"AveragePool", "GlobalAveragePool", "ReduceL1", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd", "ReduceSum"}
)
_BINARY = frozenset({"Add", "Div", "Max", "Min", "Mul", "Sub"})
_UNARY = frozenset({"Abs", "Clip", "Neg", "Pow", "Where"})
_CHAIN = MOVES | SQUARING | _EXPONENTIAL | _REDUCTIONS | _BINARY | _UNARY | {"ReduceLogSum"}
_PASSING = frozenset({"Abs", "Neg", "Clip", "Sqrt", "Pow"})
_CLOSING = MOVES | _REDUCTIONS | {"Abs", "Neg", "Sub"}
"""What may join a chain from below if nothing else reads it: a mean, and the difference from it."""

_ADDENDS = {"Conv": 2, "ConvTranspose": 2, "Gemm": 2, "LayerNormalization": 2, "InstanceNormalization": 2}
_ADDENDS |= {"GroupNormalization": 2, "BatchNormalization": 2}
"""Inputs that are terms of a sum, by operator: what FP16 loses of a bias is lost in the sum anyway."""

_QDQ = frozenset({"QuantizeLinear", "DequantizeLinear"})

_FAR = 200
"""Nodes after which a chain is given up."""

STATISTICS = "statistics of a normalisation, FP32 as in LayerNorm: squares, exponentials and tiny sums"


def find_delicate(graph: ir.Graph) -> dict[ir.Node, str]:
    """Find the nodes that must stay FP32 in an FP16 graph, by their form alone.

    Args:
        graph: A float32 graph, simplified; Q/DQ allowed.

    Returns:
        The nodes with the reason, in the order of the graph.
    """
    nodes = list(graph.all_nodes())
    search = _Search(nodes, _Constants(nodes).lost)
    search.statistics()
    search.constants()
    search.close()
    return {node: search.fp32_nodes[node] for node in search.nodes if node in search.fp32_nodes}


def follow(node: ir.Node, *, large: bool = False) -> list[ir.Node]:
    """What reads a value that FP16 cannot hold, up to the first that makes another value of it.

    A sum with a computed tensor is followed only if the value is large: what FP16 loses of a term is lost in the sum.
    """
    readers: dict[ir.Node, None] = {}
    waiting = [node]
    while waiting:
        value_maker = waiting.pop()
        for value in value_maker.outputs:
            for use in value.uses():
                reader = use.node
                constant = any(_array(other) is not None for other in reader.inputs if other is not value)
                term = not large and reader.op_type in {"Add", "Sub"} and not constant
                if term or reader in readers or reader.op_type in {"Shape", "Size", "QuantizeLinear"}:
                    continue
                readers[reader] = None
                passing = reader.op_type in MOVES | _PASSING or (large and reader.op_type in {"Add", "Sub", "Where"})
                if passing or (reader.op_type in _BINARY and constant):
                    waiting.append(reader)
    return list(readers)


@dataclass
class _Search:
    """Collects the nodes found.

    Attributes:
        nodes: All nodes, in order.
        lost: Why FP16 cannot hold a constant that a node reads, by the index of the input; empty if it can.
        fp32_nodes: Those that must stay FP32, with the reason.
        feeding: Nodes whose result decides a root, a logarithm or a division.
    """

    nodes: list[ir.Node]
    lost: Callable[[ir.Node, int], str]
    fp32_nodes: dict[ir.Node, str] = field(default_factory=dict)
    feeding: set[ir.Node] = field(default_factory=set)

    def statistics(self) -> None:
        """Find the chains from a square, an exponential or a lost constant to a root, a logarithm or a division."""
        for node in self.nodes:
            if node.op_type in SQUARING:
                self._keep(node, STATISTICS)
        for node in self.nodes:
            needed = sensitive(node)
            if needed is None:
                continue
            chain = _Chain(self.fp32_nodes, self.lost)
            if chain.holds(needed):
                for member in (*chain.members, node):
                    self._keep(member, STATISTICS)
                for reader in follow(node) if _is_reciprocal(node) else ():  # it may be huge, until it multiplies
                    self._keep(reader, STATISTICS)
            self.feeding |= chain.seen.keys()

    def constants(self) -> None:
        """Find what reads a constant that FP16 cannot hold, and what needs the value that it makes."""
        for node in self.nodes:
            if node.op_type in _QDQ | {"Cast"}:
                continue
            for index in range(len(node.inputs)):
                reason = self.lost(node, index)
                if not reason or (node.op_type in {"Add", "Sub"} and not self._counts(node, index)):
                    continue
                self._keep(node, reason)
                large = "beyond" in reason
                if (large and node.op_type in {"Add", "Sub", "Where", "Max", "Div"}) or (
                    not large and node.op_type in {"Mul", "Pow"}
                ):
                    for reader in follow(node, large=large):
                        self._keep(reader, f"reads what it made: {reason}")

    def _counts(self, node: ir.Node, index: int) -> bool:
        """Whether a term of a sum counts although it is tiny: a scalar, or one that decides a division."""
        array = _array(node.inputs[index])
        return array is not None and (array.size == 1 or node in self.feeding or float(np.abs(array).max()) > LARGEST)

    def close(self) -> None:
        """Take in what only the nodes found read: the mean that is squared, and the difference from it."""
        waiting = list(self.fp32_nodes)
        while waiting:
            node = waiting.pop()
            if self.fp32_nodes[node] != STATISTICS:
                continue
            for value in node.inputs:
                below = value.producer() if value is not None and value.dtype == ir.DataType.FLOAT else None
                if below is None or below in self.fp32_nodes or below.op_type not in _CLOSING:
                    continue
                uses = [use.node for output in below.outputs for use in output.uses()]
                if all(reader in self.fp32_nodes for reader in uses) and not any(
                    x.is_graph_output() for x in below.outputs
                ):
                    self._keep(below, STATISTICS)
                    waiting.append(below)

    def _keep(self, node: ir.Node, reason: str) -> None:
        if any(value.dtype == ir.DataType.FLOAT for value in (*node.inputs, *node.outputs) if value is not None):
            self.fp32_nodes.setdefault(node, reason)


@dataclass
class _Chain:
    """What lies between a root, a logarithm or a division and the squares below it.

    Attributes:
        fp32_nodes: Nodes that stay FP32 already.
        lost: Why FP16 cannot hold a constant that a node reads.
        members: Nodes from a square, an exponential or a lost constant on.
        seen: All nodes looked at, and whether they are members.
    """

    fp32_nodes: Mapping[ir.Node, str]
    lost: Callable[[ir.Node, int], str]
    members: dict[ir.Node, None] = field(default_factory=dict)
    seen: dict[ir.Node, bool] = field(default_factory=dict)

    def holds(self, value: ir.Value | None, *, below: bool = False) -> bool:
        """Whether a value is made from a square, an exponential or a lost constant; `below` a reduction."""
        node = value.producer() if value is not None and value.dtype == ir.DataType.FLOAT else None
        if node is None or len(self.seen) > _FAR or (node.op_type not in _CHAIN and sensitive(node) is None):
            return False
        if node not in self.seen:
            self.seen[node] = False
            self.seen[node] = self._decide(node, below)
            if self.seen[node]:
                self.members[node] = None
        return self.seen[node]

    def _decide(self, node: ir.Node, below: bool) -> bool:
        if _expands(node):
            return True
        if sensitive(node) is not None:  # it ends a chain of its own
            return node in self.fp32_nodes
        computed = [value for value in node.inputs if value is not None and _array(value) is None]
        if below and node.op_type == "Add" and len(computed) > 1:  # a residual sum
            return False
        inside = below or node.op_type in _REDUCTIONS
        reached = [self.holds(value, below=inside) for value in computed]
        return any(reached) or any(self.lost(node, index) for index in range(len(node.inputs)))


def _array(value: ir.Value | None) -> npt.NDArray[np.float32] | None:
    """The values of a floating-point constant."""
    if value is None or value.is_graph_input() or value.dtype != ir.DataType.FLOAT:
        return None
    tensor = ir.convenience.get_const_tensor(value)
    return None if tensor is None else tensor.numpy()


def _exponent(node: ir.Node) -> float | None:
    """The exponent of a Pow; NaN if it is not one constant number, None if the node is no Pow."""
    if node.op_type != "Pow":
        return None
    exponent = node.inputs[1]
    tensor = None if exponent is None else ir.convenience.get_const_tensor(exponent)
    return float("nan") if tensor is None or tensor.size != 1 else float(tensor.numpy().reshape(-1)[0])


def _is_root(node: ir.Node) -> bool:
    return node.op_type in {"Sqrt", "Reciprocal", "Log"}


def _is_reciprocal(node: ir.Node) -> bool:
    exponent = _exponent(node)
    inverse = node.op_type == "Div" and _array(node.inputs[0]) is not None
    return node.op_type == "Reciprocal" or inverse or (exponent is not None and not exponent >= 0)


def sensitive(node: ir.Node) -> ir.Value | None:
    """The input whose small values decide the result: under a root, in a logarithm, below a division."""
    exponent = _exponent(node)
    if _is_root(node) or (exponent is not None and (not exponent >= 0 or exponent % 1 != 0)):
        return node.inputs[0]
    below = node.inputs[1] if node.op_type == "Div" else None
    return below if below is not None and _array(below) is None else None


def _expands(node: ir.Node) -> bool:
    """Whether the range of numbers that a node makes is a power, or the exponential, of what it reads."""
    exponent = _exponent(node)
    squares = node.op_type == "Mul" and node.inputs[0] is node.inputs[1]
    return squares or node.op_type in SQUARING | _EXPONENTIAL or (exponent is not None and not exponent <= 1)


class _Constants:
    """Judges the constants of a graph, each once."""

    def __init__(self, nodes: list[ir.Node]) -> None:
        self._judged: dict[ir.Value, str] = {}
        self._scales = {value for node in nodes if node.op_type in _QDQ for value in node.inputs[1:]}

    def lost(self, node: ir.Node, index: int) -> str:
        """Why FP16 cannot hold a constant that a node reads; empty if it can, or if it is a term of a sum."""
        value = node.inputs[index]
        if value is None or _ADDENDS.get(node.op_type) == index or value in self._scales:
            return ""
        if value not in self._judged:
            array = _array(value)
            self._judged[value] = "" if array is None or not array.size else _loss(str(value.name), array)
        return self._judged[value]


def _loss(name: str, array: npt.NDArray[np.float32]) -> str:
    """Why FP16 cannot hold some numbers; infinity is as good in any type."""
    finite = array if np.isfinite(array.sum(dtype=np.float64)) else array[np.isfinite(array)]
    largest = max(-float(finite.min()), float(finite.max())) if finite.size else 0.0
    name = "a constant" if array.size == 1 else name
    if largest > LARGEST:
        return f"{name} of {largest:.3g} is beyond FP16, which ends at {LARGEST:.0f}"
    if SMALLEST_STEP / 2 * finite.size**0.5 < largest * WORST_ERROR / 2:
        return ""  # no number errs by more than half a step next to 0, or by half a unit of its own magnitude
    norm = float(np.linalg.norm(finite.astype(np.float64)))
    error = float(np.linalg.norm((finite - finite.astype(np.float16)).astype(np.float64)))
    return f"{name} of {largest:.3g} loses {error / norm:.1%} in FP16" if norm and error > WORST_ERROR * norm else ""
