"""Weight rounding in the manner of GPTQ: each weight is rounded so that the error of those before it is made up for.

Rounding to nearest minimises the error of each weight; what counts is the error of the layer's output,
tr(E H E^T) with H = X X^T over the layer's quantised inputs X. Column after column is rounded, and the error
of each is spread over the columns not rounded yet by the inverse of H. A row keeps its nearest rounding where that
has the smaller output error.

Source: Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", arXiv
2210.17323, algorithm 1, with damping of 1 % of the mean diagonal (section 3.3, step 3); columns in the order of falling
diagonal, as in the authors' code ("act-order").
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pcn_deploy.calibration.collect import BATCH
from pcn_deploy.calibration.quantized import (
    QuantConv2d,
    Quantization,
    QuantLinear,
    apply_scales,
    quantize_weight,
)
from pcn_deploy.calibration.weights import QMAX
from pcn_deploy.data.images import ImageSource
from pcn_deploy.network.hooks import hooked
from pcn_deploy.progress import Progress, silent

IMAGES = 256
"""Images that the second moments are taken from, at most (`ImageSource.spread`)."""
POSITIONS = 256
"""Output positions of one image that count, at most, at an even distance."""
MEMORY = 2**28
"""Bytes of second moments held at a time; a larger network takes several runs."""
BLOCK = 128
"""Columns that are rounded before their errors reach the rest."""
DAMPING = 0.01

STEP = "Weight rounding"


def round_weights(
    model: nn.Module, scales: dict[str, Quantization], source: ImageSource, progress: Progress = silent
) -> int:
    """Round the weights of every INT8 layer to codes times scale.

    Args:
        model: The deploy form; weights are replaced in it, not changed in place. The new ones lie on the grid of
            `scales`, so that rounding them to nearest, as the graphs do, leaves them as they are.
        scales: Scales by the name of the layer, from `plan_scales`.
        source: Calibration images.
        progress: Told the number of layers done.

    Returns:
        How many layers have a weight that is not the nearest code.
    """
    changed = done = 0
    paths = [path for path in scales if isinstance(model.get_submodule(path), nn.Conv2d | nn.Linear)]
    images = source.subset(IMAGES)
    progress(STEP, 0, len(paths), "layers")
    for group in _groups(model, paths):
        moments = _second_moments(apply_scales(model, scales), group, images)
        for path in group:
            layer: Any = model.get_submodule(path)
            weight, scale = layer.weight.detach(), torch.from_numpy(scales[path].weight)
            nearest = quantize_weight(weight, scale)
            if path in moments and _is_dense(layer):
                rounded = _round(weight.flatten(1), nearest.flatten(1), scale, moments[path]).reshape(weight.shape)
                layer.weight = nn.Parameter(rounded, requires_grad=False)
                changed += not torch.equal(rounded, nearest)
            done += 1
            progress(STEP, done, len(paths), "layers")
    return changed


def _is_dense(layer: nn.Module) -> bool:
    """Whether every output reads every input."""
    return not isinstance(layer, nn.Conv2d) or layer.groups == 1


def _groups(model: nn.Module, paths: list[str]) -> Iterator[list[str]]:
    """Layers in order, as many at a time as `MEMORY` allows, one at least."""
    group: list[str] = []
    held = 0
    for path in paths:
        columns = model.get_submodule(path).weight[0].numel()  # type: ignore[index]
        if group and held + 8 * columns**2 > MEMORY:
            yield group
            group, held = [], 0
        group.append(path)
        held += 8 * columns**2
    if group:
        yield group


def _second_moments(quantized: nn.Module, paths: list[str], source: ImageSource) -> dict[str, Tensor]:
    """H = X X^T `(K, K)`, float64, of each layer's quantised input; layers that read nothing but zeros are left out."""
    moments: dict[str, Tensor] = {}

    def hook(path: str) -> Any:
        def add(layer: QuantConv2d | QuantLinear, inputs: tuple[Tensor, ...]) -> None:
            rows = _rows(layer, inputs[0])
            moments[path] = moments.get(path, 0) + (rows.T @ rows).double()

        return add

    handles = (quantized.get_submodule(path).register_forward_pre_hook(hook(path)) for path in paths)
    with hooked(handles), torch.inference_mode():
        for images, _ in source.batches(BATCH):
            quantized(torch.tensor(images))
    return {path: moment for path, moment in moments.items() if float(moment.diagonal().sum()) > 0}


def _rows(layer: QuantConv2d | QuantLinear, x: Tensor) -> Tensor:
    """What the rows of the weight are multiplied by, `(M, K)`: at most `POSITIONS` per image."""
    x = torch.fake_quantize_per_tensor_affine(x, layer.input_scale, 0, -QMAX - 1, QMAX)
    if isinstance(layer, nn.Linear):
        columns = x.reshape(x.shape[0], -1, x.shape[-1])
    else:
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        x = F.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
        columns = F.unfold(x, layer.kernel_size, layer.dilation, 0, layer.stride).transpose(1, 2)
    step = -(-columns.shape[1] // POSITIONS)
    return columns[:, ::step].flatten(0, 1)


def _round(weight: Tensor, nearest: Tensor, scale: Tensor, moment: Tensor) -> Tensor:
    """Round `(C_out, K)`; each row as GPTQ does or to nearest, whichever has the smaller output error."""
    rounded = _gptq(weight.double(), scale.double(), moment)
    on_grid = quantize_weight(rounded.to(weight.dtype), scale)  # the very floats that the graphs will hold
    better = _output_error(on_grid, weight, moment) < _output_error(nearest, weight, moment)
    return torch.where(better[:, None], on_grid, nearest)


def _output_error(rounded: Tensor, weight: Tensor, moment: Tensor) -> Tensor:
    error = (rounded - weight).double()
    return ((error @ moment) * error).sum(1)


def _gptq(weight: Tensor, scale: Tensor, moment: Tensor) -> Tensor:
    """Algorithm 1 of the paper, float64."""
    order = moment.diagonal().argsort(descending=True, stable=True)
    weight, moment = weight[:, order].clone(), moment[order][:, order].clone()
    moment.diagonal().add_(DAMPING * moment.diagonal().mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(moment))
    upper = torch.linalg.cholesky(inverse, upper=True)
    for start in range(0, weight.shape[1], BLOCK):
        block = slice(start, start + BLOCK)
        part, factors = weight[:, block], upper[block, block]
        errors = torch.zeros_like(part)
        for column in range(part.shape[1]):
            values = part[:, column].clone()
            codes = (values / scale).round().clamp(-QMAX, QMAX)
            part[:, column] = codes * scale
            errors[:, column] = (values - part[:, column]) / factors[column, column]
            part[:, column + 1 :] -= errors[:, column, None] * factors[column, column + 1 :]
        weight[:, start + BLOCK :] -= errors @ upper[block, start + BLOCK :]
    return weight[:, order.argsort()]
