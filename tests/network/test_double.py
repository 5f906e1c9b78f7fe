"""Networks executed in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pcn_deploy.network.double import InDouble


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"bias": False},
        {"stride": 2, "padding": 1},
        {"kernel_size": (5, 1), "padding": (2, 0), "stride": (2, 3)},
        {"dilation": (2, 1), "padding": [2, 1]},
        {"out_channels": 12},
        {"groups": 2},
        {"groups": 1},
        {"padding": "same"},
        {"padding": 1, "padding_mode": "reflect"},
    ],
    ids=str,
)
def test_convolutions_are_those_of_float64(settings: dict[str, Any]) -> None:
    """Depthwise ones go another way than PyTorch's, which gives the reference."""
    torch.manual_seed(0)
    conv = nn.Conv2d(**{"in_channels": 6, "out_channels": 6, "kernel_size": 3, "groups": 6, **settings})
    images = torch.randn(2, 6, 11, 13)
    with torch.no_grad():
        with InDouble():
            found = conv(images)
        expected = conv.double()(images.double())
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)


def test_functional_depthwise_convolutions_too() -> None:
    images, weight = torch.randn(1, 4, 9, 9), torch.randn(4, 1, 3, 3)
    with InDouble():
        found = nn.functional.conv2d(images, weight, None, 2, 1, groups=4)
    expected = nn.functional.conv2d(images.double(), weight.double(), None, 2, 1, groups=4)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)


def test_code_that_asks_for_float32_computes_in_float64() -> None:
    def network(x: Tensor) -> Tensor:
        return (x.to(torch.float32) + 1e-12).float() - torch.ones(1, dtype=torch.float32)

    with InDouble():
        assert network(torch.ones(1)).item() == pytest.approx(1e-12, rel=1e-3)
