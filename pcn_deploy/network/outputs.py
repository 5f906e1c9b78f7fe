"""What a network returns, as tensors with names: a tensor, a tuple, a dict, a dataclass, or these within each other."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx, nn

from pcn_deploy.errors import ModelError, OptionError
from pcn_deploy.network.diagnosis.report import output_error, running_error
from pcn_deploy.specs import LOGITS, TAKEN, TENSOR, OutputSpec, usual_role
from pcn_deploy.tasks.roles import get_role

Path: TypeAlias = tuple[str | int, ...]
"""The keys, fields and indices that lead to a tensor."""


def choose_outputs(
    model: nn.Module, images: Tensor, asked: Sequence[OutputSpec] = ()
) -> tuple[nn.Module, tuple[OutputSpec, ...], tuple[str, ...]]:
    """Let a network return the tensors that are built, and nothing else.

    Args:
        model: A network in evaluation mode that nobody else uses; its `forward` may be replaced.
        images: Images, float32 `(N, C, H, W)`, on which it is run once.
        asked: The outputs to build, in this order, with their roles; an empty role is what the name says. By default
            every floating-point tensor of one row per image, in the order of the network.

    Returns:
        The network, which returns one tensor or a tuple of them; their names and roles; and notes on what is left out.

    Raises:
        ModelError: If it cannot run, or returns no such tensor.
        OptionError: If an output that was asked for is none of them, or cannot have its role.
    """
    with torch.no_grad():
        try:
            returned = model(images.clone())  # it may write into what it is given
        except Exception as error:  # the network's own code may fail in any way
            headline = f"The network cannot run on one input of shape {tuple(images.shape)}"
            raise running_error(model, error, headline) from error
    every = named_tensors(returned)
    first = {id(tensor): name for name, (_, tensor) in reversed(every.items())}  # of the names that a tensor has
    every = {name: one for name, one in every.items() if first[id(one[1])] == name}
    fitting = {name: path for name, (path, tensor) in every.items() if _fits(tensor, len(images))}
    if not fitting:
        raise output_error(returned)
    roles = {name: _role(name, every[name][1]) for name in fitting}
    if not asked:
        outputs = tuple(OutputSpec(name, roles[name]) for name in fitting)
        left = [name for name in every if name not in fitting]
        notes = (
            (f"not built are the outputs {', '.join(left)}: no floating-point numbers for each image",) if left else ()
        )
    else:
        outputs, notes = tuple(_asked(one, roles) for one in asked), ()
    for output in outputs:
        _check_role(output, tuple(every[output.name][1].shape))
    if not isinstance(returned, Tensor):
        model = _returning(model, [fitting[output.name] for output in outputs])
    return model, outputs, notes


def _asked(output: OutputSpec, roles: dict[str, str]) -> OutputSpec:
    if output.name not in roles:
        msg = f"The network has no output {output.name!r} to build. It has {', '.join(roles)}."
        raise OptionError(msg)
    return OutputSpec(output.name, output.role or roles[output.name])


def _check_role(output: OutputSpec, shape: tuple[int, ...]) -> None:
    """Refuse a role that an output of this shape cannot have.

    Raises:
        OptionError: If it cannot.
    """
    role = get_role(output.role)
    if not role.fits(shape):
        expected = f"axes ({', '.join(role.axes)})" if role.axes else role.meter(output.name).shape
        msg = (
            f"Output {output.name!r} is {shape}, and the role {output.role} has {expected}. Give it another one, such "
            f"as --output-name {output.name}:{TENSOR}."
        )
        raise OptionError(msg)


def _role(name: str, tensor: Tensor) -> str:
    role = usual_role(name)
    return role if get_role(role).fits(tuple(tensor.shape)) else TENSOR


def _fits(tensor: Tensor, images: int) -> bool:
    return tensor.is_floating_point() and tensor.ndim > 1 and tensor.shape[0] == images


def named_tensors(returned: Any) -> dict[str, tuple[Path, Tensor]]:
    """The tensors in what a network returned, with the ways to them, by name.

    One tensor alone is called `logits` if it is `(N, K)`, else `output`; what a dict or a dataclass names keeps that
    name, and what stands in a tuple is called `output_0` and so on. What is within another part has the name of both,
    and a name that bundles use themselves (`specs.TAKEN`) gets an underscore in front.
    """
    return dict(_tensors(returned))


def _tensors(value: Any, path: Path = ()) -> Iterator[tuple[str, tuple[Path, Tensor]]]:
    if isinstance(value, Tensor):
        alone = LOGITS if value.ndim == 2 else "output"
        yield _name(path) if path else alone, (path, value)
    elif isinstance(value, Mapping):
        for key, each in value.items():
            yield from _tensors(each, (*path, key))
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from _tensors(getattr(value, field.name), (*path, field.name))
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        for name in value._fields:
            yield from _tensors(getattr(value, name), (*path, name))
    elif isinstance(value, tuple | list):
        for index, each in enumerate(value):
            yield from _tensors(each, (*path, index))


def _name(path: Path) -> str:
    """Keys joined by dots, indices by underscores; an underscore in front of what bundles use themselves."""
    name = "output" if isinstance(path[0], int) else ""
    for key in path:
        name += f"_{key}" if isinstance(key, int) else f".{key}" if name else str(key)
    taken = any(name == one or name.startswith(f"{one}_") for one in TAKEN)
    return f"_{name}" if taken or not name else name


def _at(value: Any, path: Path) -> Any:
    """What a path leads to."""
    for key in path:
        value = getattr(value, key) if isinstance(key, str) and not isinstance(value, Mapping) else value[key]
    return value


def _returning(model: nn.Module, paths: list[Path]) -> nn.Module:
    """The network, its modules under the same names, with these of its tensors for outputs."""

    def chosen(returned: Any) -> Any:
        tensors = tuple(_at(returned, path) for path in paths)
        return tensors[0] if len(tensors) == 1 else tensors

    if isinstance(model, fx.GraphModule):  # its forward is made of its graph, anew whenever that changes
        (output,) = (node for node in model.graph.nodes if node.op == "output")
        output.args = (chosen(output.args[0]),)
        model.graph.eliminate_dead_code()
        model.recompile()
        return model
    own: Any = type(model)

    def forward(self: Any, images: Tensor) -> Any:
        return chosen(own.forward(self, images))

    if "forward" in vars(model):
        msg = "The network's forward was replaced on the object: its outputs cannot be chosen. Wrap it in a module."
        raise ModelError(msg)
    model.__class__ = type(own.__name__, (own,), {"forward": forward, "__module__": own.__module__})
    return model


def as_tuple(returned: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The outputs of a network that returns one tensor or a tuple of them."""
    return (returned,) if isinstance(returned, Tensor) else returned


def first_output(network: Callable[[Tensor], Tensor | tuple[Tensor, ...]], images: Tensor) -> Tensor:
    """What a network is judged by, `(N, ...)`."""
    return as_tuple(network(images))[0]
