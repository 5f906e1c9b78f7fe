"""`pcn-compile run`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from helpers import invoke, refused
from PIL import Image

import pcn_deploy

pytest.importorskip("torch")


@pytest.fixture
def image(tmp_path: Path) -> Path:
    place = tmp_path / "picture.png"
    pixels = np.random.default_rng(0).integers(0, 256, (50, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(place)
    return place


def test_json(path: Path, image: Path) -> None:
    result = invoke("run", path, image, image, "--json")
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    found = json.loads(result.stdout)
    assert found["target"] == "cpu"
    assert len(found["predictions"]) == 2
    one = found["predictions"][0]
    assert one["image"] == str(image)
    assert sorted(one["classes"]) == [0, 1, 2]
    assert one["probabilities"] == sorted(one["probabilities"], reverse=True)
    assert sum(one["probabilities"]) == pytest.approx(1.0)
    with pcn_deploy.load(path) as engine, Image.open(image) as opened:
        logits = engine(engine.transform(opened)[None])[0]
    assert one["classes"] == np.argsort(-logits).tolist()


def test_both_engines_agree(path: Path, image: Path) -> None:
    found = [
        json.loads(invoke("run", path, image, "--target", name, "--json").stdout) for name in ("cpu", "torchscript")
    ]
    assert [each["target"] for each in found] == ["cpu", "torchscript"]
    one, other = (each["predictions"][0] for each in found)
    assert one["classes"] == other["classes"]
    assert one["probabilities"] == pytest.approx(other["probabilities"], abs=1e-5)


def test_a_table_with_names(path: Path, image: Path, tmp_path: Path) -> None:
    labels = tmp_path / "labels.txt"
    labels.write_text("ant\nbee\ncat\n")
    result = invoke("run", path, image, "--labels", labels, "--top", 2)
    assert result.exit_code == 0
    assert "Most likely classes, by cpu" in result.stdout
    assert sum(name in result.stdout for name in ("ant", "bee", "cat")) == 2


def test_names_that_do_not_fit(path: Path, image: Path, tmp_path: Path) -> None:
    labels = tmp_path / "labels.txt"
    labels.write_text("ant\n")
    refused(invoke("run", path, image, "--labels", labels), 1, "1 class names were given; the network has 3 classes")
    labels.write_bytes(b"\xff\xfe\x00")
    refused(invoke("run", path, image, "--labels", labels), 1, "cannot be read as text in UTF-8")
    refused(invoke("run", path, image, "--labels", tmp_path / "no.txt"), 2, "does not exist")


def test_images_that_cannot_be_read(path: Path, tmp_path: Path) -> None:
    refused(invoke("run", path, tmp_path / "no.png"), 1, "no.png cannot be read as an image")
    (tmp_path / "text.png").write_text("no image")
    refused(invoke("run", path, tmp_path / "text.png"), 1, "text.png cannot be read as an image")
    refused(invoke("run", path), 2, "Missing argument")


def test_a_target_the_bundle_lacks(path: Path, image: Path) -> None:
    refused(invoke("run", path, image, "--target", "tensorrt"), 5, "no engine for 'tensorrt'")
