"""Which weights a bundle was built from is said, kept and checked; what a network prints does not spoil the result."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers import invoke, refused
from PIL import Image

torch = pytest.importorskip("torch")

NETWORK = """
import os

import torch
from torch import nn

print("importing")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.head = nn.Linear(3, 2)

    def forward(self, x):
        return self.head(self.conv(x).mean((2, 3)))


def net():
    print("made")
    os.write(1, b"below Python\\n")
    made = Net()
    made.load_state_dict(torch.load(os.path.join(os.path.dirname(__file__), "inside.pth")))
    return made
"""

WORDS = ("--precision", "fp32", "--resolution", 8, "--crop-pct", 1)


def state(value: float) -> dict[str, Any]:
    return {
        "conv.weight": value * torch.eye(3)[..., None, None],
        "conv.bias": torch.zeros(3),
        "head.weight": torch.tensor([[1.0, 2, 3], [3, 2, 1]]),
        "head.bias": torch.zeros(2),
    }


@pytest.fixture
def model(tmp_path: Path) -> str:
    (tmp_path / "net.py").write_text(NETWORK)
    torch.save(state(1.0), tmp_path / "inside.pth")
    return f"{tmp_path / 'net.py'}:net"


def test_what_the_factory_brings_is_said_kept_and_checked(model: str, tmp_path: Path) -> None:
    out = tmp_path / "out.pcn"
    result = invoke("build", model, *WORDS, "-o", out)
    assert result.exit_code == 0, result.output
    assert "Note: no --weights were given: the network has the weights that" in result.stderr
    kept = json.loads(invoke("inspect", out, "--json").stdout)["provenance"]
    assert kept["weights_from"] == "factory"
    table = invoke("inspect", out).stdout
    assert "what the factory made or loaded (no --weights)" in table
    assert (
        kept["network_sha256"][:40] in table.replace("│", "").replace("\n", "").replace(" ", "")
        or "network_sha256" in table
    )
    (tmp_path / "images").mkdir()
    Image.new("RGB", (8, 8), (1, 2, 3)).save(tmp_path / "images" / "x.png")
    assert invoke("verify", out, "--data", tmp_path / "images").exit_code == 0
    torch.save(state(2.0), tmp_path / "inside.pth")
    refused(invoke("verify", out, "--data", tmp_path / "images", "-q"), 1, "is made with other weights now")


def test_every_kind_of_build_keeps_the_digest_of_its_weights(model: str, tmp_path: Path) -> None:
    torch.save(state(3.0), tmp_path / "net.pth")
    found = {}
    for name, words in (
        ("file", ["--weights", tmp_path / "net.pth"]),
        ("factory", []),
        ("random", ["--random-weights"]),
    ):
        out = tmp_path / f"{name}.pcn"
        assert invoke("build", model, *words, *WORDS, "-q", "-o", out).exit_code == 0
        kept = json.loads(invoke("inspect", out, "--json").stdout)["provenance"]
        assert kept["weights_from"] == name
        found[name] = kept["network_sha256"]
    assert found["random"] == found["factory"] != found["file"], "this factory has the same weights whatever is asked"


def test_an_average_is_noted_kept_and_taken_again(model: str, tmp_path: Path) -> None:
    torch.save({"state_dict": state(1.0), "state_dict_ema": state(5.0)}, tmp_path / "net.pth")
    Image.new("RGB", (8, 8), (1, 2, 3)).save(tmp_path / "x.png")
    digests = set()
    for which, kind in (("auto", "ema"), ("raw", "raw")):
        out = tmp_path / f"{which}.pcn"
        words = ["--weights", tmp_path / "net.pth", "--checkpoint-weights", which, *WORDS, "--json", "-o", out]
        result = invoke("build", model, *words)
        assert result.exit_code == 0, result.output
        assert any("holds averaged weights ('state_dict_ema')" in note for note in json.loads(result.stdout)["notes"])
        kept = json.loads(invoke("inspect", out, "--json").stdout)["provenance"]
        assert kept["checkpoint_weights"] == kind
        digests.add(kept["network_sha256"])
        (tmp_path / "images").mkdir(exist_ok=True)
        Image.new("RGB", (8, 8), (1, 2, 3)).save(tmp_path / "images" / "x.png")
        assert invoke("verify", out, "--data", tmp_path / "images").exit_code == 0
    assert len(digests) == 2


def test_a_network_that_prints_does_not_spoil_json(
    model: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    result = invoke("build", model, *WORDS, "--json", "-o", tmp_path / "out.pcn")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["passed"]
    assert "made" in result.stderr
    below = capfd.readouterr()
    assert "below Python" not in below.out
    assert "below Python" in below.err
