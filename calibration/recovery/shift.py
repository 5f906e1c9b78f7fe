"""Move ranges across links: propose factors, judge each by the error it leaves, apply the best.

The network computes the same; only what rounding to INT8 costs changes. Every candidate is judged by the layers that
read the link, rounded to INT8, on calibration images, and "no factor" is a candidate too, so a link is changed only
where that lowers their error.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pcn_deploy.calibration.collect import BATCH
from pcn_deploy.calibration.quantized import quantize_weight
from pcn_deploy.calibration.recovery.links import (
    Link,
    divide_outputs,
    find_links,
    multiply_inputs,
    per_input_channel,
)
from pcn_deploy.calibration.weights import QMAX
from pcn_deploy.data.images import ImageSource
from pcn_deploy.data.passes import each_batch
from pcn_deploy.network.hooks import hooked
from pcn_deploy.progress import Progress

JUDGES = 32
"""Images that judge the candidates; the largest magnitudes are taken from all images."""

FLOOR = 1e-3
"""A channel whose range is below this share of the largest counts as if it had it: no factor is 0 or infinite, and a
channel that is dead on the calibration images is not blown up without bound."""

SHARES = (1.0, 0.8, 0.6, 0.45, 0.35)
"""Ranges that a candidate is judged at, as shares of the largest magnitude: the calibrator may clip, and the best of
them stands for its choice."""

GAIN = 0.99
"""A link is changed only if the error falls below this share of what it was; less is noise."""

Layers = list[nn.Module]
Propose = Callable[[Layers, Layers, Tensor], list[Tensor]]
"""From producers, INT8 readers and largest magnitude per channel `(C,)` to factors `(C,)`, positive and finite."""


@dataclass
class _Site:
    """A link that INT8 layers read, and what is known of it."""

    link: Link
    readers: tuple[str, ...]
    amax: Tensor = field(default_factory=lambda: torch.zeros(1))
    factors: list[Tensor] = field(default_factory=list)
    error: Tensor = field(default_factory=lambda: torch.zeros(1))


def shift_ranges(
    model: nn.Module,
    layers: Collection[str],
    source: ImageSource,
    propose: Propose,
    producers: tuple[type[nn.Module], ...],
    progress: Progress,
    step: str,
) -> int:
    """Change the links whose INT8 readers then lose less.

    Args:
        model: The deploy form; weights are replaced in it, not changed in place.
        layers: Names of the layers that will be INT8.
        source: Calibration images.
        propose: Makes the candidates of a link.
        producers: Kinds of producer to consider.
        progress: Told the number of images done.
        step: Name of the step for `progress`.

    Returns:
        How many INT8 layers read a changed tensor.
    """
    sites = []
    for link in find_links(model, source.transform.shape):
        readers = tuple(path for path in link.readers if path in layers)
        if readers and all(isinstance(model.get_submodule(path), producers) for path in link.producers):
            sites.append(_Site(link, readers))
    if not sites:
        return 0
    _watch(model, sites, source, _see_amax, progress, f"{step}: ranges")
    for site in sites:
        if float(site.amax.max()) > 0:
            made, read = _modules(model, site.link.producers), _modules(model, site.readers)
            ones = torch.ones(len(site.amax))
            site.factors = [ones, *(_keep_peak(factor, site.amax) for factor in propose(made, read, site.amax))]
            site.error = torch.zeros(len(site.factors), len(SHARES), dtype=torch.float64)
    sites = [site for site in sites if site.factors]
    _watch(model, sites, source.subset(JUDGES), _see_error, progress, f"{step}: search")
    return sum(_apply_best(model, site) for site in sites)


def balance(first: Tensor, second: Tensor, alpha: float = 0.5) -> Tensor:
    """Factors `first**alpha / second**(1 - alpha)` of two ranges per channel `(C,)`, neither of them all zero."""
    first, second = (ranges.clamp(min=FLOOR * float(ranges.max())) for ranges in (first, second))
    return first**alpha / second ** (1 - alpha)


def _keep_peak(factor: Tensor, amax: Tensor) -> Tensor:
    """The same factor times a number: the largest magnitude of the tensor stays, so that FP16 holds it as before."""
    return factor * ((amax / factor).max() / amax.max())


def reader_range(readers: Layers) -> Tensor:
    """Largest weight per input channel of layers that read one tensor, `(C,)`."""
    ranges = []
    for layer in readers:
        weight: Tensor = layer.weight.detach()  # type: ignore[operator]
        groups = layer.groups if isinstance(layer, nn.Conv2d) else 1
        by_group = weight.abs().reshape(groups, len(weight) // groups, weight.shape[1], -1)
        ranges.append(by_group.amax((1, 3)).flatten())
    return torch.stack(ranges).amax(0)


def _modules(model: nn.Module, paths: Collection[str]) -> Layers:
    return [model.get_submodule(path) for path in paths]


def _watch(
    model: nn.Module,
    sites: list[_Site],
    source: ImageSource,
    see: Callable[[_Site, Any, Tensor], None],
    progress: Progress,
    step: str,
) -> None:
    """Run the images; `see` gets the site, the layer and its input for each INT8 reader."""

    def hook(site: _Site) -> Any:
        return lambda layer, inputs: see(site, layer, inputs[0])

    handles = (
        model.get_submodule(path).register_forward_pre_hook(hook(site)) for site in sites for path in site.readers
    )
    with hooked(handles), torch.inference_mode():
        for images, _ in each_batch(source, BATCH, step, progress):
            model(torch.tensor(images))


def _see_amax(site: _Site, layer: nn.Module, x: Tensor) -> None:
    channels_first = x if isinstance(layer, nn.Linear) else x.movedim(1, -1)
    site.amax = torch.maximum(site.amax, channels_first.flatten(0, -2).abs().amax(0))


def _see_error(site: _Site, layer: nn.Conv2d | nn.Linear, x: Tensor) -> None:
    exact = _run(layer, x, layer.weight)
    signal = exact.double().square().sum() + torch.finfo(torch.float32).tiny
    for index, factor in enumerate(site.factors):
        shaped = factor if isinstance(layer, nn.Linear) else factor[:, None, None]
        scale = float((site.amax / factor).max()) / QMAX
        weight = layer.weight * per_input_channel(layer, factor)
        amax = weight.abs().flatten(1).amax(1)
        weight = quantize_weight(weight, torch.where(amax > 0, amax, QMAX) / QMAX)
        for position, share in enumerate(SHARES):
            rounded = torch.fake_quantize_per_tensor_affine(x / shaped, share * scale, 0, -QMAX - 1, QMAX)
            site.error[index, position] += (_run(layer, rounded, weight) - exact).double().square().sum() / signal


def _run(layer: nn.Conv2d | nn.Linear, x: Tensor, weight: Tensor) -> Tensor:
    if isinstance(layer, nn.Linear):
        return F.linear(x, weight)
    output: Tensor = layer._conv_forward(x, weight, None)
    return output


def _apply_best(model: nn.Module, site: _Site) -> int:
    """Returns how many INT8 layers changed."""
    error = site.error.amin(1)
    best = int(error.argmin())
    if not float(error[best]) < GAIN * float(error[0]):
        return 0
    divide_outputs(_modules(model, site.link.producers), site.factors[best])
    for path in site.link.readers:
        multiply_inputs(model.get_submodule(path), site.factors[best])  # type: ignore[arg-type]
    return len(site.readers)
