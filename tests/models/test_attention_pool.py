"""What the attention pooling of a user's own network refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pcn_deploy.errors import OptionError
from pcn_deploy.models.aggregation import AttentionPool2d


def test_another_feature_map_than_it_was_made_for() -> None:
    words = (
        r"AttentionPool2d\(32\) was given \(2, 64, 5, 3\); expected .*\(N, 32, H, W\)\. Make it AttentionPool2d\(64\)"
    )
    with pytest.raises(OptionError, match=words):
        AttentionPool2d(32)(torch.rand(2, 64, 5, 3))
    with pytest.raises(OptionError, match=r"was given \(2, 32\); expected a feature map \(N, 32, H, W\)\.$"):
        AttentionPool2d(32)(torch.rand(2, 32))


@pytest.mark.parametrize(
    "choices",
    [{"channels": 0}, {"channels": 8.0}, {"channels": True}, {"mlp_ratio": 0.0}, {"layer_scale": float("inf")}],
)
def test_a_pool_of_impossible_widths(choices: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=f"{next(iter(choices))}={next(iter(choices.values()))!r}"):
        AttentionPool2d(**{"channels": 8, **choices})
