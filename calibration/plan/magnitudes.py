"""What every operation reads and makes, in magnitude: a few images, one forward pass."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from pcn_deploy.calibration.plan.rules import LayerFacts
from pcn_deploy.network.hooks import hooked

MAX_IMAGES = 16
_GIGA_MACS = 8.0
"""Products that an observation may cost, in 10^9: a fraction of a second on two CPU cores."""


@dataclass(kw_only=True)
class Magnitudes:
    """Magnitudes at the operations that one module does itself, without those of its parts.

    Attributes:
        activation: Largest finite magnitude that they read or make.
        output: Largest finite magnitude that they make.
    """

    activation: float = 0.0
    output: float = 0.0


def affordable_images(layers: Iterable[LayerFacts]) -> int:
    """How many images to observe: fewer for a large network, between 1 and `MAX_IMAGES`."""
    macs = sum(
        layer.rows * layer.out_channels * layer.in_channels // layer.groups * layer.kernel[0] * layer.kernel[1]
        for layer in layers
    )
    return max(1, min(MAX_IMAGES, int(_GIGA_MACS * 1e9 / max(macs, 1))))


def observe_magnitudes(model: nn.Module, images: npt.NDArray[np.float32]) -> dict[str, Magnitudes]:
    """Run images through the network and note the magnitudes at every module that was executed.

    Infinite values are left out: a mask of -inf is as good in any type. The statistics of a normalisation are left out
    too, since every engine keeps them in FP32.

    Args:
        model: The deploy form, in evaluation mode.
        images: float32 `(N, C, H, W)`.

    Returns:
        One entry per module, by name; that of the network itself is an empty string.
    """
    observer = _Observer(model)
    hooks = (hook for path, module in model.named_modules() for hook in observer.follow(path, module))
    with hooked(hooks), torch.no_grad(), observer:
        model(torch.tensor(images))
    return observer.magnitudes


class _Observer(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees every operation, and knows which module does it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.magnitudes: dict[str, Magnitudes] = {}
        self._stack: list[str] = []
        self._known: dict[int, tuple[weakref.ref[Tensor], float]] = {}
        for weight in (*model.parameters(), *model.buffers()):
            self._note(weight, 0.0)  # weights are judged by their values, not as activations

    def follow(self, path: str, module: nn.Module) -> Iterable[Any]:
        """Hooks that keep track of the module at work."""

        def enter(_module: nn.Module, _inputs: Any) -> None:
            self._stack.append(path)

        def leave(_module: nn.Module, _inputs: Any, _outputs: Any) -> None:
            self._stack.pop()

        return module.register_forward_pre_hook(enter), module.register_forward_hook(leave)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Execute an operation and note what it reads and makes."""
        outputs = func(*args, **(kwargs or {}))
        if not self._stack:
            return outputs
        read = [tensor for tensor in _tensors((*args, *(kwargs or {}).values())) if tensor.is_floating_point()]
        first = outputs[0] if isinstance(outputs, tuple) else outputs  # the others are statistics and indices
        made = [tensor for tensor in _tensors((first,)) if tensor.is_floating_point()]
        returned = func._schema.returns
        alias = returned[0].alias_info if returned else None
        if alias is not None and not alias.is_write and read:  # a view: nothing is computed
            for tensor in made:
                self._note(tensor, self._lookup(read[0]))
            return outputs
        seen = self.magnitudes.setdefault(self._stack[-1], Magnitudes())
        amax_read = [self._lookup(tensor) for tensor in read]
        for tensor in made:
            amax = _amax(tensor)
            self._note(tensor, amax)
            seen.output = max(seen.output, amax)
        seen.activation = max(seen.activation, seen.output, *amax_read, 0.0)
        return outputs

    def _note(self, tensor: Tensor, amax: float) -> None:
        self._known[id(tensor)] = (weakref.ref(tensor), amax)

    def _lookup(self, tensor: Tensor) -> float:
        """The magnitude of a tensor."""
        reference, amax = self._known.get(id(tensor), (None, 0.0))
        if reference is None or reference() is not tensor:
            amax = _amax(tensor)
            self._note(tensor, amax)
        return amax


def _tensors(values: Iterable[Any]) -> list[Tensor]:
    tensors: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            tensors.append(value)
        elif isinstance(value, list | tuple):
            tensors += _tensors(value)
    return tensors


def _amax(tensor: Tensor) -> float:
    """Largest finite magnitude; 0 if there is none."""
    if tensor.numel() == 0:
        return 0.0
    low, high = torch.aminmax(tensor.detach())
    amax = max(-float(low), float(high))
    if math.isfinite(amax):
        return amax
    finite = tensor[tensor.isfinite()]
    return float(finite.abs().max()) if finite.numel() else 0.0
