"""How ONNX Runtime is started."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytest.importorskip("torch", reason="torch is not installed: pip install 'pcn-deploy[compile]'")

PRE_NORM_ATTENTION = """
import torch
from torch import nn
import pcn_deploy

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 48, 8, 8)
        self.norm = nn.LayerNorm(48)
        self.attn = nn.MultiheadAttention(48, 4, batch_first=True)
        self.head = nn.Linear(48, 10)

    def forward(self, x):
        y = self.stem(x).flatten(2).transpose(1, 2)
        z = self.norm(y)
        return self.head((y + self.attn(z, z, z, need_weights=False)[0]).mean(1))

options = pcn_deploy.CompileOptions(
    precision={precision!r}, targets=("cpu",), transform=pcn_deploy.Transform(resolution=(32, 32))
)
result = pcn_deploy.compile(Net(), options, calibration=[torch.randn(32, 3, 32, 32).numpy()])
assert result
assert "stock" in result.reports[0].executions, result.reports[0].notes
"""


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_attention_in_fp16_does_not_end_the_process(precision: str) -> None:
    """ONNX Runtime 1.31 and 1.32 crash on FP16 products behind a transposition of the batch; a stock session too."""
    code = PRE_NORM_ATTENTION.replace("{precision!r}", repr(precision))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
