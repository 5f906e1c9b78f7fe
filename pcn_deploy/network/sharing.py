"""Copies of networks that share their weights."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from pcn_deploy.network.diagnosis.report import obstacle


def share_weights(model: nn.Module) -> nn.Module:
    """Copy the modules of a network; the weights stay the same memory until one side is given new ones.

    Returns:
        The copy; its parameters need no gradient.

    Raises:
        ModelError: If it holds what cannot be copied.
    """
    memo: dict[int, object] = {id(buffer): buffer.detach() for buffer in model.buffers()}
    memo.update(
        (id(parameter), nn.Parameter(parameter.detach(), requires_grad=False)) for parameter in model.parameters()
    )
    for module in model.modules():  # what was computed from parameters cannot be copied with its history
        memo.update((id(value), value.detach()) for value in _computed(vars(module)))
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:  # whatever the copying of the network's attributes raises
        reason = f"an attribute cannot be copied ({type(error).__name__}: {error})."
        advice = "make locks, files and the like where they are needed, not in the network; keep tensors in buffers."
        msg = "The network cannot be compiled"
        raise obstacle(msg, None, reason, advice) from error


def tied_copy(module: nn.Module) -> nn.Module:
    """A copy of a module whose parameters and buffers are the same objects: one weight under two names."""
    memo: dict[int, object] = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    return copy.deepcopy(module, memo)


def _computed(value: Any) -> Iterator[Tensor]:
    """The tensors in an attribute that were computed from parameters, in containers too."""
    if isinstance(value, Tensor):
        if value.grad_fn is not None:
            yield value
    elif isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _computed(item)
