"""Bias correction: the mean output of every channel is that of the float network again."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from recovery_networks import SHAPE, TRANSFORM, images
from torch import Tensor, nn

from pcn_deploy import ImageSource
from pcn_deploy.calibration.quantized import Quantization, apply_scales
from pcn_deploy.calibration.recovery.bias_correction import correct_bias

SCALES = {
    "0": Quantization(0.05, np.full(16, 0.05, np.float32)),
    "2": Quantization(0.2, np.full(16, 0.04, np.float32)),
    "4": Quantization(0.2, np.full(16, 0.04, np.float32)),
}
"""Coarse ones, so that the outputs shift."""


def make() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, bias=False),
        nn.ReLU(),
        nn.Conv2d(16, 16, 1),
        nn.ReLU(),
        nn.Conv2d(16, 16, 1, bias=False),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    ).eval()


def means(net: nn.Module, x: Tensor) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}

    def note(path: str) -> None:
        net.get_submodule(path).register_forward_hook(
            lambda _, __, output: found.update({path: output.double().mean((0, 2, 3))})
        )

    for path in SCALES:
        note(path)
    with torch.inference_mode():
        net(x)
    return found


def test_every_mean_is_that_of_the_float_network() -> None:
    """Upstream corrections included: all of them hold at once."""
    net, given = make(), images(16)
    corrected = copy.deepcopy(net)
    assert correct_bias(corrected, SCALES, ImageSource([given], TRANSFORM), net) == 3
    x = torch.from_numpy(given)
    expected = means(copy.deepcopy(net), x)
    before, after = means(apply_scales(net, SCALES), x), means(apply_scales(corrected, SCALES), x)
    for path, mean in expected.items():
        assert float((before[path] - mean).abs().max()) > 1e-3, "there is something to correct"
        assert float((after[path] - mean).abs().max()) < 1e-4
    assert "0.bias" in corrected.state_dict()
    assert "0.bias" not in net.state_dict()


def test_the_output_error_falls_on_other_images() -> None:
    net, x = make(), torch.from_numpy(images(64, seed=5))
    corrected = copy.deepcopy(net)
    correct_bias(corrected, SCALES, ImageSource([images(64)], TRANSFORM), net)
    with torch.inference_mode():
        exact = net(x)
        before = (apply_scales(net, SCALES)(x) - exact).square().mean()
        after = (apply_scales(corrected, SCALES)(x) - exact).square().mean()
    assert float(after) < 0.5 * float(before)


def test_a_linear_layer() -> None:
    """The channels of its output are the last axis."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(2), nn.Linear(SHAPE[1] * SHAPE[2], 16, bias=False), nn.Flatten())
    scales = {"1": Quantization(0.5, np.full(16, 0.05, np.float32))}
    corrected = copy.deepcopy(net)
    source = ImageSource([images(16)], TRANSFORM)
    assert correct_bias(corrected, scales, source, net) == 1
    x = torch.from_numpy(images(16))
    with torch.inference_mode():
        shift = (apply_scales(corrected, scales)[1](net[0](x)) - net[1](net[0](x))).mean((0, 1))  # type: ignore[index]
    assert float(shift.abs().max()) < 1e-5


def test_to_the_bit_the_same_again() -> None:
    found = []
    for _ in range(2):
        net = make()
        correct_bias(net, SCALES, ImageSource([images(16)], TRANSFORM), make())
        found.append(net.state_dict())
    assert all(torch.equal(found[0][name], tensor) for name, tensor in found[1].items())


@pytest.mark.parametrize("given", [np.zeros((1, *SHAPE), np.float32), np.full((2, *SHAPE), 3.0, np.float32)])
def test_plain_images(given: np.ndarray[tuple[int, ...], np.dtype[np.float32]]) -> None:
    net = make()
    correct_bias(net, SCALES, ImageSource([given], TRANSFORM), make())
    assert all(tensor.isfinite().all() for tensor in net.state_dict().values())
