"""What must hold of a network before it is compiled; checked first, since a build that ends in a refusal is long."""

from __future__ import annotations

import pickle
import random
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter
from torch.utils._python_dispatch import TorchDispatchMode

from pcn_deploy.errors import ModelError
from pcn_deploy.network.diagnosis.places import place_of_module
from pcn_deploy.network.diagnosis.report import obstacle, running_error
from pcn_deploy.network.double import InDouble
from pcn_deploy.network.outputs import as_tuple
from pcn_deploy.network.reparametrization import is_reparametrization
from pcn_deploy.tasks.distance import least_sqnr_db

HEADLINE = "The network cannot be compiled"
EQUAL_DB = 100.0
"""Least SQNR between two runs that are to be equal: the order of sums in float32 leaves 120 dB and more. A network that
enlarges its rounding misses it in float32 (kernels differ with the size of the batch), but not in float64, whose
rounding is 175 dB smaller."""

ROUNDED_DB = 60.0
"""The same for a network that cannot be executed in float64."""


def check_definition(model: nn.Module) -> None:
    """Refuse what no graph can be made from.

    Args:
        model: The network as its author made it.

    Raises:
        ModelError: If it is a ScriptModule, has forward hooks, or weights that are missing, on the meta device, or of
            another floating-point type than float32; the message names the module and the way round.
    """
    for path, module in model.named_modules():
        cause = next(_obstacles(module), None)
        if cause is not None:
            raise obstacle(HEADLINE, place_of_module(path, module), *cause)


def _obstacles(module: nn.Module) -> Iterator[tuple[str, str]]:
    """Reasons against a module, and the ways round them."""
    if isinstance(module, torch.jit.ScriptModule):
        yield (
            "it is a ScriptModule, whose layers can be neither rewritten nor quantised.",
            "let the factory return the network as it is before torch.jit.script or torch.jit.trace.",
        )
    for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
        if isinstance(tensor, UninitializedParameter | UninitializedBuffer):
            yield (
                f"its {name} has no shape before the first run (a lazy module).",
                "run the network once on an image in the factory, or name the number of channels.",
            )
        elif tensor.is_meta:
            yield (
                f"its {name} is on the meta device: it has a shape and no values.",
                "make the network on the CPU and load its weights in the factory, or give them with --weights.",
            )
        elif tensor.is_floating_point() and tensor.dtype != torch.float32:
            yield (
                f"its {name} is {str(tensor.dtype).removeprefix('torch.')}; the network that is compiled, and that "
                "engines are compared with, is float32.",
                "return net.float() from the factory; the type of the engine is chosen with --precision.",
            )
    hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    if not all(is_reparametrization(hook) for hook in hooks):
        yield (
            "it has a forward hook, which is no part of its definition and would be lost.",
            "do in forward what the hook does, or remove the hook in the factory.",
        )


def check_behaviour(model: nn.Module, images: Tensor, *, batched: bool) -> None:
    """Refuse a network whose outputs are no function of the image alone: no engine could be equal to it.

    Args:
        model: The network in evaluation mode; buffers that it changes are put back, parameters are not.
        images: Two different images, float32 `(2, C, H, W)`.
        batched: Whether more than one image at a time will be given to it.

    Raises:
        ModelError: If it cannot run, changes a buffer or a parameter, draws random numbers of Python's or NumPy's,
            returns something else when it is run again, or gives an image another answer when another one is in its
            batch.
    """
    sums, dice = _sums(model), _dice()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with _Types() as types:
        first = _run(model, images[:1])
    _check_types(types.seen)
    again = _run(model, images[:1])
    changed = [name for name, buffer in model.named_buffers() if not _equal(buffer, before[name])]
    for name in changed:
        model.get_buffer(name).copy_(before[name])
    for name in [*changed, *(name for name, total in _sums(model).items() if total != sums[name])]:
        path, _, attribute = name.rpartition(".")
        raise obstacle(
            HEADLINE,
            place_of_module(path, model.get_submodule(path)),
            f"forward changes its {attribute}: an engine has no state from one image to the next.",
            "keep what forward computes in local variables, or leave the change out when self.training is false.",
        )
    if dice != _dice():
        raise obstacle(
            HEADLINE,
            None,
            "forward draws a random number of Python's or NumPy's, and a graph would keep what came up once.",
            "draw it only in training: if self.training and random.random() < p.",
        )
    one, other = images[:1], images[1:]
    if not _equal_but_for_rounding(_sqnr_db(first, again), lambda: _sqnr_db(_run(model, one), _run(model, one))):
        raise obstacle(
            HEADLINE,
            None,
            "two runs on the same image give different logits.",
            "leave random numbers out of evaluation: F.dropout(x, training=self.training) or nn.Dropout, no rand or "
            "randn in forward; keep no state from one run to the next.",
        )
    if batched and not _equal_but_for_rounding(
        _sqnr_db(_joined(first, _run(model, other)), _run(model, images)),
        lambda: _sqnr_db(_joined(_run(model, one), _run(model, other)), _run(model, images)),
    ):
        raise obstacle(
            HEADLINE,
            None,
            "the logits of an image change when another image is in its batch.",
            "compute per image: no mean or normalisation over the first axis, no decision on x.shape[0]; "
            "or build for one image at a time (--batch 1).",
        )


def _check_types(seen: set[torch.dtype]) -> None:
    """Refuse a network that computes in a type of its own choice, as within `torch.autocast`."""
    low = seen & {torch.float16, torch.bfloat16}
    if low:
        raise obstacle(
            HEADLINE,
            None,
            f"forward computes in {' and '.join(str(kind).removeprefix('torch.') for kind in low)}.",
            "take torch.autocast, half() and the like out of forward; the engine's type is chosen with --precision.",
        )


class _Types(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the types of what operations make."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Execute an operation."""
        made = func(*args, **(kwargs or {}))
        if isinstance(made, Tensor):
            self.seen.add(made.dtype)
        return made


def _sums(model: nn.Module) -> dict[str, float]:
    """The sum of each parameter, by which a change shows without a copy of all weights."""
    with torch.no_grad():
        return {name: float(parameter.sum(dtype=torch.float64)) for name, parameter in model.named_parameters()}


def _dice() -> bytes:
    """What the next random numbers of Python and NumPy depend on."""
    return pickle.dumps((random.getstate(), np.random.get_state()))  # noqa: NPY002 - what old code draws from


def _joined(*runs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(torch.cat(outputs) for outputs in zip(*runs, strict=True))


def _run(model: nn.Module, images: Tensor) -> tuple[Tensor, ...]:
    """Its outputs, `(N, ...)`."""
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # said again when the network is compiled
            output = as_tuple(model(images.clone()))  # it may write into what it is given
    except Exception as error:  # the network's own code may fail in any way
        headline = f"The network cannot run on one input of shape {tuple(images.shape)}"
        raise running_error(model, error, headline) from error
    return output


def _equal(first: Tensor, second: Tensor) -> bool:
    return first.shape == second.shape and bool(torch.all((first == second) | ((first != first) & (second != second))))


def _equal_but_for_rounding(sqnr_db: float, measure: Callable[[], float]) -> bool:
    """Whether what differs is nothing but rounding.

    Args:
        sqnr_db: SQNR in float32.
        measure: Computes it again.
    """
    if sqnr_db >= EQUAL_DB:
        return True
    try:
        with InDouble():
            return measure() >= EQUAL_DB
    except ModelError:
        return sqnr_db >= ROUNDED_DB


def _sqnr_db(first: tuple[Tensor, ...], second: tuple[Tensor, ...]) -> float:
    """How far two runs agree; NaN and infinite outputs are reported elsewhere."""
    if not all(output.isfinite().all() for output in (*first, *second)):
        return EQUAL_DB
    if any(one.shape != other.shape for one, other in zip(first, second, strict=True)):
        return -EQUAL_DB
    return least_sqnr_db(*([output.numpy() for output in run] for run in (first, second)))
