"""`pcn-compile run`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import invoke, refused
from PIL import Image

import pcn_deploy
from pcn_deploy.show.heatmap import overlay

pytest.importorskip("torch")


def saved_noise(place: Path, size: tuple[int, int], brightest: int) -> Path:
    pixels = np.random.default_rng(0).integers(0, brightest + 1, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(place)
    return place


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return saved_noise(tmp_path / "picture.png", (50, 40), brightest=255)


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


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("labels.txt", "0 ant\n1 bee\n2 cat\n", ["ant", "bee", "cat"]),
        ("labels.txt", "cat,2\nant,0\nbee,1\n", ["ant", "bee", "cat"]),
        ("labels.txt", "2: cat\n", ["0", "1", "cat"]),
        ("labels.txt", "crane\ncrane\ncat\n", ["crane", "crane", "cat"]),
        ("labels.txt", "n02012849 crane\nn03126707 crane\nn02123045 cat\n", None),
        ("config.json", '{"id2label": {"0": "ant", "1": "bee", "2": "cat"}}', ["ant", "bee", "cat"]),
        (
            "index.json",
            '{"0": ["n02219486", "ant"], "1": ["n02206856", "bee"], "2": ["n1", "cat"]}',
            ["ant", "bee", "n1"],
        ),
        ("map.json", '{"cat": 2, "ant": 0, "bee": 1}', ["ant", "bee", "cat"]),
    ],
)
def test_names_are_read_as_the_classes_of_a_build(
    path: Path, image: Path, tmp_path: Path, name: str, text: str, expected: list[str] | None
) -> None:
    (tmp_path / name).write_text(text)
    result = invoke("run", path, image, "--labels", tmp_path / name, "--json")
    assert result.exit_code == 0, result.output
    (found,) = json.loads(result.stdout)["predictions"]
    assert found["names"] == [(expected or text.splitlines())[index] for index in found["classes"]]


def test_names_that_do_not_fit(path: Path, image: Path, tmp_path: Path) -> None:
    labels = tmp_path / "labels.txt"
    labels.write_text("ant\n")
    refused(invoke("run", path, image, "--labels", labels), 1, "names 1 classes; the network has 3.")
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


@pytest.fixture
def dark(tmp_path: Path) -> Path:
    """Dark, so that what glows is the map."""
    return saved_noise(tmp_path / "dark.png", (64, 96), brightest=39)


def test_a_heatmap_of_the_most_likely_class(path_with_map: Path, dark: Path, tmp_path: Path) -> None:
    out = tmp_path / "map.png"
    result = invoke("run", path_with_map, dark, "--heatmap", out, "--json")
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    (found,) = json.loads(result.stdout)["predictions"]
    assert found["heatmap"] == str(out)
    with pcn_deploy.load(path_with_map) as engine, Image.open(dark) as opened:
        image = engine.transform(opened)
        maps = engine.outputs(image[None])["attention_map"][0]
        pictures = [np.asarray(overlay(image, each, engine.transform)) for each in maps]
    with Image.open(out) as written:
        same = [np.array_equal(np.asarray(written), picture) for picture in pictures]
    assert [index for index, equal in enumerate(same) if equal] == found["classes"][:1]
    row, column = np.unravel_index(maps[found["classes"][0]].argmax(), maps[0].shape)
    side = pictures[0].shape[0] // maps.shape[1]
    bright = pictures[found["classes"][0]].astype(float).sum(-1)
    blocks = bright.reshape(maps.shape[1], side, maps.shape[2], side).mean((1, 3))
    assert np.unravel_index(blocks.argmax(), blocks.shape) == (row, column)


def test_heatmaps_of_several_images(path_with_map: Path, dark: Path, image: Path, tmp_path: Path) -> None:
    folder = tmp_path / "new" / "maps"
    result = invoke("run", path_with_map, dark, image, "--heatmap", folder, "--top", 1)
    assert result.exit_code == 0, result.output
    assert f"Wrote {folder / 'dark.png'}: the map of class " in result.stdout
    assert sorted(place.name for place in folder.iterdir()) == ["dark.png", "picture.png"]
    first = (folder / "dark.png").read_bytes()
    assert first != (folder / "picture.png").read_bytes()

    (folder / "dark.png").write_bytes(b"precious")
    words = ["run", path_with_map, dark, image, "--heatmap", folder]
    refused(invoke(*words), 1, "dark.png exists. Give --overwrite")
    assert (folder / "dark.png").read_bytes() == b"precious"
    assert invoke(*words, "--overwrite").exit_code == 0
    assert (folder / "dark.png").read_bytes() == first


def test_what_the_colours_stand_for(path_with_map: Path, dark: Path, tmp_path: Path) -> None:
    out = tmp_path / "map.png"
    given = ["run", path_with_map, dark, "--heatmap", out, "--overwrite"]
    (top,) = json.loads(invoke(*given, "--json").stdout)["predictions"]
    assert top["attention"]["class_index"] == top["classes"][0]
    other = top["classes"][-1]
    pictures = {top["classes"][0]: out.read_bytes()}
    (found,) = json.loads(invoke(*given, "--class", other, "--json").stdout)["predictions"]
    pictures[other] = out.read_bytes()
    with pcn_deploy.load(path_with_map) as engine, Image.open(dark) as opened:
        maps = engine.outputs(engine.transform(opened)[None])["attention_map"][0]
    assert found["attention"] == {
        "class_index": other,
        "smallest": float(maps[other].min()),
        "largest": float(maps[other].max()),
        "uniform": 1 / 96,
        "nearly_flat": False,
    }
    assert found["classes"] == top["classes"], "only the picture is of another class"
    assert pictures[other] != pictures[top["classes"][0]]
    labels = tmp_path / "labels.txt"
    labels.write_text("ant\nbee\ncat\n")
    said = " ".join(invoke(*given, "--class", other, "--labels", labels).stdout.split())
    low, high = maps[other].min(), maps[other].max()
    name = ("ant", "bee", "cat")[other]
    assert f"map.png: the map of class {other} ({name}), weights {low:.2g} to {high:.2g}, 0.01 if all" in said


def test_a_class_that_has_no_map(path: Path, path_with_map: Path, dark: Path, tmp_path: Path) -> None:
    given = ["run", path_with_map, dark, "--heatmap", tmp_path / "map.png"]
    refused(invoke(*given, "--class", 3), 2, "Class 3 has no map: the network has 3 classes. Give --class 0 to 2")
    refused(invoke(*given, "--class", -1), 2, "not in the range x>=0")
    refused(invoke("run", path_with_map, dark, "--class", 1), 2, "a picture that is not drawn. Give --heatmap")
    refused(invoke("run", path, dark, "--class", 1), 2, "Give --heatmap")
    assert not (tmp_path / "map.png").exists()


def test_a_nearly_flat_map_is_called_so(path_with_map: Path, dark: Path, tmp_path: Path) -> None:
    Image.new("RGB", (64, 96), (9, 9, 9)).save(tmp_path / "even.png")
    result = invoke("run", path_with_map, dark, tmp_path / "even.png", "--heatmap", tmp_path / "maps")
    assert result.stderr == f"Note: the map of {tmp_path / 'even.png'} is nearly flat: it singles out no place.\n"
    found = invoke("run", path_with_map, tmp_path / "even.png", "--heatmap", tmp_path / "maps", "--overwrite", "--json")
    assert json.loads(found.stdout)["predictions"][0]["attention"]["nearly_flat"]
    assert found.stderr == ""


def test_no_heatmap_where_none_was_asked_for(path_with_map: Path, dark: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.iterdir())
    found = json.loads(invoke("run", path_with_map, dark, "--json").stdout)
    assert found["predictions"][0]["heatmap"] is None
    assert found["predictions"][0]["attention"] is None
    assert sorted(tmp_path.iterdir()) == before


def test_heatmaps_that_cannot_be(path: Path, path_with_map: Path, dark: Path, image: Path, tmp_path: Path) -> None:
    before = {place: place.read_bytes() for place in tmp_path.iterdir()}
    folder = tmp_path / "maps"
    words = "The bundle holds no attention map. Build it with --with-attention-map"
    refused(invoke("run", path, dark, "--heatmap", folder), 2, words)
    given = ["run", path_with_map]
    refused(invoke(*given, dark, image, "--heatmap", tmp_path / "a.png"), 2, "a.png is one file for 2 images")
    refused(invoke(*given, dark, "--heatmap", tmp_path / "a.gif"), 2, "a.gif: a picture is written as .png")
    refused(invoke(*given, dark, "--heatmap", dark / "sub"), 1, f"{dark} is no folder that can be written to")
    refused(invoke(*given, tmp_path / "no.png", "--heatmap", folder), 1, "cannot be read as an image")
    refused(invoke(*given, dark, "--heatmap", tmp_path, "--overwrite"), 2, "would take the place of the image itself")
    assert {place: place.read_bytes() for place in tmp_path.iterdir()} == before, "nothing is left behind"


def not_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime that answers NaN to all but one flat colour: a fake engine, for our own judgement."""
    from pcn_deploy.engines.onnxruntime import _OnnxRuntimeSession

    real = _OnnxRuntimeSession._run_impl

    def spoiled(self: Any, inputs: Any, out: Any) -> Any:
        found = real(self, inputs, out)
        if any(np.ptp(each, (-1, -2)).any() for each in inputs.values()):
            found["logits"][:, 0] = np.nan
        return found

    monkeypatch.setattr(_OnnxRuntimeSession, "_run_impl", spoiled)


def test_no_answer_is_an_error(path: Path, image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    not_finite(monkeypatch)
    refused(invoke("run", path, image), 3, "NaN or infinite logits", str(image))


def test_images_without_an_answer_do_not_hide_the_others(
    path: Path, image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    not_finite(monkeypatch)
    flat, text = tmp_path / "flat.png", tmp_path / "text.png"
    Image.new("RGB", (64, 64), (9, 9, 9)).save(flat)
    text.write_text("no image")
    result = invoke("run", path, image, flat, text, "--json")
    assert result.exit_code == 3
    no_answer, answer, no_image = json.loads(result.stdout)["predictions"]
    assert (no_answer["image"], no_answer["classes"]) == (str(image), [])
    assert f"NaN or infinite logits for {image}" in no_answer["error"]
    assert (len(answer["classes"]), answer["error"]) == (3, None)
    assert "cannot be read as an image" in no_image["error"]
    assert f"{no_answer['error']}\n{no_image['error']}" in result.stderr
    shown = invoke("run", path, image, flat)
    assert shown.exit_code == 3
    assert "flat.png" in shown.stdout.replace("\n", "")
    assert invoke("run", path, flat, text, "--json").exit_code == 1


def test_the_time_of_no_answer_is_not_told(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    not_finite(monkeypatch)
    result = invoke("bench", path, "--seconds", "0.01", "--json")
    assert result.exit_code == 3
    found = json.loads(result.stdout)
    assert "NaN or infinite logits for random images" in found["skipped"]["cpu"]
    assert "cpu" not in found
    assert "latency_ms" in found["torchscript"]
    assert "NaN or infinite logits for random images" in result.stderr


def test_a_role_may_tell_anything() -> None:
    from pcn_deploy.cli.commands.run import _words

    assert _words({"shape": [4, 8, 8], "age": 31.41592, "unit": "years", "count": 3}) == (
        "shape 4x8x8, age 31.42, unit years, count 3"
    )
