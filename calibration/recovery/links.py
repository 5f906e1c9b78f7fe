"""Where a factor per channel can move from the input of layers into whatever produces it, exactly.

A link is a tensor with one producer whose rows can be scaled (convolution, linear layer or the affine part of a
normalisation) and readers whose columns can be scaled back (convolutions and linear layers); in between there may be
operations with f(s x) = s f(x) for every s > 0 that keep the channels apart. Links are found in the data flow; a
network that cannot be traced symbolically has none.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from pcn_deploy.models.aggregation import TokenBlock
from pcn_deploy.models.attention_conv import AttentionAugmentedConv2d, RelativeSelfAttention2d
from pcn_deploy.models.layers import LayerNorm2d
from pcn_deploy.network.symbolic import trace

log = logging.getLogger(__name__)

CHANNELS_SECOND: tuple[type[nn.Module], ...] = (nn.Conv2d, LayerNorm2d, nn.BatchNorm2d, AttentionAugmentedConv2d)
CHANNELS_LAST: tuple[type[nn.Module], ...] = (nn.Linear, nn.LayerNorm)
READERS = (nn.Conv2d, nn.Linear, AttentionAugmentedConv2d)

HOMOGENEOUS_MODULES = (nn.ReLU, nn.LeakyReLU, nn.Identity, nn.Dropout, nn.Dropout2d)
HOMOGENEOUS_FUNCTIONS: tuple[Callable[..., Any], ...] = (F.relu, torch.relu, F.leaky_relu)
POOLING_MODULES = (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d)
POOLING_FUNCTIONS: tuple[Callable[..., Any], ...] = (F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d)
HOMOGENEOUS_METHODS = ("relu", "contiguous")


@dataclass(frozen=True)
class Link:
    """One tensor, by the names of the modules around it.

    Attributes:
        producers: What makes it; the channels of several are concatenated.
        readers: Every layer that reads it.
    """

    producers: tuple[str, ...]
    readers: tuple[str, ...]


def _is_leaf(module: nn.Module, path: str) -> bool:
    """Whether a module is one node of the trace: torch's, our normalisation, and attention."""
    ours = AttentionAugmentedConv2d | RelativeSelfAttention2d | TokenBlock | LayerNorm2d
    return isinstance(module, ours) or fx.Tracer().is_leaf_module(module, path)


def find_links(model: nn.Module, shape: tuple[int, int, int]) -> list[Link]:
    """The links of a network in evaluation mode, in the order of their producers, for images of one shape (C, H, W)."""
    try:
        graph = trace(model, shape, _is_leaf).graph
    except Exception as error:  # the network's own code may fail in any way
        log.debug("no factor can move, the network cannot be traced: %s", error)
        return []
    return list(_Flow(model, graph).links())


class _Flow:
    """The data flow of one network."""

    def __init__(self, model: nn.Module, graph: fx.Graph) -> None:
        self._modules = dict(model.named_modules())
        self._nodes = list(graph.nodes)
        self._calls = Counter(str(node.target) for node in self._nodes if node.op == "call_module")
        # a weight that the network's own code reads cannot be scaled behind its back
        self._read = {str(node.target).rpartition(".")[0] for node in self._nodes if node.op == "get_attr"}
        self._uses = Counter(
            id(tensor) for module in self._modules.values() for tensor in module.parameters(recurse=False)
        )

    def links(self) -> Iterator[Link]:
        for node in self._nodes:
            producer = self._module(node)
            if producer is None or not self._can_scale(node, producer):
                continue
            readers = list(self._readers(node, last=type(producer) in CHANNELS_LAST))
            if readers and None not in readers:
                parts = _parts(str(node.target), producer, ("conv_out", "attention.attn_out"))
                yield Link(parts, tuple(path for paths in readers if paths for path in paths))

    def _module(self, node: fx.Node) -> nn.Module | None:
        return self._modules[str(node.target)] if node.op == "call_module" else None

    def _can_scale(self, node: fx.Node, module: nn.Module) -> bool:
        """Whether it has weights of its own, per channel, that nothing else uses. Exact types: no subclass."""
        path = str(node.target)
        if type(module) not in (*CHANNELS_SECOND, *CHANNELS_LAST) or self._calls[path] > 1:
            return False
        if isinstance(module, nn.LayerNorm) and len(module.normalized_shape) != 1:
            return False
        inner = {f"{path}.{name}" if name else path for name, _ in module.named_modules()}
        own = isinstance(module, AttentionAugmentedConv2d) or isinstance(module._parameters.get("weight"), Tensor)
        used_once = all(self._uses[id(tensor)] == 1 for tensor in module.parameters())
        return own and used_once and not inner & self._read

    def _readers(self, node: fx.Node, *, last: bool) -> Iterator[tuple[str, ...] | None]:
        """The names of each layer that reads a node's output; None for a reader that cannot be scaled."""
        for user in node.users:
            module = self._module(user)
            if _is_homogeneous(user, module, last=last):
                yield from self._readers(user, last=last)
            elif (
                module is not None
                and type(module) in READERS
                and (type(module) in CHANNELS_LAST) == last
                and self._can_scale(user, module)
            ):
                yield _parts(str(user.target), module, ("conv_out", "attention.conv_qkv"))
            else:
                yield None


def _parts(path: str, module: nn.Module, names: tuple[str, ...]) -> tuple[str, ...]:
    """The layer itself, or the layers of an augmented convolution on that side."""
    return tuple(f"{path}.{name}" for name in names) if isinstance(module, AttentionAugmentedConv2d) else (path,)


def _is_homogeneous(node: fx.Node, module: nn.Module | None, *, last: bool) -> bool:
    """Whether f(s x) = s f(x) for s > 0, per channel; pooling mixes the last axis."""
    modules = HOMOGENEOUS_MODULES if last else (*HOMOGENEOUS_MODULES, *POOLING_MODULES)
    functions = HOMOGENEOUS_FUNCTIONS if last else (*HOMOGENEOUS_FUNCTIONS, *POOLING_FUNCTIONS)
    if node.op == "call_method":
        return node.target in HOMOGENEOUS_METHODS
    return type(module) in modules or (node.op == "call_function" and node.target in functions)


def input_channels(layer: nn.Module) -> int:
    """Columns of a convolution or linear layer."""
    return layer.in_channels if isinstance(layer, nn.Conv2d) else int(layer.weight.shape[1])  # type: ignore[index]


def per_input_channel(layer: nn.Conv2d | nn.Linear, factor: Tensor) -> Tensor:
    """A factor `(C_in,)` in a shape that multiplies the weight of the layer."""
    if isinstance(layer, nn.Linear):
        return factor
    by_group = factor.reshape(layer.groups, 1, -1).expand(-1, layer.out_channels // layer.groups, -1)
    return by_group.reshape(layer.out_channels, -1, 1, 1)


def divide_outputs(producers: list[nn.Module], factor: Tensor) -> None:
    """Divide what the producers make, `(C,)` channels together, by a factor; weights are replaced, not changed."""
    start = 0
    for layer in producers:
        rows = len(layer.weight)  # type: ignore[arg-type]
        part = factor[start : start + rows]
        start += rows
        for name in ("weight", "bias"):
            tensor = layer._parameters.get(name)
            if tensor is not None:
                shaped = part.reshape(-1, *[1] * (tensor.ndim - 1))
                setattr(layer, name, nn.Parameter(tensor.detach() / shaped, requires_grad=False))


def multiply_inputs(layer: nn.Conv2d | nn.Linear, factor: Tensor) -> None:
    """Multiply the columns `(C_in,)` of a layer by a factor; its weight is replaced, not changed."""
    weight = layer.weight.detach() * per_input_channel(layer, factor)
    layer.weight = nn.Parameter(weight, requires_grad=False)
