"""A module made from a changed trace: the parts and settings of the module it stands for, with another forward."""

from __future__ import annotations

import linecache
from typing import Any, List, Optional, Tuple  # noqa: UP035 - what TorchScript reads in generated code

from torch import Tensor, fx, nn

from pcn_deploy.network.calls import CallTrace

_classes: dict[tuple[Any, ...], type[nn.Module]] = {}
"""Classes by their code: equal blocks have one class, which is how they are known to be equal."""

_SETTINGS = (bool, int, float, str)


def module_of(original: nn.Module, trace: CallTrace, layers: dict[str, nn.Module]) -> nn.Module:
    """The module that a trace describes.

    Args:
        original: The module that was traced.
        trace: Its trace, in which calls of new layers stand.
        layers: The new layers, by name.

    Returns:
        The only layer itself where the forward is no more than that. Else a module with the parts and parameters of
        the original that are still used, its plain attributes, the new layers, and the traced code as its forward.
    """
    graph = trace.graph
    nodes = [node for node in graph.nodes if node.op != "placeholder"]
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    if len(nodes) == 2 and nodes[0].target in layers and nodes[1].args == (nodes[0],):
        layer = layers[nodes[0].target]
        if nodes[0].args == tuple(placeholders) and len(placeholders) == 1 and not trace.settings:
            return layer
    _declare(trace)
    made: nn.Module = _class_of(original, graph)()
    for name, value in vars(original).items():
        if _is_plain(value) and not name.startswith("_"):
            setattr(made, name, value)
    for node in nodes:
        if node.op in ("call_module", "get_attr"):
            _hold(made, original, str(node.target), trace.held, layers)
    return made.eval()


def _hold(
    made: nn.Module, original: nn.Module, target: str, held: dict[str, Any], layers: dict[str, nn.Module]
) -> None:
    """Give a module what one of its nodes uses: a new layer, a part or a tensor of the original."""
    name = target.partition(".")[0]
    if name in layers:
        made.add_module(name, layers[name])
    elif name in original._modules:
        made.add_module(name, original._modules[name])
    elif name in original._buffers:
        made.register_buffer(name, held[target], persistent=name not in original._non_persistent_buffers_set)
    elif isinstance(held[target], nn.Parameter):
        made.register_parameter(name, held[target])
    else:
        made.register_buffer(name, held[target])


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple):
        return bool(value) and all(type(item) is type(value[0]) and isinstance(item, _SETTINGS) for item in value)
    return isinstance(value, _SETTINGS)


def _declare(trace: CallTrace) -> None:
    """Give the arguments the types that TorchScript asks for, and take the settings as arguments that are not used."""
    graph, settings = trace.graph, trace.settings
    tensors = {str(node.target): node for node in graph.nodes if node.op == "placeholder"}
    for node in tensors.values():
        value = node.meta["values"][0] if node.meta.get("values") else None
        if isinstance(value, list):
            node.type = List[Tensor]  # noqa: UP006
        elif isinstance(value, tuple):
            node.type = Tuple[tuple(Tensor for _ in value)]  # noqa: UP006
    names = trace.names
    last = max((names.index(name) for name in tensors), default=-1)
    following = next(node for node in graph.nodes if node.op != "placeholder")
    for index in reversed(range(len(names))):
        name = names[index]
        if name in tensors:
            following = tensors[name]
            continue
        with graph.inserting_before(following):
            value = settings[name]
            default = {"default_value": value} if index > last else {}
            following = graph.placeholder(name, _type_of(value), **default)


def _type_of(value: Any) -> Any:
    if value is None:
        return Optional[Tensor]  # noqa: UP045
    if isinstance(value, tuple | list) and value and isinstance(value[0], int):
        return List[int]  # noqa: UP006
    return type(value) if isinstance(value, _SETTINGS) else None


def _class_of(original: nn.Module, graph: fx.Graph) -> type[nn.Module]:
    """The class of a forward, named as the class it stands for; one for all graphs with the same code."""
    graph.lint()
    code = graph.python_code("self")
    kind = type(original)
    key = (kind, code.src, tuple(sorted((name, id(value)) for name, value in code.globals.items())))
    if key not in _classes:
        file = f"<{kind.__name__} with its products as layers, {len(_classes)}>"
        scope = dict(code.globals)
        exec(compile(code.src, file, "exec"), scope)
        linecache.cache[file] = (len(code.src), None, code.src.splitlines(keepends=True), file)
        body = {"forward": scope["forward"], "__module__": kind.__module__, "__qualname__": kind.__qualname__}
        _classes[key] = type(kind.__name__, (nn.Module,), body)
    return _classes[key]
