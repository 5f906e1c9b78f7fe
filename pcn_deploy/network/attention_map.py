"""The attention map as a second output of a network with attention-based aggregation.

The network may be ours or the user's own, with an `AttentionPool2d` in it. Only the modules around the aggregation are
traced; whatever else the network does stays as it is.
"""

from __future__ import annotations

import operator
from collections.abc import Callable

import torch
from torch import Tensor, fx, nn

from pcn_deploy.errors import ModelError
from pcn_deploy.models.aggregation import TokenBlock
from pcn_deploy.network.diagnosis.report import running_error
from pcn_deploy.network.outputs import as_tuple
from pcn_deploy.network.symbolic import trace

_TOLERANCE = 1e-3  # relative and absolute; the same operations in the same order differ by rounding at most
_WITHOUT = "The network may still build without --with-attention-map."


def find_token_block(model: nn.Module) -> str:
    """Name of the block that makes the map.

    Raises:
        ModelError: If there is none, or more than one.
    """
    paths = [str(path) for path, module in model.named_modules() if isinstance(module, TokenBlock)]
    if not paths:
        msg = (
            "The network holds no attention-based aggregation, so there is no attention map. Leave "
            "--with-attention-map out, or replace its average pooling by "
            "pcn_deploy.models.aggregation.AttentionPool2d and train it."
        )
        raise ModelError(msg)
    if len(paths) > 1:
        msg = (
            f"The network holds {len(paths)} attention-based aggregations ({', '.join(paths)}); an attention map "
            "needs exactly one. Leave --with-attention-map out."
        )
        raise ModelError(msg)
    return paths[0]


def output_attention_map(model: nn.Module, shape: tuple[int, int, int]) -> nn.Module:
    """Make the attention map the last output.

    Args:
        model: A network that returns a tensor or a tuple of them, and holds one attention-based aggregation; left as
            it is.
        shape: C, H and W of the images, in pixels: what the code around the aggregation decides by them is decided.

    Returns:
        A network with the same modules under the same names that returns its outputs and the map `(N, T, H, W)`: the
        weight of each position of the last feature map, for each of T class tokens.

    Raises:
        ModelError: If there is no such aggregation, or the code around it cannot be traced.
    """
    path = find_token_block(model)
    headline = f"The attention map of {path} cannot be made an output"
    try:
        traced = trace(model, shape, lambda _module, name: not path.startswith(f"{name}."))
    except Exception as error:  # the network's own code may fail in any way
        msg = f"{running_error(model, error, headline)}\n{_WITHOUT}"
        raise ModelError(msg) from error
    graph = traced.graph
    calls = [node for node in graph.nodes if node.op == "call_module" and node.target == path]
    (result,) = (node for node in graph.nodes if node.op == "output")
    if len(calls) != 1:
        msg = f"{path} is executed {len(calls)} times for one image; an attention map needs exactly one. {_WITHOUT}"
        raise ModelError(msg)
    with graph.inserting_before(result):
        attention_map = graph.call_function(operator.getitem, (calls[0], 1))
    returned = result.args[0]
    result.args = ((*(returned if isinstance(returned, tuple) else (returned,)), attention_map),)
    traced.recompile()
    mapped = _plain_module(traced).eval()
    _check_same(model, mapped, shape, headline)
    return mapped


def _check_same(model: nn.Module, mapped: nn.Module, shape: tuple[int, int, int], headline: str) -> None:
    """Compare the trace with the network on noise: code that asks what a tensor *is* goes another way for a symbol.

    Raises:
        ModelError: If they differ.
    """
    images = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted_outputs = with_attention_map(model)(images)
        if len(wanted_outputs[-1]) != len(images):
            msg = (
                f"{headline}: there are {len(wanted_outputs[-1])} maps for {len(images)} images. The network puts "
                f"several views of an image into one batch. {_WITHOUT}"
            )
            raise ModelError(msg)
        pairs = zip(wanted_outputs, mapped(images), strict=True)
        same = all(torch.allclose(traced, wanted, rtol=_TOLERANCE, atol=_TOLERANCE) for wanted, traced in pairs)
    if not same:
        msg = (
            f"{headline}: its symbolic trace gives other numbers than the network itself. The modules around "
            "it contain randomness, or code that asks for the type of a tensor.\n"
            f"Way round: take isinstance, type(...), torch.is_tensor and try out of their forward. {_WITHOUT}"
        )
        raise ModelError(msg)


def _plain_module(traced: fx.GraphModule) -> nn.Module:
    """A module with the children and the generated code of a traced one.

    The exporter takes the place of an operation in a traced module from the trace, which ends at its leaves; in a plain
    module it sees every child.
    """
    plain: nn.Module = type("WithAttentionMap", (nn.Module,), {"forward": type(traced).forward})()
    for name, child in traced.named_children():
        plain.add_module(name, child)
    for name, parameter in traced.named_parameters(recurse=False):
        plain.register_parameter(name, parameter)
    for name, buffer in traced.named_buffers(recurse=False):
        plain.register_buffer(name, buffer)
    return plain


def with_attention_map(model: nn.Module) -> Callable[[Tensor], tuple[Tensor, ...]]:
    """The network as a function to its outputs and the map, by observing it as it runs: the reference for engines.

    Raises:
        ModelError: If there is no such aggregation.
    """
    block = model.get_submodule(find_token_block(model))

    def forward(images: Tensor) -> tuple[Tensor, ...]:
        maps: list[Tensor] = []
        with block.register_forward_hook(lambda _module, _inputs, output: maps.append(output[1])):
            outputs = as_tuple(model(images))
        return (*outputs, maps[-1])

    return forward
