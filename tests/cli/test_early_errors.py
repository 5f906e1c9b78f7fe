"""What a command is given is looked at before anything long: files that are not there, folders that are no class."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import invoke, refused
from PIL import Image

WITHOUT_TORCH = """
import json, sys
sys.modules["torch"] = None  # importing it fails
from click.testing import CliRunner
from pcn_deploy.cli.main import main
results = [CliRunner().invoke(main, words) for words in json.loads(sys.argv[1])]
print(json.dumps([[result.exit_code, result.stderr] for result in results]))
"""


def without_torch(*commands: list[Any]) -> list[tuple[int, str]]:
    """Exit code and stderr of each command, in a process that cannot import torch: nothing can make a network."""
    words = json.dumps([[str(word) for word in command] for command in commands])
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, words], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return [(code, " ".join(text.split())) for code, text in json.loads(done.stdout)]


def folder(root: Path, *names: str, content: bytes = b"no image") -> Path:
    """A folder for each class, each with one file that ends like an image."""
    for name in names:
        (root / name).mkdir(parents=True)
        (root / name / "0.png").write_bytes(content)
    return root


@pytest.fixture
def given(tmp_path: Path) -> dict[str, Path]:
    """What is right, so that one thing at a time can be wrong."""
    (tmp_path / "tiny.pth").write_bytes(b"weights")
    (tmp_path / "classes.txt").write_text("ant\nbee\n")
    (tmp_path / "cut.json").write_text("{")
    (tmp_path / "empty").mkdir()
    folder(tmp_path / "images", "ant", "bee")
    folder(tmp_path / "extra", "ant", "bee", "wasp")
    names = ("tiny.pth", "classes.txt", "cut.json", "empty", "images", "extra", "no")
    return {name.partition(".")[0]: tmp_path / name for name in names}


def test_files_and_folders_are_looked_at_before_torch_is_imported(given: dict[str, Path], tmp_path: Path) -> None:
    no, images, out = given["no"], given["images"], tmp_path / "out.x"
    network = ["patchconvnet", "--weights", given["tiny"], "--resolution", 32, "-o", out]
    build, analyze = ["build", *network, "--precision", "int8"], ["analyze", *network]
    wrong: list[tuple[list[Any], str]] = []
    for command in (build, analyze):
        right = [*command, "--calibration", images]
        wrong += [
            ([*command, "--calibration", no], f"'{no}' is neither a folder of images nor an .npz file: there is"),
            ([*command, "--calibration", given["empty"]], f"No images in {given['empty']}"),
            ([*right, "--data", no], f"'{no}' is neither a folder"),
            ([*right, "--classes", no], f"The classes {no} cannot be read"),
            ([*right, "--data", given["extra"], "--classes", given["classes"]], "The folder 'wasp' is not in"),
            ([*right, "--weights", no], f"Weights file '{no}' cannot be read: No such file"),
            ([*right, "-o", no / "out.x"], f"The folder {no} does not exist"),
        ]
        wrong.append(([command[0], f"{no}.py:Net", "-o", out, "--calibration", images], f"there is no file {no}.py"))
    wrong += [
        ([*build, "--calibration", images, "--recipe", no], f"The recipe {no} cannot be read"),
        ([*build, "--calibration", images, "--calibration-cache", no / "x.json"], f"{no} is no folder"),
        ([*build, "--calibration", images, "--calibration-cache", given["cut"]], "cut.json"),
        ([*analyze, "--calibration", images, "--picture", no / "x.png"], f"The folder {no} does not exist"),
        (["verify", no, "--data", no], f"'{no}' is neither a folder"),
        (["verify", no, "--data", images, "--weights", no], f"Weights file '{no}' cannot be read"),
        (["verify", no, "--data", images, "--classes", no], f"The classes {no} cannot be read"),
        (["verify", no, "--data", images, "--changed", no / "x.csv"], f"The folder {no} does not exist"),
        *(([command, no], "does not exist") for command in ("verify", "inspect", "bench")),
        (["engine", no, "--target", "cpu"], "does not exist"),
        (["run", no, given["cut"]], "does not exist"),
        (["run", no, given["cut"], "--labels", no], f"File '{no}' does not exist"),
        (["run", no, given["cut"], "--heatmap", given["cut"] / "x"], f"{given['cut']} is no folder"),
    ]
    for (words, expected), (code, said) in zip(wrong, without_torch(*(words for words, _ in wrong)), strict=True):
        assert code in (1, 2, 5), (words, said)
        assert expected.lower() in said.lower(), (words, said)
        assert "torch is not installed" not in said
    assert not out.exists()


FACTORY = """
from torch import nn
import torch

class Net(nn.Module):
    def __init__(self, num_classes=2):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 8, stride=8)
        self.head = nn.Linear(16, num_classes)
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.stem(x).mean((2, 3)))
"""


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Two classes of images that can be read."""
    random = np.random.default_rng(0)
    for name in ("ant", "bee"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for index in range(2):
            pixels = random.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / name / f"{index}.png")
    return tmp_path / "photos"


def test_a_folder_that_is_no_class_is_named_before_an_image_is_read(
    given: dict[str, Path], photos: Path, tmp_path: Path
) -> None:
    """The images of the folder with one class too many are none: to read one would be another error."""
    pytest.importorskip("torch")
    (tmp_path / "own.py").write_text(FACTORY)
    words = [f"{tmp_path / 'own.py'}:Net", "--resolution", 32, "-o", tmp_path / "out.pcn", "-q"]
    named = "3 class folders (ant, bee, wasp); the network has 2 classes. Not among its classes: 'wasp'."
    for command in ("build", "analyze"):
        result = invoke(command, *words, "--calibration", photos, "--data", given["extra"])
        refused(result, 1, named)
    result = invoke("build", *words, "--calibration", photos)
    assert result.exit_code == 0, result.output
    refused(invoke("verify", tmp_path / "out.pcn", "--data", given["extra"], "-q"), 1, "3 class folders", "wasp")


def test_a_file_of_classes_that_does_not_fit_is_told_by_both_counts(photos: Path, tmp_path: Path) -> None:
    """Also where no folder is judged by it: its names would be put into the bundle."""
    pytest.importorskip("torch")
    (tmp_path / "own.py").write_text(FACTORY)
    (tmp_path / "classes.txt").write_text("ant\nbee\nwasp\n")
    np.savez(tmp_path / "images.npz", images=np.zeros((2, 3, 32, 32), np.float32))
    words = [f"{tmp_path / 'own.py'}:Net", "--resolution", 32, "--classes", tmp_path / "classes.txt", "-q"]
    for command in ("build", "analyze"):
        result = invoke(command, *words, "-o", tmp_path / "out.x", "--calibration", tmp_path / "images.npz")
        refused(result, 1, "names 3 classes; the network has 2.")
