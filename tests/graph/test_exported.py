"""Attention with any number of axes is exported as what it is, written out here as sums."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_builds import images, options
from torch import Tensor, nn

import pcn_deploy
from pcn_deploy.graph.exported import FourAxes


def by_hand(q: Tensor, k: Tensor, v: Tensor, mask: Any = None, *, is_causal: bool = False, scale: Any = None) -> Tensor:
    q, k, v = q.double(), k.double(), v.double()
    weights = torch.einsum("...ld,...sd->...ls", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        weights = weights.masked_fill(~torch.ones(weights.shape[-2:], dtype=torch.bool).tril(), -torch.inf)
    if mask is not None:
        weights = weights.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else weights + mask.double()
    return torch.einsum("...ls,...sd->...ld", weights.softmax(-1), v)


SHAPES = [(6, 8), (3, 6, 8), (3, 2, 6, 8), (3, 4, 2, 6, 8), (3, 2, 2, 2, 6, 8)]
GIVEN: dict[str, Any] = {
    "plain": {},
    "causal": {"is_causal": True},
    "scaled": {"scale": 0.3},
    "masked": {"attn_mask": torch.randn(6, 6, generator=torch.Generator().manual_seed(1))},
    "mask of one more axis": {"attn_mask": torch.rand(1, 6, 6, generator=torch.Generator().manual_seed(1)) > 0.1},
}


@pytest.mark.parametrize("given", GIVEN)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_any_number_of_axes(shape: tuple[int, ...], given: str) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(shape) for _ in range(3))
    kwargs = dict(GIVEN[given])
    if len(shape) == 2 and given == "mask of one more axis":
        pytest.skip("the mask has more axes than the attention")
    with FourAxes():
        found = F.scaled_dot_product_attention(q, k, v, **kwargs)
    mask = kwargs.pop("attn_mask", None)
    assert found.shape == q.shape
    torch.testing.assert_close(found.double(), by_hand(q, k, v, mask, **kwargs), rtol=1e-5, atol=1e-6)


class Attention(nn.Module):
    """Tokens that attend to each other without heads, or in groups as in timm's Twins."""

    def __init__(self, *, groups: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.groups = groups
        self.patches, self.qkv, self.head = nn.Conv2d(3, 16, 4, 4), nn.Linear(16, 48), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        count = tokens.shape[0]
        q, k, v = self.qkv(tokens).chunk(3, -1)
        if self.groups:
            q, k, v = (each.reshape(count, 4, 16, 2, 8).transpose(2, 3) for each in (q, k, v))
        mixed = F.scaled_dot_product_attention(q, k, v)
        if self.groups:
            mixed = mixed.transpose(2, 3).reshape(tokens.shape)
        logits: Tensor = self.head(mixed.mean(1))
        return logits


@pytest.mark.parametrize("groups", [False, True])
@pytest.mark.parametrize(("precision", "targets"), [("fp16", ("cpu",)), ("int8", ("cpu", "torchscript"))])
def test_such_a_network_builds(precision: str, targets: tuple[str, ...], *, groups: bool) -> None:
    network = Attention(groups=groups).eval()
    result = pcn_deploy.compile(network, options(precision=precision, targets=targets), calibration=images())
    assert result, result.reports[0].failures
    assert np.isfinite([report.metrics["sqnr_db"] for report in result.reports]).all()
