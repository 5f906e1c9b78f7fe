"""Export a network with `torch.export`, and make of the program a module that TorchScript compiles."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr
from importlib import import_module
from io import StringIO
from typing import Any

import torch
import torch.nn.functional as fn
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.overrides import TorchFunctionMode

from pcn_deploy.network.attributes import attributes_kept
from pcn_deploy.specs import BATCH_AXIS, BatchRange

_CHECKS = {"_assert_tensor_metadata", "_assert_scalar", "_assert_async", "sym_constrain_range_for_size"}
"""Operators that compute nothing."""


def example_shape(shape: tuple[int, int, int], batch: BatchRange) -> tuple[int, int, int, int]:
    """Shape of the images to export with: a batch of one would be taken for a constant."""
    return (2 if batch.is_dynamic else batch.min, *shape)


def export_program(model: nn.Module, example: Tensor, batch: BatchRange) -> ExportedProgram:
    """Run the Python code of a network once, with symbols for what depends on the images or on their number.

    Args:
        model: Network in evaluation mode.
        example: Images of `example_shape`.
        batch: The batch sizes that the program must take; one axis is symbolic if it is a true range.

    Raises:
        Exception: Whatever torch or the network's own code raises.
    """
    shapes: Any = None
    if batch.is_dynamic:
        shapes = ({0: torch.export.Dim(BATCH_AXIS, min=1, max=max(batch.max, 2))},)
        first = next(iter(inspect.signature(model.forward).parameters.values()), None)
        if first is not None and first.kind is inspect.Parameter.VAR_POSITIONAL:  # forward(*inputs): one argument
            shapes = (shapes,)
    dumped = redirect_stderr(StringIO())  # where it dumps the graph of what fails
    with attributes_kept(model), _attributes_not_judged(), _shape_of_fake_quantization(), FourAxes(), dumped:
        return torch.export.export(model, (example,), strict=False, dynamic_shapes=shapes)


class FourAxes(TorchFunctionMode):
    """Calls `scaled_dot_product_attention` with four axes, all that the exporter to ONNX takes (torch 2.9 to 2.13).

    `(N, L, E)` is one head, and of `(N, G, H, L, E)` the first axes become one: each product is the same.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Execute an operation."""
        if func is not fn.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        return _attention(*args, **(kwargs or {}))


def _attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *args: Any, **kwargs: Any
) -> Tensor:
    tensors, axes = (query, key, value), max(query.ndim, key.ndim, value.ndim)
    if axes == 4 or min(tensor.ndim for tensor in tensors) < 2:
        return fn.scaled_dot_product_attention(query, key, value, attn_mask, *args, **kwargs)
    outer = torch.broadcast_shapes(*(tensor.shape[:-2] for tensor in tensors))  # type: ignore[no-untyped-call] # torch has no type

    def four(tensor: Tensor) -> Tensor:
        if axes < 4:
            return tensor.expand(*outer, *tensor.shape[-2:])[(None,) * (3 - axes)][:, None]
        return tensor.expand(*outer[:-1], *tensor.shape[-3:]).flatten(0, -4)

    mask = attn_mask if attn_mask is None or attn_mask.ndim < 3 else four(attn_mask)
    result = fn.scaled_dot_product_attention(four(query), four(key), four(value), mask, *args, **kwargs)
    shape = outer if axes < 4 else (*outer[:-1], result.shape[1])
    return result.reshape(*shape, *result.shape[-2:])


@contextmanager
def _attributes_not_judged() -> Iterator[None]:
    """Keep torch from judging what the network puts into its attributes: we put them back.

    2.9 refuses a network whose cache grows, and leaves tensors without data in caches of parts; later ones warn.
    """
    trace: Any = import_module("torch.export._trace")  # torch loads it with the first export: it takes a second
    judge = trace._detect_attribute_assignment
    trace._detect_attribute_assignment = lambda *_: nullcontext()
    try:
        yield
    finally:
        trace._detect_attribute_assignment = judge


@contextmanager
def _shape_of_fake_quantization() -> Iterator[None]:
    """Tell torch the shapes of an operator of quantised modules that it has no rule for."""
    name = "fake_quantize_per_tensor_affine_cachemask"
    if torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{name}", "Meta"):
        yield
        return
    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl(name, lambda x, *_: (torch.empty_like(x), torch.empty_like(x, dtype=torch.bool)), "Meta")
        yield


def as_module(program: ExportedProgram) -> nn.Module:
    """A module of one tensor argument that does what the program does: no Python construct is left, aten operators are.

    Args:
        program: Of one input.

    Returns:
        The module in evaluation mode; parameters, buffers and constants have the names that they have in the program.

    Raises:
        NotImplementedError: If the program holds something other than operators, such as a part under `torch.autocast`.
    """
    graph, held, made = fx.Graph(), dict[str, Any](), dict[fx.Node, Any]()
    inputs = {spec.arg.name: spec for spec in program.graph_signature.input_specs}
    for node in program.graph.nodes:
        if node.op == "placeholder":
            made[node] = _input(graph, program, inputs[node.name], held)
        elif node.op == "output":
            results = fx.node.map_arg(node.args[0], made.__getitem__)
            graph.output(results[0] if len(results) == 1 else tuple(results))
        elif not _is_check(node):
            made[node] = _operation(graph, node, made)
    return fx.GraphModule(held, graph).eval()


def _input(graph: fx.Graph, program: ExportedProgram, spec: Any, held: dict[str, Any]) -> fx.Node:
    """The image, or what the program holds; tensors of the program's own have names like `lifted_tensor_0`."""
    if spec.kind == InputKind.USER_INPUT:
        return graph.placeholder(spec.arg.name)
    values = program.constants if spec.target in program.constants else program.state_dict
    held[spec.target] = values[spec.target]
    return graph.get_attr(spec.target)


def _is_check(node: fx.Node) -> bool:
    name = getattr(node.target, "overloadpacket", node.target)
    return not node.users and getattr(name, "__name__", "") in _CHECKS


def _operation(graph: fx.Graph, node: fx.Node, made: dict[fx.Node, Any]) -> fx.Node:
    target = node.target
    if isinstance(target, str | torch._ops.HigherOrderOperator):
        msg = f"{target} in an exported program"
        raise NotImplementedError(msg)
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), made.__getitem__)
    if target is torch.ops.aten.sym_size.int:
        return graph.call_method("size", args)
    if not isinstance(target, torch._ops.OpOverload):  # arithmetic with the size of the batch
        return graph.call_function(target, args, kwargs)
    arguments = target._schema.arguments
    args = tuple(_literal(value, argument.type) for value, argument in zip(args, arguments, strict=False))
    types = {argument.name: argument.type for argument in arguments}
    kwargs = {name: _literal(value, types[name]) for name, value in kwargs.items()}
    return graph.call_function(target.overloadpacket, args, kwargs)


def _literal(value: Any, kind: Any) -> Any:
    """A number in the type that the signature has: Python takes 0 for 0.0, TorchScript does not."""
    if isinstance(kind, torch.OptionalType) and value is not None:
        return _literal(value, kind.getElementType())
    if isinstance(kind, torch.ListType) and isinstance(value, list | tuple):
        return [_literal(item, kind.getElementType()) for item in value]
    if isinstance(kind, torch.FloatType) and isinstance(value, int):
        return float(value)
    return str(value) if isinstance(value, torch.device) else value
