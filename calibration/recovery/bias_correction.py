"""Bias correction: rounding shifts the mean of each output channel; the bias takes the shift back.

The shift of a layer is the mean of its output in the quantised network minus that in the float network, per channel,
over images and positions. One run of the quantised network suffices: each layer is corrected as soon as it has
computed its output, so those after it see the corrected one.

Source: Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", arXiv 1906.04721,
section 4.2 and appendix D (the variant with data).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pcn_deploy.calibration.quantized import QuantConv2d, Quantization, QuantLinear, apply_scales
from pcn_deploy.data.images import ImageSource
from pcn_deploy.network.hooks import hooked
from pcn_deploy.progress import Progress, silent

IMAGES = 512
VALUES = 64 * 3 * 224 * 224
"""One run takes 64 images of 224x224, more if they are smaller, at most `IMAGES`."""


def correct_bias(
    model: nn.Module,
    scales: dict[str, Quantization],
    source: ImageSource,
    original: nn.Module,
    progress: Progress = silent,
) -> int:
    """Correct the bias of every INT8 layer; a layer without one is given one.

    Args:
        model: The deploy form that will be quantised; biases are replaced in it, not changed in place.
        scales: Scales by the name of the layer, from `plan_scales`.
        source: Calibration images.
        original: The float network that `model` stands for.
        progress: Told the steps done.

    Returns:
        How many layers were corrected.
    """
    images = _one_batch(source)
    quantized = apply_scales(model, scales)
    layers = {path: layer for path, layer in quantized.named_modules() if isinstance(layer, QuantConv2d | QuantLinear)}
    expected: dict[str, Tensor] = {}
    shifts: dict[str, Tensor] = {}

    def note(path: str) -> Any:
        def record(_: nn.Module, __: Any, output: Tensor) -> None:
            expected[path] = _channel_mean(output, original.get_submodule(path))

        return record

    def correct(path: str) -> Any:
        def take_back(layer: nn.Module, _: Any, output: Tensor) -> Tensor:
            shift = torch.nan_to_num(_channel_mean(output, layer) - expected[path], 0.0, 0.0, 0.0)
            shifts[path] = shift
            return output - (shift if isinstance(layer, nn.Linear) else shift[:, None, None])

        return take_back

    progress("Bias correction", 0, 2)
    _run(original, images, {path: note(path) for path in layers})
    progress("Bias correction", 1, 2)
    _run(quantized, images, {path: correct(path) for path in layers})
    for path, shift in shifts.items():
        layer = model.get_submodule(path)
        bias = layer.bias if isinstance(layer.bias, Tensor) else torch.zeros_like(shift)
        layer.bias = nn.Parameter(bias.detach() - shift, requires_grad=False)
    progress("Bias correction", 2, 2)
    return len(shifts)


def _one_batch(source: ImageSource) -> Tensor:
    values = 1
    for size in source.transform.shape:
        values *= size
    count = max(1, min(IMAGES, VALUES // values))
    images, _ = next(source.subset(count).batches(count))
    return torch.tensor(images)


def _channel_mean(output: Tensor, layer: nn.Module) -> Tensor:
    last = output if isinstance(layer, nn.Linear) else output.movedim(1, -1)
    return last.flatten(0, -2).double().mean(0).to(output.dtype)


def _run(model: nn.Module, images: Tensor, hooks: dict[str, Any]) -> None:
    handles = (model.get_submodule(path).register_forward_hook(hook) for path, hook in hooks.items())
    with hooked(handles), torch.inference_mode():
        model(images)
