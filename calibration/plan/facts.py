"""Look at a network as the planner sees it: one forward pass, the shapes of every layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from pcn_deploy.calibration.plan.rules import RESIDUAL_ADD, LayerFacts
from pcn_deploy.network.dataflow import DataFlow, Product, is_plain_layer
from pcn_deploy.network.hooks import hooked
from pcn_deploy.network.lifting import hidden_products

NAMED_PLACES = 4
"""Places of hidden products that a note names."""


def inspect_layers(model: nn.Module, example: Tensor) -> list[LayerFacts]:
    """Run the network once and collect the facts of every layer that was executed.

    Args:
        model: The deploy form, in evaluation mode.
        example: One image, `(1, C, H, W)`.

    Returns:
        One entry per executed leaf module that computes something, in the order of their first execution.

    """
    return survey(model, example, places=False)[0]


def survey(model: nn.Module, example: Tensor, *, places: bool) -> tuple[list[LayerFacts], list[Product]]:
    """What `inspect_layers` tells, and the products of activations with constants that no layer owns, by one run.

    With `places`, each product has its line in the code.
    """
    facts: dict[str, LayerFacts] = {}

    def hook(path: str) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        def record(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            facts[path] = _facts(path, module, output)

        return record

    leaves = [(path, module) for path, module in model.named_modules() if path and _is_layer(module)]
    with hooked(module.register_forward_hook(hook(path)) for path, module in leaves):
        flow = DataFlow(model, example, places=places)
    return [_in_its_place(layer, flow) for layer in facts.values()], hidden_products(model, flow)


def note_hidden_products(products: list[Product], remainder: str) -> tuple[str, ...]:
    """Say which products of activations with constants no layer owns, so that they stay in the remainder's type.

    Products with a single vector are not mentioned: as layers they would stay in that type too.
    """
    hidden = [product for product in products if not product.is_vector]
    places = dict.fromkeys(str(product.place or product.path).replace("\n   ", "") for product in hidden)
    if not places:
        return ()
    some = "; ".join(list(places)[:NAMED_PLACES])
    more = f" and {len(places) - NAMED_PLACES} more places" if len(places) > NAMED_PLACES else ""
    told = "1 product is no layer and stays" if len(hidden) == 1 else f"{len(hidden)} products are no layers and stay"
    return (f"{told} in {remainder}: {some}{more}.",)


def _in_its_place(layer: LayerFacts, flow: DataFlow) -> LayerFacts:
    """A layer with how often it is called, and what is around it."""
    calls = flow.calls[layer.path]
    inputs = calls[0].inputs
    layer = replace(layer, uses=len(calls), reads_image=bool(inputs) and inputs[0].origin is flow.image)
    return _with_sides(layer, flow) if layer.kind == RESIDUAL_ADD else layer


def _with_sides(layer: LayerFacts, flow: DataFlow) -> LayerFacts:
    """A residual addition with the layer that made its branch, and those that make or read its identity."""
    branch, identity = flow.calls[layer.path][0].inputs
    origin = identity.origin
    around = dict.fromkeys((origin.maker, *origin.readers, *identity.readers))
    return replace(layer, branch=branch.maker, identity=tuple(path for path in around if path))


def _is_layer(module: nn.Module) -> bool:
    """Whether the planner decides on it: a module without parts, or a layer that was given parts, such as a padding."""
    if isinstance(module, nn.Identity):
        return False
    return isinstance(module, nn.Conv2d | nn.Linear) or not any(module.children())


def _facts(path: str, module: nn.Module, output: Any) -> LayerFacts:
    kind = type(module).__name__
    if not isinstance(output, Tensor):
        return LayerFacts(path=path, kind=kind)
    # a subclass with a forward of its own may do more than its base class: it is no plain layer
    if isinstance(module, nn.Conv2d) and is_plain_layer(module):
        return LayerFacts(
            path=path,
            kind=kind,
            rows=output.shape[2] * output.shape[3],
            in_channels=module.in_channels,
            out_channels=module.out_channels,
            groups=module.groups,
            kernel=(module.kernel_size[0], module.kernel_size[1]),
        )
    if isinstance(module, nn.Linear) and is_plain_layer(module):
        return LayerFacts(
            path=path,
            kind=kind,
            rows=output.shape[:-1].numel(),
            in_channels=module.in_features,
            out_channels=module.out_features,
        )
    return LayerFacts(path=path, kind=kind, own_forward=isinstance(module, nn.Conv2d | nn.Linear))
