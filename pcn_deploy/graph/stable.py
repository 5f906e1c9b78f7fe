"""Forms that keep what is small: a logarithm, a root or a division tells numbers apart that a sum or 1 - x loses.

torch exports some functions as their textbook formulas (2.9 to 2.13): `log1p(x)` as Log(1 + x), `expm1` as Exp(x) - 1,
`logaddexp` as the Log of a sum of Exp, `logsigmoid` as Log(Sigmoid(x)). They overflow, or round away what the function
is there for. And the Sigmoid of ONNX Runtime (1.22 to 1.32) ends at 1.5e-8, near x = -18, where torch goes on to 1e-38.
Every form here is the same function exactly, by the identity that its docstring names.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnxscript import opset20 as op

from pcn_deploy.graph.delicate import follow, sensitive

_NEAR = 0.5
"""Where the series of a function and its formula are both good to the last bit but one."""


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """What torch's exporter writes for operators instead of its own formulas."""
    aten = torch.ops.aten
    return {
        aten.log1p.default: _log1p,
        aten.expm1.default: _expm1,
        aten.logaddexp.default: _logaddexp,
        aten.logaddexp2.default: _logaddexp2,
    }


def _log1p(self: Any) -> Any:
    """log(1 + x) = 2 atanh(x / (x + 2))."""
    near = op.Mul(op.Atanh(op.Div(self, op.Add(self, 2.0))), 2.0)
    return op.Where(op.Less(op.Abs(self), _NEAR), near, op.Log(op.Add(self, 1.0)))


def _expm1(self: Any) -> Any:
    """exp(x) - 1 = 2 t / (1 - t), t = tanh(x / 2)."""
    half = op.Tanh(op.Mul(self, 0.5))
    near = op.Div(op.Mul(half, 2.0), op.Sub(1.0, half))
    return op.Where(op.Less(op.Abs(self), _NEAR), near, op.Sub(op.Exp(self), 1.0))


def _logaddexp(self: Any, other: Any) -> Any:
    """log(exp(a) + exp(b)) = max(a, b) + log(1 + exp(-|a - b|)); where both are infinite, a + log 2."""
    apart = op.Neg(op.Abs(op.Sub(self, other)))
    total = op.Add(op.Max(self, other), op.Softplus(apart))
    return op.Where(op.Equal(self, other), op.Add(self, math.log(2.0)), total)


def _logaddexp2(self: Any, other: Any) -> Any:
    """log2(2^a + 2^b) = log(exp(a log 2) + exp(b log 2)) / log 2."""
    scale = math.log(2.0)
    return op.Div(_logaddexp(op.Mul(self, scale), op.Mul(other, scale)), scale)


def keep_small(graph: ir.Graph) -> None:
    """Give each Sigmoid whose small values decide something a form that keeps them, in place.

    Args:
        graph: A float32 graph, simplified; Q/DQ allowed.
    """
    for node in list(graph.all_nodes()):
        if node.op_type != "Sigmoid" or node.inputs[0] is None:
            continue
        for use in list(node.outputs[0].uses()):
            if use.node.op_type == "Log":
                _replace(use.node, _log_sigmoid(node.inputs[0], use.node))
        if any(_decides(reader) for reader in _readers(node)):
            _replace(node, _sigmoid(node.inputs[0], node))


def _readers(node: ir.Node) -> Iterator[tuple[ir.Node, ir.Value]]:
    """What reads a value, or what a step that keeps small values small makes of it."""
    for maker in (node, *follow(node)):
        for value in maker.outputs:
            yield from ((use.node, value) for use in value.uses())


def _decides(reader: tuple[ir.Node, ir.Value]) -> bool:
    node, value = reader
    return sensitive(node) is value


def _log_sigmoid(value: ir.Value, like: ir.Node) -> list[ir.Node]:
    """log(sigmoid(x)) = -softplus(-x); beyond 20 softplus(-x) is -x in float32, and is not left to overflow."""
    negative = ir.node("Neg", [value], name=f"{like.name}.negative")
    limit = _number(f"{like.name}.limit", 20.0)
    far = ir.node("Greater", [negative.outputs[0], limit.outputs[0]], name=f"{like.name}.far")
    near = ir.node("Softplus", negative.outputs, name=f"{like.name}.softplus")
    both = ir.node("Where", [far.outputs[0], negative.outputs[0], near.outputs[0]], name=f"{like.name}.where")
    return [negative, limit, far, near, both, ir.node("Neg", both.outputs, name=like.name)]


def _sigmoid(value: ir.Value, like: ir.Node) -> list[ir.Node]:
    """sigmoid(x) = 1 / (1 + exp(-x))."""
    negative = ir.node("Neg", [value], name=f"{like.name}.negative")
    power = ir.node("Exp", negative.outputs, name=f"{like.name}.exp")
    one = _number(f"{like.name}.one", 1.0)
    total = ir.node("Add", [power.outputs[0], one.outputs[0]], name=f"{like.name}.sum")
    return [negative, power, one, total, ir.node("Reciprocal", total.outputs, name=like.name)]


def _number(name: str, number: float) -> ir.Node:
    made = ir.node("Constant", [], {"value": ir.tensor(np.array(number, np.float32))}, name=name)
    made.outputs[0].shape, made.outputs[0].type = ir.Shape(()), ir.TensorType(ir.DataType.FLOAT)
    return made


def _replace(node: ir.Node, made: list[ir.Node]) -> None:
    """Put nodes in the place of one, the last of which makes what it made."""
    old = node.outputs[0]
    for each in made:
        each.metadata_props.update(node.metadata_props)
        if each.op_type != "Constant":
            each.outputs[0].shape = old.shape
            each.outputs[0].type = ir.TensorType(ir.DataType.BOOL) if each.op_type == "Greater" else old.type
    if node.graph is not None:
        ir.convenience.replace_nodes_and_values(node.graph, node, [node], made, [old], made[-1].outputs)
