"""How ONNX Runtime is started."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import invoke, refused
from small_builds import images, options

import pcn_deploy
from pcn_deploy import Engine
from pcn_deploy.engines.onnxruntime import _CODES_OF_HALF
from pcn_deploy.errors import DependencyError

torch = pytest.importorskip("torch")

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


@pytest.fixture(scope="module")
def in_bf16() -> Any:
    """A network without a convolution: ONNX Runtime refuses each operator in words of its own."""
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 32 * 32, 5))
    return pcn_deploy.compile(network.eval(), options(precision="bf16"), calibration=images(8)).bundle


def test_bf16_needs_a_library_to_be_rewritten(in_bf16: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with Engine.open(in_bf16, "cpu") as engine:
        assert np.isfinite(engine.predict(images(3))).all()
    monkeypatch.setitem(sys.modules, "pcn_deploy.engines.rounded", None)
    with pytest.raises(
        DependencyError,
        match=r"no kernels for on the CPU, such as BF16, needs it\. Install it: pip install onnx onnx-ir$",
    ):
        Engine.open(in_bf16, "cpu")


def test_the_time_of_bf16_on_a_cpu_is_not_told(in_bf16: Any, tmp_path: Path) -> None:
    path = in_bf16.save(tmp_path / "bf16.pcn")
    refused(invoke("bench", path, "--target", "cpu", "--seconds", "0.01"), 2, "not the time of BF16")
    refused(invoke("bench", path, "--seconds", "0.01"), 7, "not the time of BF16")
    assert invoke("verify", path).exit_code == 0


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_attention_in_fp16_does_not_end_the_process(precision: str) -> None:
    """ONNX Runtime 1.31 and 1.32 crash on FP16 products behind a transposition of the batch; a stock session too."""
    code = PRE_NORM_ATTENTION.replace("{precision!r}", repr(precision))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_graph_that_shows_how_codes_are_made() -> None:
    import onnx
    from onnx.reference import ReferenceEvaluator

    model = onnx.load_from_string(_CODES_OF_HALF)
    onnx.checker.check_model(model, full_check=True)
    outputs: Any = ReferenceEvaluator(model).run(None, {"x": np.array([2.9], np.float16)})
    assert (outputs[0].dtype, outputs[0].tolist()) == (np.int8, [3])
