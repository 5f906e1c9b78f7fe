"""From a network to what is built: with which images it is looked at first."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from torch import Tensor, nn

import pcn_deploy
from pcn_deploy import CompileOptions
from pcn_deploy.data.transform import Transform, drawn_images
from pcn_deploy.errors import ModelError
from pcn_deploy.graph.exported import export_program
from pcn_deploy.progress import silent
from pcn_deploy.verbs.steps.preparation import prepare
from pcn_deploy.verbs.steps.sources import open_source

TRANSFORM = Transform(resolution=(8, 8))
OPTIONS = CompileOptions(precision="int8", transform=TRANSFORM)


class Watched(nn.Module):
    """Keeps the images that it is given."""

    def __init__(self, seen: list[Tensor]) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 5)
        self.see = seen.append

    def forward(self, x: Tensor) -> Tensor:
        self.see(x.clone())
        y: Tensor = self.head(self.conv(x).mean((2, 3)))
        return y


@pytest.mark.parametrize("equal", [False, True])
def test_a_network_is_judged_on_images_not_on_noise(*, equal: bool) -> None:
    """On the images that calibrate, unless they are no two; noise is far from what a network was trained on."""
    calibration = np.random.default_rng(0).random((2, 3, 8, 8), dtype=np.float32)
    if equal:
        calibration[1] = calibration[0]
    options = CompileOptions(precision="fp32", transform=TRANSFORM)
    seen: list[Tensor] = []
    prepare(Watched(seen).eval(), options, open_source([calibration], options), silent)
    expected = drawn_images(2, TRANSFORM, options.seed) if equal else calibration
    np.testing.assert_array_equal(seen[0], expected[:1])
    assert any(np.array_equal(images, expected) for images in seen)


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3))
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.layers(x).mean((2, 3)))
        return y


class ByValue(Network):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if x.mean() > 0 else -x)


def calibration() -> npt.NDArray[np.float32]:
    return np.random.default_rng(0).random((4, 3, 8, 8), dtype=np.float32)


def test_what_cannot_be_exported_is_refused_before_calibration() -> None:
    steps: set[str] = set()
    with pytest.raises(ModelError, match="cannot be exported"):
        pcn_deploy.compile(ByValue(), OPTIONS, calibration=[calibration()], progress=lambda step, *_: steps.add(step))
    assert steps == {"Rewriting and planning"}


def test_a_build_exports_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[nn.Module] = []

    def counted(model: nn.Module, *given: Any) -> Any:
        calls.append(model)
        return export_program(model, *given)

    monkeypatch.setattr("pcn_deploy.graph.export.export_program", counted)
    assert pcn_deploy.compile(Network(), OPTIONS, calibration=[calibration()])
    assert len(calls) == 1
