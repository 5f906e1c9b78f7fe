"""`pcn-compile analyze`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import invoke, refused
from PIL import Image
from small_builds import images, network

WORDS = ("analyze", "patchconvnet", "--weights")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Weights of a small network, and images."""
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("analyze")
    save_file(network().state_dict(), folder / "small.safetensors")
    np.savez(folder / "images.npz", images=images(24))
    return {"folder": folder, "weights": folder / "small.safetensors", "images": folder / "images.npz"}


def words(files: dict[str, Path], output: Path, *more: Any) -> list[Any]:
    given = [*WORDS, files["weights"], "--calibration", files["images"], "--resolution", 32, "-o", output]
    return [*given, "--sample", 8, *more]


def test_file_table_and_picture(files: dict[str, Path], tmp_path: Path) -> None:
    output, picture = tmp_path / "out.json", tmp_path / "out.png"
    result = invoke(*words(files, output, "--picture", picture))
    assert result.exit_code == 0, result.output
    found = json.loads(output.read_text())
    assert found["images"] == 8
    assert [one["op"] for one in found["layers"]] != found["order"]
    assert {one["op"] for one in found["layers"]} == set(found["order"])
    alone = [one["only_quantized"]["sqnr_db"] for one in found["layers"]]
    assert alone == sorted(alone)
    assert "blocks.0.norm1" in found["unquantized"]
    assert found["layers"][0]["op"] in result.stdout
    assert f"Wrote {output}: the measurements" in result.stdout
    with Image.open(picture) as drawn:
        pixels = np.asarray(drawn.convert("RGB"))
    assert pixels.shape[0] > 400 < pixels.shape[1]
    blue = np.all(pixels == (0x00, 0x72, 0xB2), axis=2)
    assert blue.mean() > 0.05, "bars"
    assert not output.with_name("out.json.partial").exists()


def test_json(files: dict[str, Path], tmp_path: Path) -> None:
    result = invoke(*words(files, tmp_path / "out.json", "--json"))
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    assert json.loads(result.stdout) == json.loads((tmp_path / "out.json").read_text())


def test_a_killed_run_goes_on(files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pcn_deploy.calibration.search.simulate import Simulation

    whole = tmp_path / "whole.json"
    assert invoke(*words(files, whole)).exit_code == 0
    real, left = Simulation.logits, [12]

    def dying(self: Simulation, *given: Any, **named: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return real(self, *given, **named)

    output = tmp_path / "out.json"
    monkeypatch.setattr(Simulation, "logits", dying)
    assert invoke(*words(files, output)).exit_code != 0
    assert not output.exists()
    monkeypatch.undo()
    result = invoke(*words(files, output))
    assert result.exit_code == 0, result.output
    assert "measurements were taken over from the run before" in result.stdout
    assert output.read_text() == whole.read_text()


@pytest.mark.parametrize(
    ("more", "code", "words_expected"),
    [
        (("--calibrator", "guess"), 2, ("'guess' is not one of",)),
        (("--picture", "out.xyz"), 1, ("out.xyz: a picture ends in .png",)),
        (("--data", "nowhere"), 1, ("nowhere", "neither a folder of images nor an .npz")),
    ],
)
def test_bad_input(
    files: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    more: tuple[str, ...],
    code: int,
    words_expected: tuple[str, ...],
) -> None:
    monkeypatch.chdir(tmp_path)
    refused(invoke(*words(files, tmp_path / "out.json", *more)), code, *words_expected)


def test_without_images_or_weights(files: dict[str, Path], tmp_path: Path) -> None:
    output = tmp_path / "out.json"
    refused(invoke(*WORDS, files["weights"], "-o", output, "--resolution", 32), 1, "--calibration DIR or FILE.npz")
    refused(invoke("analyze", "patchconvnet_s60", "-o", output), 2, "--weights")


def test_an_output_is_not_overwritten(files: dict[str, Path], tmp_path: Path) -> None:
    output = tmp_path / "out.json"
    output.write_text("mine")
    refused(invoke(*words(files, output)), 1, "--overwrite")
    assert output.read_text() == "mine"
