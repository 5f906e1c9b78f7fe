"""Where a bundle takes the names of its classes from, and who uses them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import invoke
from PIL import Image
from small_builds import images, network, options

import pcn_deploy
from pcn_deploy import Transform
from pcn_deploy.data.classes import names_in_checkpoint

torch = pytest.importorskip("torch")

NAMES = ["ant", "bee", "cat", "dog", "elk"]
FACTORY = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 16, 3, 4), nn.Linear(16, 5)
    def forward(self, x):
        return self.head(self.conv(x).relu().mean((2, 3)))

def net():
    torch.manual_seed(0)
    return Net()
"""


@pytest.mark.parametrize(
    "content",
    [
        {"class_names": NAMES},
        {"meta": {"CLASSES": tuple(NAMES)}},
        {"meta": {"dataset_meta": {"classes": NAMES}}},
        {"hyper_parameters": {"class_to_idx": {name: index for index, name in enumerate(NAMES)}}},
        {"config": {"id2label": dict(enumerate(NAMES))}},
        {"idx_to_class": {str(index): name for index, name in enumerate(NAMES)}},
    ],
    ids=lambda content: next(iter(content)),
)
def test_names_that_checkpoints_hold(content: dict[str, Any], tmp_path: Path) -> None:
    assert names_in_checkpoint({**content, "state_dict": {}}) == tuple(NAMES)
    (tmp_path / "net.py").write_text(FACTORY)
    made: dict[str, Any] = {}
    exec(FACTORY, made)
    torch.save({**content, "state_dict": made["net"]().state_dict()}, tmp_path / "net.pth")
    given = ("--weights", tmp_path / "net.pth", "--resolution", "32x32", "--precision", "fp32")
    result = invoke("build", f"{tmp_path / 'net.py'}:net", *given, "-o", tmp_path / "net.pcn")
    assert result.exit_code == 0, result.output
    assert pcn_deploy.load(tmp_path / "net.pcn").class_names == tuple(NAMES)


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"classes": 5},
        {"names": torch.zeros(5)},
        {"classes": {"ant": 0, "bee": 7}},
        {"labels": [0, 1]},
        {"meta": 3},
        7,
    ],
    ids=str,
)
def test_what_is_no_list_of_classes(content: Any) -> None:
    assert names_in_checkpoint(content) == ()


def test_asked_names_come_first_and_everything_uses_them(tmp_path: Path) -> None:
    bundle = pcn_deploy.compile(network(), options(precision="fp32", classes=NAMES), calibration=images()).bundle
    assert bundle.manifest.class_names == NAMES
    path = bundle.save(tmp_path / "net.pcn")
    Image.effect_noise((40, 40), 80).save(tmp_path / "noise.png")
    answer = json.loads(invoke("run", path, tmp_path / "noise.png", "--json").stdout)["predictions"][0]
    assert answer["names"] == [NAMES[index] for index in answer["classes"]]
    (tmp_path / "other.txt").write_text("v\nw\nx\ny\nz\n")
    other = json.loads(invoke("run", path, tmp_path / "noise.png", "--json", "--labels", tmp_path / "other.txt").stdout)
    assert other["predictions"][0]["names"] == ["vwxyz"[index] for index in answer["classes"]]
    assert json.loads(invoke("inspect", path, "--json").stdout)["class_names"] == NAMES
    assert "5: ant, bee, cat, dog, elk" in invoke("inspect", path).output


def test_folders_that_judge_give_their_names(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (60, 32, 32, 3), np.uint8)
    transform = Transform(resolution=(32, 32), crop_pct=1.0)
    with torch.no_grad():
        logits = network().eval()(torch.from_numpy(np.stack([transform.normalise(image) for image in pixels])))
    for index, answer in enumerate(logits.argmax(1).tolist()):
        folder = tmp_path / "data" / NAMES[answer]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels[index]).save(folder / f"{index}.png")
    for name in NAMES:
        (tmp_path / "data" / name).mkdir(exist_ok=True)
    built = pcn_deploy.compile(network(), options(precision="fp32", transform=transform), evaluation=tmp_path / "data")
    assert built.bundle.manifest.class_names == NAMES
    assert pcn_deploy.compile(network(), options(precision="fp32")).bundle.manifest.class_names == []
