"""Class folders on the command line: in which order they are taken, who says otherwise, and what stops."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_builds
from helpers import invoke, refused
from PIL import Image

from pcn_deploy import Transform
from pcn_deploy.errors import DataError
from pcn_deploy.proof.budget import prove_budget
from pcn_deploy.verbs.analyze import analyze

pytest.importorskip("torch")

NETWORK = '''
import torch
from torch import nn


class Brightest(nn.Module):
    """Which of three channels is brightest: class 0 is red, 1 green, 2 blue."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Conv2d(3, 3, 1, bias=False)
        self.mix.weight.data.copy_(10 * torch.eye(3)[:, :, None, None])

    def forward(self, x):
        return self.mix(x).mean((2, 3))


def net():
    return Brightest()
'''

WORDS = ("--resolution", 16, "--crop-pct", 1, "--mean", "0.5,0.5,0.5", "--std", "0.2,0.2,0.2", "-q")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("brightest")
    (folder / "net.py").write_text(NETWORK)
    out = folder / "out.pcn"
    assert invoke("build", f"{folder / 'net.py'}:net", "--precision", "fp32", *WORDS, "-o", out).exit_code == 0
    return out


def colours(root: Path, *names: str) -> Path:
    """Twenty red, green and blue images each, in folders of these names."""
    random = np.random.default_rng(0)
    for colour, name in enumerate(names):
        (root / name).mkdir(parents=True)
        for index in range(20):
            pixels = random.integers(0, 150, (16, 16, 3), dtype=np.uint8)
            pixels[..., colour] += 100
            Image.fromarray(pixels).save(root / name / f"{index}.png")
    return root


def test_folders_in_the_order_of_training(bundle: Path, tmp_path: Path) -> None:
    result = invoke("verify", bundle, "--data", colours(tmp_path, "1_red", "2_green", "3_blue"), "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["metrics"]["top1_reference"] == 100


def test_folders_in_another_language_stop_and_classes_mend_it(bundle: Path, tmp_path: Path) -> None:
    data = colours(tmp_path / "images", "rot", "gruen", "blau")
    refused(invoke("verify", bundle, "--data", data), 1, "right on 33.3 %", "in another order", "--classes FILE")
    (tmp_path / "classes.txt").write_text("rot\ngruen\nblau\n")
    result = invoke("verify", bundle, "--data", data, "--classes", tmp_path / "classes.txt", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["metrics"]["top1_reference"] == 100


def test_folders_of_another_network_stop(bundle: Path, tmp_path: Path) -> None:
    data = colours(tmp_path / "images", "1_red", "2_green")
    refused(invoke("verify", bundle, "--data", data), 1, "2 class folders", "the network has 3 classes", "--classes")
    (data / "3_blue").mkdir()
    (data / ".ipynb_checkpoints").mkdir()
    result = invoke("verify", bundle, "--data", data)
    assert result.exit_code == 0, result.output
    assert "1 of the 3 class folders" in result.stderr
    result = invoke("verify", bundle, "--data", data, "--json")
    assert result.stderr == ""
    assert "1 of the 3 class folders" in json.loads(result.stdout)["notes"][0]


def test_few_images_in_folders_that_are_no_classes_are_noted(bundle: Path, tmp_path: Path) -> None:
    """Three cameras that saw the same."""
    data = colours(tmp_path / "images", "1_red", "2_green", "3_blue")
    for camera in range(3):
        (tmp_path / f"cam{camera}").mkdir()
    for index, file in enumerate(sorted(data.glob("*/*.png"))[:45]):
        file.rename(tmp_path / f"cam{index % 3}" / f"{index}.png")
    shutil.rmtree(data)
    data = tmp_path
    result = invoke("verify", bundle, "--data", data)
    assert result.exit_code == 0, result.output
    assert result.stderr.count("so few cannot tell whether the labels are its classes") == 1
    built = ["build", f"{bundle.parent / 'net.py'}:net", "--precision", "fp32", *WORDS, "--data", data]
    result = invoke(*built, "-o", tmp_path / "out.pcn", "--json")
    assert result.exit_code == 0, result.output
    assert any("so few cannot tell" in note for note in json.loads(result.stdout)["notes"])


def test_classes_go_with_data(bundle: Path, tmp_path: Path) -> None:
    result = invoke("verify", bundle, "--classes", tmp_path / "x.txt")
    assert result.exit_code == 2
    assert "--classes and --images go with --data" in result.output


def test_a_build_takes_classes_too(bundle: Path, tmp_path: Path) -> None:
    data = colours(tmp_path / "images", "rot", "gruen", "blau")
    (tmp_path / "classes.json").write_text(json.dumps({"rot": 0, "gruen": 1, "blau": 2}))
    words = ["build", f"{bundle.parent / 'net.py'}:net", "--precision", "fp32", *WORDS, "--data", data]
    words += ["--max-drop", "10", "-o", tmp_path / "out.pcn"]
    refused(invoke(*words), 1, "in another order", "--classes FILE")
    result = invoke(*words, "--classes", tmp_path / "classes.json", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["budget"]["proofs"][0]["top1"] == 100


def test_a_build_tells_which_images_are_answered_otherwise(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every fourth answer of the engine is turned round: a fake, for our own table."""
    data, out = colours(tmp_path / "images", "0_red", "1_green", "2_blue"), tmp_path / "changed.csv"
    words = ["build", f"{bundle.parent / 'net.py'}:net", "--precision", "fp32", *WORDS, "-o", tmp_path / "out.pcn"]
    words += ["--changed", out]
    result = invoke(*words, "--overwrite")
    assert f"{out} was not written: the accuracy was not judged." in result.stdout
    assert not out.exists()
    words += ["--data", data]
    result = invoke(*words, "--overwrite")
    assert f"Wrote {out}: 0 answers of the engines differ." in result.stdout
    refused(invoke(*words[:-4], "--data", data, "-o", tmp_path / "b.pcn", "--changed", out), 1, "path with --changed")

    def spoiled(engine: Any, *given: Any) -> Any:
        real = engine.predict
        engine.predict = lambda images: real(images) * np.where(np.arange(len(images)) % 4, 1, -1)[:, None]
        return prove_budget(engine, *given)

    monkeypatch.setattr("pcn_deploy.verbs.build.prove_budget", spoiled)
    result = invoke(*words, "--overwrite", "--json")
    assert result.exit_code == 3, "the drop is broken, and the table is written all the same"
    rows = list(csv.DictReader(out.read_text().splitlines()))
    assert len(rows) == sum(entry["images"] for entry in json.loads(result.stdout)["changed"]) == 15
    assert {row["target"] for row in rows} == {"cpu"}
    for row in rows:
        assert Path(row["image"]).parent.name == row["true_class"] == row["reference_class"] != row["engine_class"]
    spread = [float(row["reference_margin"]) + float(row["engine_margin"]) for row in rows]
    assert spread == sorted(spread, reverse=True)


def test_labels_that_nobody_asked_for_are_left_and_noted(tmp_path: Path) -> None:
    """Calibration images of other folders than the classes: an analysis without --data needs no labels."""
    data = colours(tmp_path, "1_red", "2_green")
    options = small_builds.options(precision="int8", transform=Transform(resolution=(32, 32), crop_pct=1.0))
    found = analyze(small_builds.network(), options, data, images=8)
    assert found.sensitivity.all_quantized.top1_drop is None
    assert any("labels of the calibration images are not used. " in note and "2 class" in note for note in found.notes)
    with pytest.raises(DataError, match="2 class folders"):
        analyze(small_builds.network(), options, data, evaluation=data, images=8)
