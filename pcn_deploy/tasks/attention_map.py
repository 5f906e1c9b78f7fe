"""The role `attention_map`: the weight of each position for each class token. numpy only."""

from __future__ import annotations

from pcn_deploy.aliases import Outputs
from pcn_deploy.specs import ATTENTION_MAP
from pcn_deploy.tasks.parity import ParityMeter
from pcn_deploy.tasks.role import Role


class AttentionMap(Role):
    """The role `attention_map`, `(N, T, H, W)`; `show/heatmap.py` draws it."""

    name = ATTENTION_MAP
    axes = ("batch", "token", "height", "width")

    def meter(self, output: str, rows: Outputs | None = None) -> ParityMeter:
        """Compares maps by cosine and SQNR: the weights of a map add up to one, so that nothing is usual in them."""
        return ParityMeter(output)
