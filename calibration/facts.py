"""Look at a network as the planner sees it: one forward pass, the shapes of every layer."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from pcn_deploy.calibration.plan import LayerFacts
from pcn_deploy.models.hooks import hooked
from pcn_deploy.models.layers import ResidualAdd


def inspect_layers(model: nn.Module, example: Tensor) -> list[LayerFacts]:
    """Run the network once and collect the facts of every layer that was executed.

    Args:
        model: The deploy form, in evaluation mode.
        example: One image, `(1, C, H, W)`.

    Returns:
        One entry per executed leaf module that computes something, in the order of their first execution.

    """
    facts: dict[str, LayerFacts] = {}
    uses: Counter[int] = Counter()
    makers = _Makers()

    def hook(path: str) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        def record(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            weight = getattr(module, "weight", None)
            uses[id(weight)] += weight is not None
            facts[path] = _facts(path, module, output, bool(inputs) and inputs[0] is example)
            if isinstance(module, ResidualAdd):
                facts[path] = replace(facts[path], branch=makers.of(inputs[0]))
            makers.note(path, inputs, output)

        return record

    leaves = [(path, module) for path, module in model.named_modules() if path and _is_layer(module)]
    with hooked(module.register_forward_hook(hook(path)) for path, module in leaves), torch.inference_mode():
        model(example)
    weights = {path: id(getattr(model.get_submodule(path), "weight", None)) for path in facts}
    return [replace(layer, uses=max(1, uses[weights[path]])) for path, layer in facts.items()]


class _Makers:
    """Which layer made a tensor."""

    def __init__(self) -> None:
        self._paths: dict[int, tuple[weakref.ref[Tensor], str]] = {}

    def note(self, path: str, inputs: tuple[Any, ...], output: Any) -> None:
        """Remember a layer's output, unless the layer only passes its input on."""
        if isinstance(output, Tensor) and not any(output is tensor for tensor in inputs):
            self._paths[id(output)] = (weakref.ref(output), path)

    def of(self, tensor: Any) -> str:
        """Name of the layer that made it, or an empty string."""
        known, path = self._paths.get(id(tensor), (None, ""))
        return path if known is not None and known() is tensor else ""


def _is_layer(module: nn.Module) -> bool:
    """Whether the planner decides on it: a module without parts, or a layer that was given parts, such as a padding."""
    if isinstance(module, nn.Identity):
        return False
    return isinstance(module, nn.Conv2d | nn.Linear) or not any(module.children())


def _has_forward_of(module: nn.Module, kind: type[nn.Module], *methods: str) -> bool:
    """Whether neither a subclass nor the instance has other methods."""
    return all(getattr(type(module), name) is getattr(kind, name) and name not in vars(module) for name in methods)


def _facts(path: str, module: nn.Module, output: Any, reads_image: bool) -> LayerFacts:
    kind = type(module).__name__
    if not isinstance(output, Tensor):
        return LayerFacts(path=path, kind=kind)
    # a subclass with a forward of its own may do more than its base class: it is no plain layer
    if isinstance(module, nn.Conv2d) and _has_forward_of(module, nn.Conv2d, "__call__", "forward", "_conv_forward"):
        return LayerFacts(
            path=path,
            kind=kind,
            rows=output.shape[2] * output.shape[3],
            in_channels=module.in_channels,
            out_channels=module.out_channels,
            groups=module.groups,
            kernel=(module.kernel_size[0], module.kernel_size[1]),
            reads_image=reads_image,
        )
    if isinstance(module, nn.Linear) and _has_forward_of(module, nn.Linear, "__call__", "forward"):
        return LayerFacts(
            path=path,
            kind=kind,
            rows=output.shape[:-1].numel(),
            in_channels=module.in_features,
            out_channels=module.out_features,
            reads_image=reads_image,
        )
    return LayerFacts(path=path, kind=kind, own_forward=isinstance(module, nn.Conv2d | nn.Linear))
