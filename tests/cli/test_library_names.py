"""MODEL of a library: the notes, the options that win, the network made again from its bundle; with a fake library."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import invoke, refused
from PIL import Image

from pcn_deploy import Transform
from pcn_deploy.models.libraries import LIBRARIES
from pcn_deploy.models.library import Evaluation, Library

torch = pytest.importorskip("torch")


class FakeLibrary(Library):
    """A fake: one small network, which is made for one size."""

    package = "fake"
    listing = "print('net')"

    def names(self) -> Sequence[str]:
        return ["net"]

    def create(self, name: str, weights: Path | None, trained: Mapping[str, Any], arguments: dict[str, Any]) -> Any:
        classes, side = arguments.get("num_classes", 1000), arguments.get("side", 32)
        layers = torch.nn.Conv2d(3, 16, 3, stride=2), torch.nn.Conv2d(16, 16, 3), torch.nn.Flatten()
        return torch.nn.Sequential(*layers, torch.nn.Linear(16 * (side // 2 - 3) ** 2, classes))

    def arguments_at(self, name: str, resolution: tuple[int, int]) -> dict[str, Any]:
        return {"side": resolution[0]} if resolution[0] != 32 else {}

    def evaluation(self, name: str, weights: Path | None, trained: Mapping[str, Any]) -> Evaluation:
        transform = Transform(resolution=(32, 32), crop_pct=0.95, mean=(0.5,) * 3, std=(0.25,) * 3)
        return Evaluation(transform=transform, origin="fake says", notes=("fake is a fake.",))


@pytest.fixture(autouse=True)
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeLibrary:
    library = FakeLibrary()
    monkeypatch.setitem(LIBRARIES, "fake", library)
    return library


@pytest.fixture
def weights(fake: FakeLibrary, tmp_path: Path) -> Path:
    network = fake.create("net", None, {}, {"num_classes": 3, "side": 16})
    state = {f"model.{key}": value for key, value in network.state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "net.ckpt")
    return tmp_path / "net.ckpt"


@pytest.fixture
def images(tmp_path: Path) -> Path:
    generator = np.random.default_rng(0)
    for index in range(4):
        path = tmp_path / "images" / f"{index}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(path)
    return tmp_path / "images"


TAKEN = "--resolution 32x32 --crop-pct 0.95 --crop-mode center --interpolation bicubic --mean 0.5,0.5,0.5"
TAKEN += " --std 0.25,0.25,0.25"


def test_what_the_library_configures_is_taken_and_noted(tmp_path: Path) -> None:
    out = tmp_path / "net.pcn"
    words = ["build", "fake:net", "--random-weights", "--num-classes", 5, "--channels", 3, "-o", out]
    result = invoke(*words, "--json")
    assert result.exit_code == 0, result.output
    notes = json.loads(result.stdout)["notes"]
    assert notes[:2] == ["fake is a fake.", f"images are transformed as fake says: {TAKEN}."]
    manifest = json.loads(invoke("inspect", out, "--json").stdout)
    assert notes[1] in manifest["notes"]
    assert manifest["model"] == "fake:net"
    assert Transform.from_json(manifest["transform"]) == FakeLibrary().evaluation("net", None, {}).transform


def test_options_win_and_the_network_is_made_again_from_its_bundle(weights: Path, images: Path, tmp_path: Path) -> None:
    out = tmp_path / "net.pcn"
    options = ["--resolution", 16, "--crop-pct", "0.8", "--channels", 3, "--std", 1, "--exif", "apply"]
    result = invoke("build", "fake:net", "--weights", weights, *options, "--precision", "fp32", "-o", out)
    assert result.exit_code == 0, result.output
    told = " ".join(result.stderr.split())
    assert "as fake says: --resolution 16x16 --crop-pct 0.8 --crop-mode center" in told
    assert "The command line replaced --resolution 32x32 --crop-pct 0.95 --std 0.25,0.25,0.25." in told
    manifest = json.loads(invoke("inspect", out, "--json").stdout)
    assert manifest["transform"]["mean"] == [0.5, 0.5, 0.5]
    assert manifest["transform"]["exif"] == "apply"
    assert manifest["provenance"]["weights_from"] == "file"
    assert invoke("verify", out, "--data", images, "-q").exit_code == 0
    random = tmp_path / "random.pcn"
    options = ["--resolution", 16, "--precision", "fp32", "--num-classes", 4, "--seed", 3, "-q"]
    assert invoke("build", "fake:net", "--random-weights", *options, "-o", random).exit_code == 0
    assert invoke("verify", random, "--data", images, "-q").exit_code == 0


def test_what_is_wrong_is_told_before_anything_is_made(weights: Path, tmp_path: Path) -> None:
    out = ["-o", tmp_path / "net.pcn"]
    refused(invoke("build", "fake:nett", "--random-weights", *out), 1, "Did you mean fake:net?")
    refused(invoke("build", "fake:net", *out), 2, "--random-weights")
    refused(invoke("build", "fake:net", "--weights", tmp_path / "no.pth", *out), 1, "no.pth' cannot be read")
    refused(
        invoke("build", "fake:net", "--weights", weights, "--num-classes", 4, "--resolution", 16, *out), 1, "3 classes"
    )


def test_analyze_takes_them_too(weights: Path, images: Path, tmp_path: Path) -> None:
    words = ["analyze", "fake:net", "--weights", weights, "--resolution", 16, "--calibration", images]
    result = invoke(*words, "-o", tmp_path / "net.json")
    assert result.exit_code == 0, result.output
    assert "Note: images are transformed as fake says: --resolution 16x16" in " ".join(result.stderr.split())


def test_models_mentions_the_prefixes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(LIBRARIES, "fake")
    assert "timm:NAME, torchvision:NAME" in invoke("models").stdout
    assert json.loads(invoke("models", "--json").stdout)["libraries"] == ["timm", "torchvision"]
    refused(
        invoke("build", "resnet19", "--random-weights", "-o", "x.pcn"), 1, "given as timm:NAME, torchvision:NAME, your"
    )


FACTORIES = """
from torch import nn

def fixed():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 2))

def free(num_classes=2):
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, num_classes))
"""


def test_your_own_factory_is_called_with_the_number_of_classes_or_refused(tmp_path: Path) -> None:
    (tmp_path / "factories.py").write_text(FACTORIES)
    out = ["--num-classes", 7, "--precision", "fp32", "--resolution", 8, "-q", "-o", tmp_path / "net.pcn"]
    said = ("so it cannot be told --num-classes 7", "Leave the option out, or let the function take num_classes.")
    refused(invoke("build", f"{tmp_path / 'factories.py'}:fixed", *out), 1, *said)
    assert invoke("build", f"{tmp_path / 'factories.py'}:free", *out).exit_code == 0
    assert json.loads(invoke("inspect", tmp_path / "net.pcn", "--json").stdout)["outputs"][0]["shape"][-1] == 7
