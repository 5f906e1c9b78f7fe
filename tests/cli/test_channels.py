"""Networks of any number of channels from the command line, in INT8; and networks that see blue first."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from helpers import invoke, refused
from PIL import Image

pytest.importorskip("torch")

NETWORK = '''
import torch
from torch import nn


def net(channels):
    torch.manual_seed(0)
    layers = nn.Conv2d(channels, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU()
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 3))


def two(): return net(2)
def thirteen(): return net(13)


class Blue(nn.Module):
    """Class 1 where the first channel is brightest, class 0 where the last one is."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Conv2d(3, 2, 1, bias=False)
        self.mix.weight.data.copy_(torch.tensor([[-9.0, 0, 9], [9, 0, -9]])[..., None, None])

    def forward(self, x):
        return self.mix(x).mean((2, 3))
'''


@pytest.fixture
def model(tmp_path: Path) -> str:
    (tmp_path / "net.py").write_text(NETWORK)
    return str(tmp_path / "net.py")


@pytest.mark.parametrize(("name", "channels", "kind"), [("two", 2, np.float32), ("thirteen", 13, np.uint8)])
def test_int8_of_any_number_of_channels(model: str, tmp_path: Path, name: str, channels: int, kind: type) -> None:
    random = np.random.default_rng(0)
    images: npt.NDArray[Any] = random.standard_normal((40, channels, 16, 16)).astype(np.float32)
    if kind is np.uint8:
        images = random.integers(0, 256, (40, 20, 20, channels), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", images=images)
    words = ["build", f"{model}:{name}", "--precision", "int8", "--resolution", 16, "--calibration"]
    words += [tmp_path / "images.npz", "--json", "-o", tmp_path / "out.pcn"]
    result = invoke(*words, "--channels", channels)
    assert result.exit_code == 0, result.output
    found = json.loads(invoke("inspect", tmp_path / "out.pcn", "--json").stdout)
    assert found["inputs"][0]["shape"] == ["batch", channels, 16, 16]
    assert found["transform"]["mean"] == [0] * channels
    refused(invoke(*words, "--overwrite"), 1, f"{channels}", "Set --channels")


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (
            ["--channels", "4", "--mean", "0.1,0.2"],
            "--mean has 2 values; --channels is 4. Give one for each, or one for all",
        ),
        (["--channels", "2", "--channel-order", "bgr"], "2 channels have no order bgr"),
        (["--white", "0"], "white 0.0 is not above 0"),
    ],
)
def test_impossible_channels_are_usage_errors(model: str, tmp_path: Path, words: list[str], text: str) -> None:
    refused(invoke("build", f"{model}:two", *words, "-o", tmp_path / "out.pcn"), 2, text)


def test_what_was_chosen_holds_on_the_device(model: str, tmp_path: Path) -> None:
    """`run` and `verify` put blue first too, turn the image and take white for what the build was told it is."""
    out = tmp_path / "out.pcn"
    words = ["--precision", "fp32", "--resolution", 8, "--crop-pct", 1, "--channel-order", "bgr", "--exif", "apply"]
    result = invoke("build", f"{model}:Blue", *words, "--alpha", "white", "--white", 1, "-q", "-o", out)
    assert result.exit_code == 0, result.output
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (8, 8), (0, 0, 250)).save(tmp_path / "blue.png", exif=exif)
    Image.new("RGB", (8, 8), (250, 0, 0)).save(tmp_path / "red.png")
    result = invoke("run", out, tmp_path / "blue.png", tmp_path / "red.png", "--json")
    assert [one["classes"][0] for one in json.loads(result.stdout)["predictions"]] == [1, 0]
    assert "EXIF" not in invoke("run", out, tmp_path / "blue.png").stderr


def test_run_tells_what_is_ignored(path: Path, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 30)).save(tmp_path / "turned.jpg", exif=exif)
    result = invoke("run", path, tmp_path / "turned.jpg")
    assert "1 of 1 images looked at carry an EXIF orientation, which is ignored" in result.stderr
    assert invoke("run", path, tmp_path / "turned.jpg", "--json").stderr == ""
