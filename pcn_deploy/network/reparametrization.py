"""Weights that are computed in every run, as by weight_norm, spectral_norm or pruning: computed once for the engine."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm


def is_reparametrization(hook: Any) -> bool:
    """Whether a forward pre-hook is one of torch's that compute a weight."""
    return isinstance(hook, WeightNorm | SpectralNorm | BasePruningMethod)


def fuse_reparametrizations(model: nn.Module, _images: Tensor | None = None) -> int:
    """Replace each weight that is computed from others by its value, in place.

    Both of torch's mechanisms are known: `torch.nn.utils.parametrize`, and the forward pre-hooks of the older
    `weight_norm`, `spectral_norm` and of `prune`.

    Args:
        model: Network in evaluation mode.

    Returns:
        Number of weights.
    """
    fused = 0
    for module in list(model.modules()):
        for key, hook in [each for each in module._forward_pre_hooks.items() if is_reparametrization(each[1])]:
            hook.remove(module)  # type: ignore[attr-defined] # of torch's, which have it
            del module._forward_pre_hooks[key]
            fused += 1
        if parametrize.is_parametrized(module):
            names = [name for name, _ in module.get_submodule("parametrizations").named_children()]
            values = {name: getattr(module, name).detach().clone() for name in names}
            # torch's remove_parametrizations would change the class, which a copy shares with its original
            del module._modules["parametrizations"]
            module.__class__ = type(module).__bases__[0]
            for name, value in values.items():
                module.register_parameter(name, nn.Parameter(value))
            fused += len(values)
    model.requires_grad_(requires_grad=False)
    return fused
