"""How many channels attention gets: the paper's rules of rounding and those of the public AA-ResNet-50."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pcn_deploy.errors import OptionError
from pcn_deploy.models.attention_conv import AttentionAugmentedConv2d
from pcn_deploy.models.augmentation import Augmentation
from pcn_deploy.models.catalogue import LEGACY


@pytest.mark.parametrize(
    ("out", "expected"),
    [
        (128, (160, 8)),  # a share of 25.6 is below 20 per head; 12.8 goes down to 8, not up to 16
        (256, (160, 24)),
        (512, (160, 48)),
        (1024, (200, 96)),  # 204.8 goes down to a multiple of 8 heads, above the least width
        (24, (160, 8)),  # 2.4 goes up to one channel per head
    ],
)
def test_rounding_of_the_paper(out: int, expected: tuple[int, int]) -> None:
    assert Augmentation().channels(out) == expected


@pytest.mark.parametrize(("out", "expected"), [(128, (24, 16)), (256, (48, 24)), (512, (104, 48)), (16, (8, 8))])
def test_rounding_of_the_public_network(out: int, expected: tuple[int, int]) -> None:
    """To the nearest multiple of 8, at least 8: 102.4 goes up to 104, 12.8 up to 16; no least width per head."""
    assert LEGACY.channels(out) == expected


def test_a_share_that_is_a_whole_number_is_not_lost_to_floating_point() -> None:
    """0.29 * 100 is 28.999999999999996."""
    assert Augmentation(heads=1, kappa=0.29, upsilon=0.29, min_head_channels=1).channels(100) == (29, 29)


@settings(deadline=None, derandomize=True)
@given(
    heads=st.integers(1, 8),
    kappa=st.floats(0.01, 2),
    upsilon=st.floats(0.01, 0.9),
    least=st.integers(1, 24),
    out=st.integers(32, 512),
)
def test_widths_are_multiples_of_the_heads(heads: int, kappa: float, upsilon: float, least: int, out: int) -> None:
    augmentation = Augmentation(heads=heads, kappa=kappa, upsilon=upsilon, min_head_channels=least)
    dk, dv = augmentation.channels(out)
    assert (dk % heads, dv % heads) == (0, 0)
    assert least * heads <= dk <= max(kappa * out, least * heads) + 1e-6
    assert heads <= dv <= max(upsilon * out, heads) + 1e-6


def test_the_convolution_keeps_the_rest_of_the_channels() -> None:
    layer = AttentionAugmentedConv2d(64, 128, 3, Augmentation(), size=(8, 8))
    assert (layer.conv_out.out_channels, layer.attention.dk, layer.attention.dv) == (120, 160, 8)
    assert layer.conv_out.bias is None
    assert AttentionAugmentedConv2d(64, 128, 3, LEGACY, size=(8, 8)).conv_out.bias is not None


def test_a_layer_without_a_channel_for_the_convolution_is_refused() -> None:
    assert Augmentation(heads=8).channels(9) == (160, 8)
    with pytest.raises(OptionError, match=r"8 value channels of 8 outputs.*fewer heads"):
        Augmentation(heads=8).channels(8)


@pytest.mark.parametrize(
    ("choices", "words"),
    [
        ({"heads": 0}, "heads=0"),
        ({"kappa": 0.0}, "kappa above 0"),
        ({"kappa": float("nan")}, "kappa above 0"),
        ({"upsilon": 0.0}, "between 0 and 1"),
        ({"upsilon": 1.0}, "between 0 and 1"),
        ({"min_head_channels": 0}, "channels per head"),
        ({"kappa": float("inf")}, "kappa=inf.*finite kappa"),
        ({"kappa": "0.2"}, "kappa='0.2'"),
        ({"heads": 2.0}, "heads=2.0.*whole numbers"),
        ({"heads": True}, "heads=True.*whole numbers"),
        ({"min_head_channels": 2.5}, "min_head_channels=2.5.*whole numbers"),
        ({"order": "vqk"}, r"order 'vqk'.*'kqv'"),
        ({"pooled": "max"}, r"pooled 'max'.*'layer'"),
    ],
)
def test_values_out_of_range_are_refused(choices: dict[str, Any], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        Augmentation(**choices)
