"""Write floats where a traced call has an int and its function takes a float, as Python lets everybody do."""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any

import torch
from torch import fx


def write_floats(graph: fx.Graph) -> None:
    """Convert ints in the calls of a traced graph where the signature has a float; TorchScript does not do it."""
    for node in graph.nodes:
        if node.op not in ("call_function", "call_method"):
            continue
        floats = _floats(node.target)
        if floats:
            node.args = tuple(_float(value) if index in floats else value for index, value in enumerate(node.args))
            node.kwargs = {name: _float(value) if name in floats else value for name, value in node.kwargs.items()}


def _float(value: Any) -> Any:
    return float(value) if type(value) is int else value


@cache
def _floats(target: Any) -> frozenset[int | str]:
    """Positions and names of the arguments of a function that are floats, whichever of its forms is meant."""
    if not isinstance(target, str) and hasattr(target, "__code__"):
        signatures = [[(name, str(each.annotation)) for name, each in inspect.signature(target).parameters.items()]]
        is_float = {"float", "float | None", "Optional[float]", "typing.Optional[float]", "<class 'float'>"}
    else:
        name = target if isinstance(target, str) else getattr(target, "__name__", "")
        schemas = torch._C._jit_get_schemas_for_operator(f"aten::{name}")
        signatures = [[(each.name, str(each.type)) for each in schema.arguments] for schema in schemas]
        is_float = {"float", "Optional[float]"}
    places: dict[int | str, set[bool]] = {}
    for signature in signatures:
        for index, (name, kind) in enumerate(signature):
            for place in (index, name):
                places.setdefault(place, set()).add(kind in is_float)
    return frozenset(place for place, kinds in places.items() if kinds == {True})
