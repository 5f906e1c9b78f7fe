"""What `pcn-compile build` notes of a network."""

from __future__ import annotations

from pathlib import Path

from helpers import invoke

from pcn_deploy import Bundle

STRETCHED = """
from torch import nn
from pcn_deploy.models.attention_conv import AttentionAugmentedConv2d
from pcn_deploy.models.augmentation import Augmentation

def factory() -> nn.Module:
    choices = Augmentation(heads=2, min_head_channels=4)
    augmented = AttentionAugmentedConv2d(3, 32, 3, choices, size=4, stride=4)
    return nn.Sequential(augmented, nn.AdaptiveAvgPool2d(1), nn.Flatten())
"""


def test_tables_stretched_beyond_their_size_are_noted(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(STRETCHED)
    words = ["build", f"{tmp_path / 'net.py'}:factory", "--precision", "fp32", "-o", tmp_path / "a.pcn"]
    result = invoke(*words, "--resolution", "16x20")
    assert result.exit_code == 0, result.output
    note = (
        "1 of 1 tables of relative positions are stretched, such as that of 0.attention: made for a map of 4x4, used on"
    )
    assert f"Note: {note} 4x5." in result.stderr
    weights, kept = Bundle.open(tmp_path / "a.pcn").manifest.notes
    assert weights.startswith("no --weights were given")
    assert kept.startswith(note)
