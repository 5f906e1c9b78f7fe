"""Trace one module of a network, as the network calls it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from pcn_deploy.network.attributes import attributes_kept
from pcn_deploy.network.symbolic import BATCHES, PLAIN, ROOT, ShapedTracer, answers_known, without_root


@dataclass(frozen=True, kw_only=True)
class CallTrace:
    """A module as it runs when it is called as it was.

    Attributes:
        graph: Its operations; each node has `meta["values"]`, what it is without data in batches of several sizes.
        held: What the nodes use of the module, by its path.
        names: The arguments of the call, in order.
        settings: Those that were no tensors; the trace holds for these values.
    """

    graph: fx.Graph
    held: dict[str, Any]
    names: tuple[str, ...]
    settings: dict[str, Any]


class Calls:
    """How modules are called in a run of the network, in batches of several sizes.

    Args:
        model: The network.
        shape: C, H and W of its images.
        paths: The modules to watch.

    Raises:
        Exception: Whatever the network's code raises on tensors without data.
    """

    def __init__(self, model: nn.Module, shape: tuple[int, int, int], paths: list[str]) -> None:
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._model = model
        self._given: dict[str, list[list[dict[str, Any]]]] = {path: [] for path in paths}
        handles = [
            model.get_submodule(path).register_forward_pre_hook(self._noting(path), with_kwargs=True) for path in paths
        ]
        try:
            for batch in BATCHES:
                for calls in self._given.values():
                    calls.append([])
                with self.mode, torch.no_grad(), attributes_kept(model):
                    model(torch.empty(batch, *shape))
        finally:
            for handle in handles:
                handle.remove()

    def _noting(self, path: str) -> Callable[..., None]:
        def note(module: nn.Module, args: Any, kwargs: Any) -> None:
            bound = inspect.signature(module.forward).bind(*args, **kwargs)
            self._given[path][-1].append(dict(bound.arguments))

        return note

    def trace(self, path: str, is_leaf: Callable[[nn.Module, str], bool]) -> CallTrace:
        """Trace one of the modules.

        Args:
            path: Its name in the network.
            is_leaf: Whether a part of it, named as seen from it, is one node of the graph.

        Raises:
            Exception: Whatever its code raises with symbols in the place of tensors.
            ValueError: If its calls differ in more than their tensors.
        """
        module, calls = self._model.get_submodule(path), self._given[path]
        first_calls = [every[0] for every in calls]
        names = list(first_calls[0])
        settings = {name: first_calls[0][name] for name in names if _is_setting(first_calls[0][name])}
        for call in (call for every in calls for call in every):
            if list(call) != names or any(call[name] != value for name, value in settings.items()):
                msg = f"{path} is called in different ways"
                raise ValueError(msg)
        inputs = {name: [call[name] for call in first_calls] for name in names if name not in settings}
        root = _call_of(module, names, settings)
        with answers_known(), attributes_kept(root):
            tracer = ShapedTracer(self.mode, inputs, is_leaf)
            graph = tracer.trace(root)
            held = without_root(root, graph)  # some of it are attributes that the trace has given the root
        for node in graph.nodes:
            node.meta["values"] = tracer.values(node)
        return CallTrace(graph=graph, held=held, names=tuple(names), settings=settings)


def _is_setting(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(_is_setting(item) for item in value)
    return value is None or isinstance(value, PLAIN)


def _call_of(module: nn.Module, names: list[str], settings: dict[str, Any]) -> nn.Module:
    """A module that takes the tensors of a call by their names and adds the settings."""
    tensors = ", ".join(name for name in names if name not in settings)
    arguments = ", ".join(f"{name}={name}" if name not in settings else f"{name}=settings[{name!r}]" for name in names)
    scope: dict[str, Any] = {"settings": settings}
    exec(f"def forward(self, {tensors}):\n    return self.{ROOT}({arguments})", scope)
    root: nn.Module = type("_Call", (nn.Module,), {"forward": scope["forward"]})()
    root.add_module(ROOT, module)
    return root
