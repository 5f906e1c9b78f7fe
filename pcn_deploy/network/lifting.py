"""Make every product of a network a layer: what 8 bits can be decided on, and a scale given to, is a layer.

A network may also call functions on its parameters, subclass a layer, standardise weights in its forward, keep its
projections inside `nn.MultiheadAttention`, or call one layer several times. Such modules are traced on their own, and
get a forward in which each product is a `nn.Conv2d` or `nn.Linear` that is called once. A layer called several times
becomes one layer per call, of the same weight.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from pcn_deploy.network.calls import Calls, CallTrace
from pcn_deploy.network.dataflow import DataFlow, Product, is_plain_layer
from pcn_deploy.network.generated import module_of
from pcn_deploy.network.hooks import hooked
from pcn_deploy.network.multihead import plain_encoder, separate_attention
from pcn_deploy.network.products import Separation
from pcn_deploy.network.sharing import tied_copy

log = logging.getLogger(__name__)

EXACT_DB = 90.0
"""Least SQNR between a module and its lifted form: the same operations in float32, weights computed once."""

_ROUNDS = 4
"""Lifting may show more: a layer that a lifted module calls several times. Nothing needed more than two."""


def lift_products(model: nn.Module, images: Tensor) -> int:
    """Make products of activations with constants layers, in place.

    Args:
        model: Network in evaluation mode, without gradients.
        images: float32 `(N, C, H, W)`, one of which is run.

    Returns:
        Number of modules that were changed. A module whose code cannot be traced, or computes something else when it
        is lifted, is left as it is.
    """
    lifted = separate_all_attention(model) + _copy_repeated_parts(model)
    refused: set[str] = set()
    for _ in range(_ROUNDS):
        changed = _lift_once(model, images[:1], refused)
        lifted += changed
        if not changed:
            break
    return lifted


def separate_all_attention(model: nn.Module) -> int:
    """Replace each `nn.MultiheadAttention` by attention whose projections are layers, in place.

    So are torch's encoders, which would call none of these layers.
    """
    attentions = [module for module in model.modules() if type(module) is nn.MultiheadAttention]
    for attention in attentions:
        become(attention, separate_attention(attention).eval())
    for module in list(model.modules()):
        if (plain := plain_encoder(module)) is not None:
            become(module, plain.eval())
    return len(attentions)


def hidden_products(model: nn.Module, flow: DataFlow) -> list[Product]:
    """The products of an activation with a constant that no layer owns, so that none can be in 8 bits."""
    return [product for product in flow.products if not is_plain_layer(model.get_submodule(product.path))]


def become(module: nn.Module, other: nn.Module) -> None:
    """Turn a module into another one, wherever it is held."""
    module.__class__ = other.__class__
    module.__dict__ = dict(vars(other))  # not shared: CPython 3.13 collects what it holds with the other module


def _lift_once(model: nn.Module, image: Tensor, refused: set[str]) -> int:
    flow = DataFlow(model, image.clone())
    repeated = _callers_of_repeated(model, flow)
    hidden = {product.path for product in hidden_products(model, flow)}
    norms = {path for path, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)}
    hidden |= norms & flow.calls.keys()  # so that one that ends in an activation can be folded
    wanted = [path for path in sorted(hidden | repeated.keys()) if path not in refused and is_open(model, path)]
    if not wanted:
        return 0
    forms = lifted_forms(model, image, wanted, partial(_separate, model, repeated))
    refused.update(path for path in wanted if path not in forms)
    for path, form in forms.items():
        become(model.get_submodule(path), form)
    return len(forms)


def is_open(model: nn.Module, path: str) -> bool:
    """Whether the forward of a module is the network's own: neither torch's nor of this package, nor compiled."""
    module = model.get_submodule(path)
    kind = type(module)
    own = kind.__module__.split(".")[0] not in ("torch", "pcn_deploy")
    return own and not isinstance(module, torch.jit.ScriptModule)


def lifted_forms(
    model: nn.Module, image: Tensor, paths: list[str], change: Callable[[Separation, CallTrace, str], None]
) -> dict[str, nn.Module]:
    """Trace modules, change their traces, and make modules of them.

    Args:
        model: The network.
        image: One image, `(1, C, H, W)`.
        paths: The modules.
        change: Puts layers into a trace, given the path of its module too.

    Returns:
        What each module becomes; those that cannot be traced, into which no layer was put, or that compute something
        else afterwards are left out.
    """
    try:
        calls = Calls(model, (image.shape[1], image.shape[2], image.shape[3]), paths)
    except Exception as error:  # the network's own code, on tensors without data
        log.debug("Modules are left as they are: %r", error)
        return {}
    forms: dict[str, nn.Module] = {}
    for path in paths:
        module = model.get_submodule(path)
        try:
            trace = calls.trace(path, lambda _part, _path: True)
            separation = Separation(module, trace)
            change(separation, trace, path)
            if separation.layers:
                forms[path] = module_of(module, trace, separation.layers)
        except Exception as error:  # the network's own code, on symbols
            log.debug("%s is left as it is: %r", path or "The network", error)
    different = _differing(model, image, forms)
    return {path: form for path, form in forms.items() if path not in different}


def _separate(
    model: nn.Module, repeated: dict[str, set[str]], separation: Separation, trace: CallTrace, path: str
) -> None:
    """Separate the products in a trace, and its calls of one part."""
    separation.separate_products()
    # one call keeps the part under its name: the first in the module that holds it, else in the first that calls it
    shared = {id(model.get_submodule(part)): part for part in repeated.get(path, set())}
    kept: set[int] = set()
    for node in list(trace.graph.nodes):
        part = trace.held.get(str(node.target)) if node.op == "call_module" else None
        if part is None or id(part) not in shared:
            continue
        holder = shared[id(part)].rpartition(".")[0]
        callers = [caller for caller, parts in repeated.items() if shared[id(part)] in parts]
        owner = holder if holder in callers else min(callers)
        if id(part) in kept or path != owner:
            name = separation.name_for(str(node.target).replace(".", "_"))
            separation.layers[name] = tied_copy(part)
            node.target = name
        kept.add(id(part))


def _callers_of_repeated(model: nn.Module, flow: DataFlow) -> dict[str, set[str]]:
    """The modules that call a part which multiplies and is called more than once, with the paths of such parts."""
    working = {id(model.get_submodule(product.path)) for product in flow.products}
    callers: dict[str, set[str]] = {}
    for path, calls in flow.calls.items():
        if len(calls) > 1 and any(id(part) in working for part in model.get_submodule(path).modules()):
            for call in calls:
                callers.setdefault(call.caller, set()).add(path)
    return callers


def _copy_repeated_parts(model: nn.Module) -> int:
    """Where a sequence holds a module that is held before, give it a copy of the same weights."""
    copied, seen = 0, set[int]()
    for module in list(model.modules()):
        for name, part in list(module._modules.items()):
            again = part is not None and id(part) in seen and type(module) is nn.Sequential
            if part is not None and again and any(True for _ in part.parameters()):
                module._modules[name] = tied_copy(part)
                copied += 1
            seen.add(id(part))
    return copied


def _differing(model: nn.Module, image: Tensor, forms: dict[str, nn.Module]) -> set[str]:
    """The modules whose new form computes something else, or cannot run; by one run of the network."""
    different: set[str] = set()
    expected: list[Any] = []

    def before(form: nn.Module, path: str) -> Any:
        def run(_module: nn.Module, args: Any, kwargs: Any) -> None:
            try:
                copied = tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, (args, kwargs))
                expected.append(form(*copied[0], **copied[1]))
            except Exception as error:  # the network's own code, in another arrangement
                log.debug("%s cannot run with its products as layers: %r", path or "The network", error)
                expected.append(None)

        return run

    def after(path: str) -> Any:
        def compare(_module: nn.Module, _args: Any, output: Any) -> None:
            if not _equal(output, expected.pop()):
                different.add(path)

        return compare

    handles = [
        handle
        for path, form in forms.items()
        for handle in (
            model.get_submodule(path).register_forward_pre_hook(before(form, path), with_kwargs=True),
            model.get_submodule(path).register_forward_hook(after(path)),
        )
    ]
    with hooked(handles), torch.no_grad():
        model(image.clone())
    return different


def _equal(output: Any, again: Any) -> bool:
    first, second = (
        [leaf.double() for leaf in tree_leaves(each) if isinstance(leaf, Tensor)] for each in (output, again)
    )
    if type(output) is not type(again) or [tensor.shape for tensor in first] != [tensor.shape for tensor in second]:
        return False
    allowed = 10 ** (-EXACT_DB / 20)
    for expected, other in zip(first, second, strict=True):
        finite = expected.isfinite()
        if not torch.equal(expected[~finite].nan_to_num(), other[~finite].nan_to_num()):
            return False
        if (expected - other)[finite].norm() > allowed * expected[finite].norm():
            return False
    return True
