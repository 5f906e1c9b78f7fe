"""`pcn-compile build`: calibrators, the cache, notes, and several processes under torchrun."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import invoke, refused

import pcn_deploy
from pcn_deploy import Bundle

torch = pytest.importorskip("torch")

SMALL = ["patchconvnet", "--precision", "int8", "--resolution", "32", "--batch", "1:1:8"]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """Weights and labelled images."""
    folder = tmp_path_factory.mktemp("given")
    network = pcn_deploy.create_model(
        "patchconvnet", random_weights=True, width=32, depth=1, patch=4, num_classes=5, layer_scale=0.5
    )
    torch.save(network.state_dict(), folder / "tiny.pth")
    random = np.random.default_rng(0)
    images = random.standard_normal((45, 3, 32, 32), dtype=np.float32)
    np.savez(folder / "images.npz", images=images, labels=random.integers(0, 5, 45))
    return [*SMALL, "--weights", folder / "tiny.pth", "--calibration", folder / "images.npz"]


def record(path: Path) -> Any:
    return Bundle.open(path).read_json("calibration.json")


def test_the_cache_is_made_and_used(given: list[Any], tmp_path: Path) -> None:
    cache, bundles = tmp_path / "cache.json", [tmp_path / f"{name}.pcn" for name in ("a", "b", "c")]
    for bundle, words in zip(bundles, (["max"], ["mse"], ["max"]), strict=True):
        result = invoke("build", *given, "-o", bundle, "--calibrator", *words, "--calibration-cache", cache)
        assert result.exit_code == 0, result.output
    made, other, again = map(record, bundles)
    assert made == again
    assert json.loads(cache.read_text())["histograms"] == made["histograms"] == other["histograms"]
    assert (other["calibrator"], other["images"]) == ("mse", 45)
    assert all(0 < other["ranges"][path] < amax for path, amax in made["amax"].items())
    assert set(made["scales"]) == set(made["ranges"])

    from_bundle = tmp_path / "d.pcn"
    result = invoke("build", *given, "-o", from_bundle, "--calibrator", "mse", "--calibration-cache", bundles[0])
    assert result.exit_code == 0, result.output
    assert record(from_bundle) == other

    result = invoke("build", *given, "-o", tmp_path / "e.pcn", "--images", 44, "-q", "--calibration-cache", cache)
    refused(result, 1, "cache.json was made for something else: this run has 44 images instead of 45", "Delete it")
    cache.write_text("no calibration")
    result = invoke("build", *given, "-o", tmp_path / "e.pcn", "-q", "--calibration-cache", cache)
    refused(result, 1, "cache.json is not a calibration")
    assert not (tmp_path / "e.pcn").exists()


def test_options_of_calibrators(given: list[Any], tmp_path: Path) -> None:
    out = tmp_path / "a.pcn"
    words = [
        "--calibrator",
        "percentile",
        "--percentile",
        "99",
        "--weight-calibrator",
        "mse",
        "--images",
        "8",
        "--json",
    ]
    result = invoke("build", *given, "-o", out, *words)
    assert result.exit_code == 0, result.output
    about_labels, *others = json.loads(result.stdout)["notes"]
    assert "of the 37 labelled images" in about_labels  # held out, and the network is not trained
    assert others == Bundle.open(out).manifest.calibration["notes"] == record(out)["notes"]
    assert record(out)["notes"][0].startswith("only 8 images")
    assert (record(out)["calibrator"], record(out)["percentile"]) == ("percentile", 99)
    assert result.stderr == ""
    for words, text in (
        (["--percentile", "99"], "--percentile goes with --calibrator percentile"),
        (["--calibrator", "percentile", "--percentile", "40"], "Percentile 40.0: expected"),
        (["--weight-calibrator", "entropy"], "'entropy' is not one of"),
    ):
        refused(invoke("build", *given, "-o", tmp_path / "b.pcn", *words), 2, text)


def test_few_images_are_noted(given: list[Any], tmp_path: Path) -> None:
    result = invoke("build", *given, "-o", tmp_path / "a.pcn", "--images", 1)
    assert result.exit_code == 0, result.output
    assert "Note: only 1 image: the ranges are guesses" in result.stderr


def start(*words: object, **variables: str) -> subprocess.Popen[str]:
    kept = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
    ours = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": os.pathsep.join(sys.path)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, *map(str, words)], env={**kept, **ours, **variables}, **pipes)  # type: ignore[call-overload,no-any-return]


def finish(process: subprocess.Popen[str]) -> str:
    output, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    return output


def test_torchrun_builds_and_verifies_what_one_process_does(given: list[Any], tmp_path: Path) -> None:
    one, three, main = tmp_path / "one.pcn", tmp_path / "three.pcn", ["-m", "pcn_deploy.cli.main"]
    builds = [start(*run, *main, "build", *given, "-o", out) for run, out in (([], one), ([*TORCHRUN, 3], three))]
    alone, shared = map(finish, builds)
    assert shared.replace("three.pcn", "one.pcn") == alone
    assert record(three) == record(one)
    assert Bundle.open(three).read("model.onnx") == Bundle.open(one).read("model.onnx")
    words = ["--data", given[-1], "--json"]
    alone, shared = map(finish, [start(*run, *main, "verify", one, *words) for run in ([], [*TORCHRUN, 2])])
    assert shared == alone
    assert json.loads(alone)["images"] == 45


NARROW = """
from torch import Tensor, nn

class Net(nn.Module):
    def __init__(self, num_classes: int = 3) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 9, stride=4)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).mean((2, 3))
"""


def test_processes_agree_that_int8_is_not_possible(given: list[Any], tmp_path: Path) -> None:
    (tmp_path / "narrow.py").write_text(NARROW)
    words = [f"{tmp_path / 'narrow.py'}:Net", "--random-weights", "--resolution", "32", "--precision", "auto"]
    out = tmp_path / "a.pcn"
    run = start(*TORCHRUN, 2, "-m", "pcn_deploy.cli.main", "build", *words, *given[-2:], "-o", out)
    assert "INT8 is not possible: No layer of this network gains from INT8" in " ".join(finish(run).split())
    assert Bundle.open(out).manifest.precision == "fp16"


def test_all_processes_exit_with_the_code_of_the_first(given: list[Any], tmp_path: Path) -> None:
    """Ranges of half the magnitudes clip so much that parity fails; process 0 alone sees and says it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    words = ["-m", "pcn_deploy.cli.main", "build", *given, "--calibrator", "percentile", "--percentile", "50.1", "-q"]
    started = [start(*words, "-o", tmp_path / "a.pcn", **place, RANK=str(rank)) for rank in range(2)]
    (_, first), other = (process.communicate(timeout=240) for process in started)
    assert [process.returncode for process in started] == [3, 3], first
    assert "Parity failed" in first
    assert other[0] == ""
    assert not [line for line in other[1].splitlines() if not line.startswith("[Gloo]")], "torch 2.9 says so there"
    assert list(tmp_path.iterdir()) == []
