"""Adding an engine to a bundle."""

from __future__ import annotations

import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import copied, with_engines_of

import pcn_deploy
from pcn_deploy import BatchRange, Bundle, CompileOptions, Transform
from pcn_deploy.engines.base import EngineArtifact
from pcn_deploy.engines.registry import get_backend
from pcn_deploy.engines.torchscript import TorchScriptBackend
from pcn_deploy.errors import BuildError, BundleError, OptionError, OutputError
from pcn_deploy.verbs.engine import add_engine

pytest.importorskip("torch")


def built(seed: int = 0) -> Bundle:
    """With the engine of `cpu`, and a TorchScript module that no engine is made of yet."""
    network = pcn_deploy.create_model(
        "patchconvnet", random_weights=True, width=32, depth=1, patch=4, num_classes=3, layer_scale=0.5, seed=seed
    )
    options = CompileOptions(
        precision="fp32",
        targets=("cpu", "torchscript"),
        transform=Transform(resolution=(32, 32)),
        batch=BatchRange(min=1, opt=1, max=2),
    )
    return with_engines_of(pcn_deploy.compile(network, options).bundle, "cpu")


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built().save(tmp_path_factory.mktemp("bundle") / "tiny.pcn")


@pytest.fixture
def path(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(original, tmp_path / "tiny.pcn"))


def test_an_engine_is_added_in_place(path: Path) -> None:
    before = Bundle.open(path)
    report = add_engine(path, "torchscript")
    assert report
    assert (report.target, report.executed_by, report.images) == ("torchscript", "torchscript", 8)
    after = Bundle.open(path)
    assert [entry.target for entry in after.engines] == ["cpu", "torchscript"]
    assert after.read_json("parity/torchscript.json") == report.to_json()
    assert before.manifest.members.items() <= after.manifest.members.items()
    images = np.zeros((2, 3, 32, 32), np.float32)
    with pcn_deploy.load(path, "cpu") as one, pcn_deploy.load(path, "torchscript") as other:
        np.testing.assert_allclose(one(images), other(images), atol=1e-5)


def test_adding_twice_replaces(path: Path) -> None:
    add_engine(path, "cpu")
    assert [entry.target for entry in Bundle.open(path).engines] == ["cpu"]


def test_another_output_leaves_the_file_alone(path: Path, original: Path, tmp_path: Path) -> None:
    output = tmp_path / "more.pcn"
    assert add_engine(path, "torchscript", output=output)
    assert path.read_bytes() == original.read_bytes()
    assert len(Bundle.open(output).engines) == 2


def test_an_existing_output_is_kept_unless_told(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "precious.pcn"
    output.write_bytes(b"precious")
    with monkeypatch.context() as patch:
        patch.setattr(TorchScriptBackend, "_build_impl", lambda *_: pytest.fail("built for nothing"))
        with pytest.raises(OutputError, match=r"Give --overwrite"):
            add_engine(path, "torchscript", output=output)
    assert output.read_bytes() == b"precious"
    assert add_engine(path, "torchscript", output=output, overwrite=True)
    assert len(Bundle.open(output).engines) == 2


@pytest.mark.skipif(find_spec("tensorrt_rtx") is None, reason="TensorRT-RTX is not installed")
def test_an_engine_that_cannot_run_here_is_proven_through_the_graph(path: Path) -> None:
    report = add_engine(path, "tensorrt-rtx")
    assert report
    runs = get_backend("tensorrt-rtx").availability().can_run
    assert report.executed_by == ("tensorrt-rtx" if runs else "cpu")
    assert Bundle.open(path).engine("tensorrt-rtx").member == "engines/tensorrt-rtx.engine"


def test_an_engine_that_fails_parity_is_not_written(
    path: Path, original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = built(seed=1).read("model.ts")
    monkeypatch.setattr(TorchScriptBackend, "_build_impl", lambda *_: EngineArtifact(data=other))
    assert not add_engine(path, "torchscript")
    assert path.read_bytes() == original.read_bytes()
    assert [entry.name for entry in tmp_path.iterdir()] == ["tiny.pcn"]


def test_a_failing_build_changes_nothing(path: Path, original: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        msg = "no"
        raise BuildError(msg)

    monkeypatch.setattr(TorchScriptBackend, "_build_impl", refuse)
    with pytest.raises(BuildError):
        add_engine(path, "torchscript")
    assert path.read_bytes() == original.read_bytes()


def test_a_bundle_without_torchscript_says_how_to_get_it(path: Path) -> None:
    bundle = Bundle.open(path)
    copied(bundle, "model.ts").save(path, overwrite=True)
    with pytest.raises(BundleError, match=r"holds no model\.ts\. Build it again .* --target torchscript"):
        add_engine(path, "torchscript")


def test_bad_input(path: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"Unknown target 'gpu'"):
        add_engine(path, "gpu")
    with pytest.raises(BundleError, match=r"does not exist"):
        add_engine(tmp_path / "missing.pcn", "cpu")
