"""FP16 loses what ONNX Runtime's CPU session keeps: labelled images are judged with every tensor in its type."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_builds import needs_rtx

import pcn_deploy
from pcn_deploy import BatchRange, CompileOptions, Transform
from pcn_deploy.verbs.load import load_to_verify

torch = pytest.importorskip("torch")

from torch import Tensor, nn  # noqa: E402

TRANSFORM = Transform(resolution=(16, 16), crop_pct=1.0, mean=(0.0,) * 3, std=(1.0,) * 3)
OPTIONS = CompileOptions(precision="fp16", transform=TRANSFORM, batch=BatchRange(min=1, opt=2, max=4))


def photos(count: int, seed: int = 0) -> Any:
    coarse = np.random.default_rng(seed).integers(0, 256, (count, 4, 4, 3))
    return np.kron(coarse, np.ones((1, 4, 4, 1))).astype(np.uint8)


def normalised(images: Any) -> Any:
    return np.stack([TRANSFORM.normalise(image) for image in images])


def smooth(count: int, seed: int = 0) -> Any:
    """One colour each, and a little noise: nothing like stripes."""
    random = np.random.default_rng(seed)
    return (random.integers(20, 236, (count, 1, 1, 3)) + random.integers(-8, 9, (count, 16, 16, 3))).astype(np.uint8)


class Energy(nn.Module):
    """Mean squares of filters; one of them answers to stripes alone, with squares beyond what FP16 holds."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.head = nn.Conv2d(3, 4, 9, bias=False), nn.Linear(4, 4)
        stripes = torch.tensor([1.0, 1, -1, -1] * 2 + [0])
        with torch.no_grad():
            self.conv.weight[0] = 3.4 * stripes[None, :, None].expand(3, 9, 9)
            self.head.weight *= 0.01
            self.head.weight[:, 0] = torch.tensor([1e-3, 0, 0, 0])

    def forward(self, x: Tensor) -> Tensor:
        energies = self.conv(x)
        return self.head((energies * energies).mean((2, 3)))  # type: ignore[no-any-return]


@needs_rtx
def test_an_overflow_that_only_labelled_images_show_breaks_the_proof(tmp_path: Path) -> None:
    images = smooth(400)
    images[::40, np.arange(16) % 4 < 2], images[::40, np.arange(16) % 4 >= 2] = 255, 0
    net = Energy().eval()
    with torch.no_grad():
        labels = net(torch.from_numpy(normalised(images))).argmax(1).numpy()
        assert net.half()(torch.from_numpy(normalised(images[:1])).half()).isinf().any()
    net = Energy().eval()
    chosen = replace(OPTIONS, targets=("cpu", "tensorrt-rtx"), max_drop=1.0)
    result = pcn_deploy.compile(net, chosen, calibration=smooth(32, 9), evaluation=(images, labels))
    proofs = {proof.target: proof for proof in result.proofs}
    assert (proofs["cpu"].executed_by, proofs["tensorrt-rtx"].executed_by) == ("cpu", "rounded")
    assert proofs["cpu"].counts.lost == 0, "what the CPU itself runs rounds nothing"
    assert not proofs["tensorrt-rtx"]
    assert proofs["tensorrt-rtx"].counts.lost == 10
    path = result.bundle.save(tmp_path / "energy.pcn")
    with load_to_verify(path, "tensorrt-rtx", judging=True) as engine:
        report = pcn_deploy.verify(engine, (images, labels), reference=Energy())
    assert report.executed_by == "rounded"
    assert not report


class Priors(nn.Module):
    """Logits that class priors dominate: what the image changes is below the last bit of FP16."""

    def __init__(self, share: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.head = nn.Conv2d(3, 32, 3, 2, 1), nn.Linear(32, 12)
        with torch.no_grad():
            self.head.weight *= share
            self.head.bias.copy_(torch.tensor([8.0] * 6 + [-8.0] * 6))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x).relu().mean((2, 3)))  # type: ignore[no-any-return]


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_answers_that_rounding_loses_are_no_excuse(precision: str) -> None:
    chosen = replace(OPTIONS, precision=precision)
    result = pcn_deploy.compile(Priors(3e-3), chosen, calibration=photos(64))
    assert not result
    assert any("what the images change is lost" in failure for failure in result.reports[0].failures)
    assert "hardly differ" not in " ".join(result.notes)
    assert pcn_deploy.compile(Priors(3e-3), replace(OPTIONS, precision="fp32"), calibration=photos(64))
    assert pcn_deploy.compile(Priors(1.0), chosen, calibration=photos(64))


class Added(nn.Module):
    """A buffer added to the logits, rounded to FP16 as weights are."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.head = nn.Conv2d(3, 16, 3, 2, 1), nn.Linear(16, 10)
        self.register_buffer("priors", 100 * torch.randn(10))

    def forward(self, x: Tensor) -> Tensor:
        return 10 * self.head(self.conv(x).relu().mean((2, 3))) + self.priors  # type: ignore[no-any-return]


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_buffers_are_rounded_as_the_graph_rounds_them(precision: str) -> None:
    """No form departs: the graph is held against the network with the buffers that it stores."""
    result = pcn_deploy.compile(Added(), replace(OPTIONS, precision=precision), calibration=photos(32))
    assert result.bundle.read_arrays("golden.npz")["least_widened_db"].min() > 70
