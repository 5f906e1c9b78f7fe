"""`pcn-compile verify`."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from helpers import invoke, refused
from PIL import Image

import pcn_deploy
from pcn_deploy import Bundle
from pcn_deploy.cli.main import main
from pcn_deploy.engines.base import Availability
from pcn_deploy.engines.onnxruntime import OnnxRuntimeBackend, _OnnxRuntimeSession
from pcn_deploy.engines.torchscript import TorchScriptBackend
from pcn_deploy.errors import IncompatibleError

torch = pytest.importorskip("torch")


METRICS = {
    "cosine_min",
    "cosine_judged",
    "sqnr_db",
    "sqnr_differences_db",
    "max_abs_error",
    "top1_agreement",
    "non_finite",
}
CHANGES = {"sqnr_changes_db", "changes_kept_db"}
LABELLED = {"top1_reference", "top1_engine", "top1_drop", "top1_drop_bound", "top1_lost", "top1_gained"}


def test_the_golden_set(path: Path) -> None:
    result = invoke("verify", path)
    assert result.exit_code == 0, result.output
    assert "Parity with the eager network on golden" in result.stdout
    assert "passed" in result.stdout


@pytest.mark.parametrize("target", ["cpu", "torchscript"])
def test_json_keeps_its_keys(path: Path, target: str) -> None:
    result = invoke("verify", path, "--target", target, "--json")
    assert result.exit_code == 0
    assert result.stderr == ""
    found = json.loads(result.stdout)
    assert (found["passed"], found["target"], found["images"]) == (True, target, 8)
    assert set(found["metrics"]) == METRICS | CHANGES | {"edge_cosine_min", "edge_sqnr_db"}


@pytest.fixture
def from_weights(tmp_path: Path) -> tuple[Path, Path]:
    """A bundle that knows its weights, and the weights."""
    network = pcn_deploy.create_model(
        "patchconvnet", random_weights=True, width=32, depth=1, patch=4, num_classes=3, layer_scale=0.5
    )
    weights, out = tmp_path / "tiny.pth", tmp_path / "built.pcn"
    torch.save(network.state_dict(), weights)
    words = ["--resolution", "32", "--precision", "fp32", "--batch", "1:1:4", "-q", "-o", out]
    assert invoke("build", "patchconvnet", "--weights", weights, *words).exit_code == 0
    return out, weights


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    random = np.random.default_rng(0)
    for label in "012":
        (tmp_path / "images" / label).mkdir(parents=True)
        for index in range(2):
            pixels = random.integers(0, 256, (40, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / label / f"{index}.png")
    return tmp_path / "images"


def test_labelled_images_with_the_weights(from_weights: tuple[Path, Path], folder: Path, tmp_path: Path) -> None:
    bundle, weights = from_weights
    result = invoke("verify", bundle, "--data", folder, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert set(found["metrics"]) == METRICS | LABELLED | CHANGES
    assert (found["images"], found["data"]) == (6, str(folder))
    assert "top-1: eager" in invoke("verify", bundle, "--data", folder).stdout
    assert json.loads(invoke("verify", bundle, "--data", folder, "--images", 3, "--json").stdout)["images"] == 3

    moved = weights.rename(tmp_path / "moved.pth")
    refused(invoke("verify", bundle, "--data", folder), 1, "Say where they are: --weights FILE")
    assert invoke("verify", bundle, "--data", folder, "--weights", moved).exit_code == 0
    moved.write_bytes(moved.read_bytes() + b"x")
    refused(invoke("verify", bundle, "--data", folder, "--weights", moved), 1, "Give the same checkpoint")


def test_a_network_from_memory_has_no_weights(path: Path, folder: Path) -> None:
    refused(invoke("verify", path, "--data", folder), 1, "from a network in memory")


def test_data_that_is_not_there(from_weights: tuple[Path, Path], tmp_path: Path) -> None:
    refused(invoke("verify", from_weights[0], "--data", tmp_path / "no"), 1, "neither a folder of images nor an .npz")


def spoil(path: Path) -> None:
    """Give the bundle the golden outputs of another network."""
    bundle = Bundle.open(path)
    golden = bundle.read_arrays("golden.npz")
    with (path.parent / "golden.npz").open("wb") as file:
        np.savez(file, images=golden["images"], logits=golden["logits"][:, ::-1])
    bundle.add("golden.npz", (path.parent / "golden.npz").read_bytes())
    bundle.save(path, overwrite=True)


def test_failed_parity(path: Path) -> None:
    spoil(path)
    result = invoke("verify", path)
    assert result.exit_code == 3
    assert "FAILED" in result.stdout
    assert "Error: Parity failed: cosine" in result.stderr
    assert "Traceback" not in result.output
    result = invoke("verify", path, "--json")
    assert result.exit_code == 3
    found = json.loads(result.stdout)
    assert found["passed"] is False
    assert found["failures"]


def test_a_failure_of_the_attention_map_alone(path_with_map: Path) -> None:
    bundle = Bundle.open(path_with_map)
    golden, arrays = bundle.read_arrays("golden.npz"), path_with_map.parent / "golden.npz"
    wrong = golden["attention_map"][:, ::-1]
    np.savez(arrays, images=golden["images"], logits=golden["logits"], attention_map=wrong)
    bundle.add("golden.npz", arrays.read_bytes())
    bundle.save(path_with_map, overwrite=True)
    result = invoke("verify", path_with_map)
    assert result.exit_code == 3
    assert "Error: Parity failed: attention map: cosine" in result.stderr
    rows = [line.split("│") for line in result.stdout.splitlines() if "FAILED" in line]
    assert [row[1].strip() for row in rows] == ["cpu", "attention map"]


@pytest.mark.parametrize("option", [["--weights", "w.pth"], ["--images", "4"]])
def test_options_of_data_without_data(path: Path, option: list[str]) -> None:
    result = CliRunner().invoke(main, ["verify", str(path), *option])
    assert result.exit_code == 2
    assert "go with --data" in result.stderr


def test_a_target_the_bundle_lacks(path: Path) -> None:
    words = "holds: cpu, torchscript. Add one with: pcn-compile engine"
    refused(invoke("verify", path, "--target", "tensorrt"), 5, "no engine for 'tensorrt'", words)


def test_an_engine_that_does_not_fit(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        msg = "built for another device"
        raise IncompatibleError(msg)

    monkeypatch.setattr(OnnxRuntimeBackend, "_open_impl", refuse)
    refused(invoke("verify", path), 4, "built for another device")


def test_an_engine_that_cannot_run_here_is_verified_by_its_graph(path: Path, tmp_path: Path) -> None:
    """The bytes are a fake plan: nothing opens them."""
    bundle = Bundle.open(path)
    names = [name for name in bundle.manifest.members if name not in ("model.ts", "engines/tensorrt.engine")]
    members = {name: bundle.read(name) for name in names}
    only = Bundle(replace(bundle.manifest, members={}, engines=[]), members)
    only.add_engine("tensorrt", "engines/tensorrt.engine", b"a plan", {})
    only.save(tmp_path / "only.pcn")
    result = invoke("verify", tmp_path / "only.pcn")
    assert result.exit_code == 0, result.output
    assert "tensorrt (run by cpu)" in result.stdout
    assert "ONNX Runtime runs the graph that the tensorrt engine was built from" in " ".join(result.stderr.split())
    report = json.loads(invoke("verify", tmp_path / "only.pcn", "--target", "tensorrt", "--json").stdout)
    assert (report["target"], report["executed_by"], report["passed"]) == ("tensorrt", "cpu", True)
    refused(invoke("run", tmp_path / "only.pcn", tmp_path / "no.png"), 7, "None of the engines")


def test_a_missing_library(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = Availability(can_build=False, can_run=False, detail="gone", remedy="pip install 'pcn-deploy[runtime]'")
    for backend in (OnnxRuntimeBackend, TorchScriptBackend):
        monkeypatch.setattr(backend, "availability", lambda self: missing)
    refused(invoke("verify", path), 7, "None of the engines", "cpu: gone. pip install 'pcn-deploy[runtime]'")


def test_a_drop_that_is_none(path: Path) -> None:
    refused(invoke("verify", path, "--max-drop", "-1"), 2, "--max-drop -1.0")


def test_images_with_another_answer(
    from_weights: tuple[Path, Path], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ONNX Runtime that turns one answer round: a fake engine, for our own table."""
    real = _OnnxRuntimeSession._run_impl
    out, (bundle, _) = tmp_path / "changed.csv", from_weights
    assert "0 images with another answer" in invoke("verify", bundle, "--data", folder, "--changed", out).stdout
    assert len(out.read_text().splitlines()) == 1
    refused(invoke("verify", bundle, "--data", folder, "--changed", out), 1, "exists")

    def turned(self: Any, inputs: Any, arrays: Any) -> Any:
        logits = real(self, inputs, {})["logits"].copy()
        logits[-1] = -logits[-1]
        return {"logits": logits}

    monkeypatch.setattr(_OnnxRuntimeSession, "_run_impl", turned)
    given = ("verify", bundle, "--data", folder, "--changed", out, "--overwrite", "--json")
    counted = json.loads(invoke(*given).stdout)["changed"]
    rows = out.read_text().splitlines()[1:]
    assert 0 < len(rows) == sum(entry["images"] for entry in counted)
    _, image, label, *_ = rows[0].split(",")
    assert Path(image).parent.name == label
