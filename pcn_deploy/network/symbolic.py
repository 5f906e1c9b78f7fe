"""Trace a network symbolically, as it runs for one batch of images of a known channel count, height and width.

A plain `torch.fx` trace knows nothing of its tensors, so a check of a shape stops it. Here every node is also executed
on tensors without data, for batches of several sizes: what is the same in all of them, such as a height or a number of
axes, is a plain value, and what depends on the batch or on an image stays a symbol and is still refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from pcn_deploy.network.attributes import attributes_kept
from pcn_deploy.network.floats import write_floats

BATCHES = (1, 2, 1009)
"""One, the least of several, and a prime beyond what code compares with: what depends on the batch differs in one."""
PLAIN = (bool, int, float, str, torch.dtype, torch.device, torch.layout)
_ATTRIBUTES = {"ndim", "dtype", "is_cuda", "requires_grad"}
"""Those of a tensor that are plain values; not its device, which may be another where the graph is used."""
ROOT = "net"


class _ImageOnly(nn.Module):
    """A network called with the image alone, so that its other arguments have their defaults, and its hooks run."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.net(x)
        return y


class ShapedTracer(fx.Tracer):
    """A tracer that knows the shapes."""

    def __init__(
        self, mode: FakeTensorMode, inputs: dict[str, list[Any]], is_leaf: Callable[[nn.Module, str], bool] | None
    ) -> None:
        super().__init__(autowrap_modules=())  # type: ignore[arg-type] # else `math` would be asked for symbols
        self._is_leaf = is_leaf
        self._mode = mode
        self._inputs = inputs
        self._values: dict[fx.Node, list[Any]] = {}
        self._untraced = _hooks_of_tracing()

    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        """Whether a module is one node of the graph."""
        path = qualified_name.removeprefix(ROOT).removeprefix(".")
        if not path:
            return False
        return super().is_leaf_module(module, path) if self._is_leaf is None else self._is_leaf(module, path)

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **more: Any) -> Any:
        """Add a node; a result that is no tensor and the same for every batch is returned as it is."""
        proxy = super().create_proxy(kind, target, args, kwargs, *rest, **more)
        try:
            with _replaced(self._untraced), self._mode, torch.no_grad():
                values = [self._value(proxy.node, index) for index in range(len(BATCHES))]
        except Exception:  # whatever the operation lacks without data: what follows from it is not known
            return proxy
        self._values[proxy.node] = values
        known = all(type(value) in PLAIN and value == values[0] for value in values)
        if not known or target is getattr:  # attributes are asked for their node
            return proxy
        self.graph.erase_node(proxy.node)
        return values[0]

    def values(self, node: fx.Node) -> list[Any]:
        """What a node is for each of the batches, without data; empty if that is not known."""
        return self._values.get(node, [])

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        """Iterate over a tuple or list, whose length is known."""
        length = self.length_of(obj)
        return super().iter(obj) if length is None else (obj[index] for index in range(length))  # type: ignore[index]

    def length_of(self, obj: fx.Proxy) -> int | None:
        """Length of a tuple or list; None for anything else."""
        values = self._values.get(obj.node, [])
        lengths = {len(value) if isinstance(value, tuple | list) else None for value in values}
        return lengths.pop() if len(lengths) == 1 else None

    def known_attribute(self, obj: fx.Proxy, name: str) -> Any:
        """An attribute of a tensor that is the same in every batch; None if that is not known."""
        values = [getattr(value, name, None) for value in self._values.get(obj.node, [])]
        return values[0] if values and all(value == values[0] for value in values) else None

    def create_arg(self, a: Any) -> Any:
        """What a node is given; a number of NumPy as a plain one, which the generated code can name."""
        return super().create_arg(a.item() if isinstance(a, np.generic) else a)

    def _value(self, node: fx.Node, index: int) -> Any:
        """Execute a node on what its arguments were for one of the batches.

        Raises:
            Exception: If one of them is not known, or it needs data.
        """
        if node.op == "get_attr":
            return _attribute(self.root, str(node.target))
        if node.op == "placeholder":
            return self._inputs[str(node.target)][index]
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), partial(self._value_of, index=index))
        target: Any = node.target
        if node.op == "call_method":
            target, args = getattr(args[0], target), args[1:]
        elif node.op == "call_module":
            target = self.root.get_submodule(target)
        return target(*args, **kwargs)

    def _value_of(self, node: fx.Node, index: int) -> Any:
        return _attribute(self.root, str(node.target)) if node.op == "get_attr" else self._values[node][index]


def _hooks_of_tracing() -> dict[str, Any]:
    """The methods of modules in whose place tracing puts its own."""
    return {name: getattr(nn.Module, name) for name in ("__call__", "__getattr__")}


@contextmanager
def answers_known() -> Iterator[None]:
    """Let what stands for a tensor tell its `_ATTRIBUTES`, and what stands for a tuple or a list its length.

    `torch.fx` asks for attributes when they are used, and refuses `len`.
    """
    unknown_length, unknown_attribute = fx.Proxy.__len__, fx.Proxy.__getattr__

    def length(proxy: fx.Proxy) -> int:
        known = proxy.tracer.length_of(proxy) if isinstance(proxy.tracer, ShapedTracer) else None
        return unknown_length(proxy) if known is None else known

    def attribute(proxy: fx.Proxy, name: str) -> Any:
        if name in _ATTRIBUTES and isinstance(proxy.tracer, ShapedTracer):
            known = proxy.tracer.known_attribute(proxy, name)
            return unknown_attribute(proxy, name) if known is None else known
        return unknown_attribute(proxy, name)

    fx.Proxy.__len__, fx.Proxy.__getattr__ = length, attribute  # type: ignore[method-assign]
    try:
        yield
    finally:
        fx.Proxy.__len__, fx.Proxy.__getattr__ = unknown_length, unknown_attribute  # type: ignore[method-assign]


@contextmanager
def _replaced(methods: dict[str, Any]) -> Iterator[None]:
    before = _hooks_of_tracing()
    try:
        for name, method in methods.items():
            setattr(nn.Module, name, method)
        yield
    finally:
        for name, method in before.items():
            setattr(nn.Module, name, method)


def _attribute(root: nn.Module, path: str) -> Any:
    owner, _, name = path.rpartition(".")
    return getattr(root.get_submodule(owner), name)


def trace(
    model: nn.Module, shape: tuple[int, int, int], is_leaf: Callable[[nn.Module, str], bool] | None = None
) -> fx.GraphModule:
    """Trace a network as it runs for images of one shape, in batches of any size.

    Args:
        model: Network of one input `(N, C, H, W)`; arguments that it has beside that keep their defaults.
        shape: C, H and W.
        is_leaf: Whether a module, given with its path, is one node of the graph; torch's own modules by default.

    Returns:
        The trace, with the modules of `model` under the same paths, and without annotations of types, which need not
        hold any more and may be text that does not compile.

    Raises:
        Exception: Whatever the network's code raises with symbols in the place of tensors.
    """
    root, mode = _ImageOnly(model), FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        images = [torch.empty(batch, *shape) for batch in BATCHES]
    with answers_known(), attributes_kept(root):
        graph = ShapedTracer(mode, {"x": images}, is_leaf).trace(root)
        held = without_root(root, graph)  # before the constants that the tracer put on the root are taken away
    return fx.GraphModule(held, graph, type(model).__name__)


def without_root(root: nn.Module, graph: fx.Graph) -> dict[str, Any]:
    """Finish a trace: name what its nodes use by its path in the network; returns what they use, by that."""
    held: dict[str, Any] = {}
    for node in graph.nodes:
        node.type = None
        if node.op in ("call_module", "get_attr"):
            path = str(node.target)
            node.target = path.removeprefix(f"{ROOT}.")
            held[node.target] = _attribute(root, path)
    write_floats(graph)
    return held
