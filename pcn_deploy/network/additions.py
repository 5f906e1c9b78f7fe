"""Make the residual additions of any network modules: the planner finds them, and may quantise their identity."""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from pcn_deploy.models.layers import ResidualAdd
from pcn_deploy.network.calls import CallTrace
from pcn_deploy.network.dataflow import Addition, DataFlow, Value, is_plain_layer
from pcn_deploy.network.lifting import become, is_open, lifted_forms
from pcn_deploy.network.products import Separation

_ADDITIONS: set[Any] = {operator.add, operator.iadd, torch.add, "add", "add_", "__add__", "__iadd__"}


def separate_additions(model: nn.Module, images: Tensor) -> int:
    """Put a `ResidualAdd` in the place of each addition of two maps of one shape, one of which a convolution made.

    Its branch is the side that a convolution made; where both are, as with a convolution in the shortcut, the side
    that more products lead to.

    Args:
        model: Network in evaluation mode, changed in place.
        images: float32 `(N, C, H, W)`, one of which is run.

    Returns:
        Number of additions.
    """
    flow = DataFlow(model, images[:1].clone())
    sides: dict[str, list[int]] = {}
    for addition in flow.additions:
        sides.setdefault(addition.path, []).append(_branch(model, flow, addition))
    wanted = [path for path, of_module in sides.items() if max(of_module) >= 0 and is_open(model, path)]
    wanted = [path for path in wanted if flow.times()[path] <= 1]
    if not wanted:
        return 0
    forms = lifted_forms(model, images[:1], wanted, partial(_separate, sides))
    for path, form in forms.items():
        become(model.get_submodule(path), form)
    return sum(side >= 0 for path in forms for side in sides[path])


def _branch(model: nn.Module, flow: DataFlow, addition: Addition) -> int:
    """Which operand of an addition is the branch; -1 if no convolution made either."""
    made = [_is_of_convolution(model, flow, value) for value in addition.operands]
    if not addition.is_map or not any(made):
        return -1
    if not all(made):
        return made.index(True)
    first, second = addition.operands
    return int(second.depth > first.depth)


def _is_of_convolution(model: nn.Module, flow: DataFlow, value: Value) -> bool:
    layer = model.get_submodule(value.maker) if value.maker in flow.calls else None
    return isinstance(layer, nn.Conv2d) and is_plain_layer(layer)


def _separate(sides: dict[str, list[int]], separation: Separation, trace: CallTrace, path: str) -> None:
    nodes = [node for node in trace.graph.nodes if _is_addition(node, separation.is_activation)]
    if len(nodes) != len(sides[path]):
        return  # the trace does something else than the run
    for node, side in zip(nodes, sides[path], strict=True):
        if side < 0:
            continue
        operands = (node.args[0], node.args[1]) if len(node.args) == 2 else (node.args[0], node.kwargs["other"])
        branch, identity = operands[side], operands[1 - side]
        with trace.graph.inserting_before(node):
            added = separation.call(ResidualAdd(), "add", None, branch, identity)
        node.replace_all_uses_with(added)
        trace.graph.erase_node(node)


def _is_addition(node: fx.Node, is_activation: Callable[..., bool]) -> bool:
    if node.op not in ("call_function", "call_method") or node.target not in _ADDITIONS:
        return False
    operands = (*node.args, *node.kwargs.values())
    if len(operands) != 2 or not set(node.kwargs) <= {"other"} or not all(is_activation(each, 0) for each in operands):
        return False
    shapes = [each.meta["values"][0].shape for each in (*operands, node) if isinstance(each, fx.Node)]
    return bool(shapes[0] == shapes[1] == shapes[2])
