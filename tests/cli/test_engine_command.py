"""`pcn-compile engine`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from helpers import invoke, refused, with_engines_of
from small_builds import needs_rtx

import pcn_deploy
from pcn_deploy import BatchRange, Bundle, CompileOptions, Transform
from pcn_deploy.engines.base import Availability, EngineArtifact
from pcn_deploy.engines.torchscript import TorchScriptBackend
from pcn_deploy.errors import BuildError

pytest.importorskip("torch")


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    network = pcn_deploy.create_model(
        "patchconvnet", random_weights=True, width=32, depth=1, patch=4, num_classes=3, layer_scale=0.5
    )
    options = CompileOptions(
        precision="fp32",
        targets=("cpu", "torchscript"),
        transform=Transform(resolution=(32, 32)),
        batch=BatchRange(min=1, opt=1, max=4),
    )
    bundle = with_engines_of(pcn_deploy.compile(network, options).bundle, "cpu")
    return bundle.save(tmp_path_factory.mktemp("bundle") / "tiny.pcn")


@pytest.fixture
def path(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(original, tmp_path / "tiny.pcn"))


def targets(path: Path) -> list[str]:
    return [entry.target for entry in Bundle.open(path).engines]


def test_an_engine_is_added(path: Path) -> None:
    result = invoke("engine", path, "--target", "torchscript")
    assert result.exit_code == 0, result.output
    assert "Parity with the eager network" in result.stdout
    assert targets(path) == ["cpu", "torchscript"]


def test_an_engine_is_added_to_a_bundle_with_the_attention_map(path_with_map: Path) -> None:
    with_engines_of(Bundle.open(path_with_map), "cpu").save(path_with_map, overwrite=True)
    result = invoke("engine", path_with_map, "--target", "torchscript")
    assert result.exit_code == 0, result.output
    assert "attention map" in result.stdout
    assert targets(path_with_map) == ["cpu", "torchscript"]
    result = invoke("verify", path_with_map, "--target", "torchscript", "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout)["metrics"]["attention_map_sqnr_db"] > 100


def test_json_and_another_output(path: Path, original: Path, tmp_path: Path) -> None:
    out = tmp_path / "more.pcn"
    result = invoke("engine", path, "--target", "torchscript", "-o", out, "--json")
    assert result.exit_code == 0
    assert result.stderr == ""
    found = json.loads(result.stdout)
    assert (found["passed"], found["target"], found["images"]) == (True, "torchscript", 8)
    assert targets(out) == ["cpu", "torchscript"]
    assert path.read_bytes() == original.read_bytes()


def test_outputs_that_cannot_be_written(path: Path, original: Path, tmp_path: Path) -> None:
    given = ["engine", path, "--target", "torchscript", "-q", "-o"]
    out = tmp_path / "precious.pcn"
    out.write_bytes(b"precious")
    refused(invoke(*given, out), 1, "exists. Give --overwrite")
    assert out.read_bytes() == b"precious"
    refused(invoke(*given, tmp_path / "no" / "a.pcn"), 1, "does not exist. Create it")
    refused(invoke(*given, tmp_path), 1, "is a folder")
    assert path.read_bytes() == original.read_bytes()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["precious.pcn", "tiny.pcn"]
    assert invoke(*given, out, "--overwrite").exit_code == 0
    assert targets(out) == ["cpu", "torchscript"]


def test_failed_parity_leaves_the_bundle(path: Path, original: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def spoiled(engine: Any, *rest: Any) -> Any:
        real = engine.outputs
        engine.outputs = lambda images: {"logits": real(images)["logits"][:, ::-1]}
        return pcn_deploy.proof.judgement.verify_golden(engine, *rest)

    monkeypatch.setattr("pcn_deploy.proof.executions.verify_golden", spoiled)
    result = invoke("engine", path, "--target", "torchscript", "--json")
    assert result.exit_code == 3
    assert json.loads(result.stdout)["passed"] is False
    assert f"Parity failed, so {path} was left as it is: " in result.stderr
    assert path.read_bytes() == original.read_bytes()


def test_failures_of_the_backend(path: Path, original: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        msg = "the library says no"
        raise BuildError(msg)

    with monkeypatch.context() as patch:
        patch.setattr(TorchScriptBackend, "_build_impl", refuse)
        refused(invoke("engine", path, "--target", "torchscript", "-q"), 6, "the library says no")
    monkeypatch.setattr(TorchScriptBackend, "_build_impl", lambda *_: EngineArtifact(data=b"no engine"))
    refused(invoke("engine", path, "--target", "torchscript", "-q"), 4, "cannot load this TorchScript module")
    missing = Availability(can_build=False, can_run=False, detail="gone", remedy="pip install 'pcn-deploy[compile]'")
    monkeypatch.setattr(TorchScriptBackend, "availability", lambda self: missing)
    refused(invoke("engine", path, "--target", "torchscript", "-q"), 7, "pip install 'pcn-deploy[compile]'")
    assert path.read_bytes() == original.read_bytes()


def test_a_target_must_be_named(path: Path) -> None:
    refused(invoke("engine", path), 2, "Missing option '--target'")
    refused(invoke("engine", path, "--target", "gpu"), 2, "'gpu' is not one of")


@needs_rtx
def test_an_engine_for_one_gpu(path: Path) -> None:
    words = ["--target", "tensorrt-rtx", "--compute-capability", "SM89", "--compute-capability", "SM86", "--tf32"]
    result = invoke("engine", path, *words)
    assert result.exit_code == 0, result.output
    built_with = Bundle.open(path).engine("tensorrt-rtx").built_with
    assert (built_with["compute_capabilities"], built_with["tf32"]) == ("SM89, SM86", "allowed")


@needs_rtx
def test_a_gpu_that_the_library_does_not_know_is_refused_before_the_long_work(tmp_path: Path) -> None:
    words = ["--random-weights", "--target", "tensorrt-rtx", "--compute-capability", "SM42", "-o", tmp_path / "a.pcn"]
    result = invoke("build", "patchconvnet", *words)
    refused(result, 2, "Compute capabilities asked for: SM42. TensorRT-RTX knows: SM75")
    assert "Rewriting" not in result.output


@pytest.mark.parametrize(("words", "text"), [(["--tf32"], "tf32"), (["--compute-capability", "SM89"], "compute_cap")])
def test_a_setting_that_a_target_has_not_is_refused(path: Path, words: list[str], text: str) -> None:
    refused(invoke("engine", path, "--target", "cpu", *words), 2, text, "a setting of tensorrt", "engines for cpu")
