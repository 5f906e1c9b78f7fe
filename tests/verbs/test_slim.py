"""A bundle without what the devices it ships to do not need."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import numpy as np
import pytest
from small_builds import images, needs_rtx, network, options

import pcn_deploy
from pcn_deploy import Bundle, CompileResult
from pcn_deploy.artefact.manifest import Slimmed
from pcn_deploy.engines.registry import get_backend
from pcn_deploy.errors import BundleError, DependencyError, OutputError
from pcn_deploy.members import BUDGET
from pcn_deploy.verbs.engine import add_engine
from pcn_deploy.verbs.extract import extract
from pcn_deploy.verbs.inspect import describe
from pcn_deploy.verbs.load import load_to_verify
from pcn_deploy.verbs.slim import slim

pytest.importorskip("torch")

EVERYTHING = {"budget.json", "calibration.json", "golden.npz", "model.onnx", "model.ts", "plan.json"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """INT8 for `cpu` and `torchscript`, with images that judged the accuracy."""
    asked = options(precision="int8", targets=("cpu", "torchscript"), remainder="fp32")
    result: CompileResult = pcn_deploy.compile(network(), asked, calibration=images(), evaluation=images(40))
    return result.bundle.save(tmp_path_factory.mktemp("bundle") / "whole.pcn")


@pytest.fixture(scope="module")
def with_rtx(tmp_path_factory: pytest.TempPathFactory) -> Path:
    asked = options(precision="int8", targets=("cpu", "tensorrt-rtx"))
    bundle = pcn_deploy.compile(network(), asked, calibration=images()).bundle
    return bundle.save(tmp_path_factory.mktemp("bundle") / "rtx.pcn")


def members(path: Path) -> set[str]:
    return set(Bundle.open(path).manifest.members)


def test_what_an_engine_executes_is_kept(whole: Path, tmp_path: Path) -> None:
    before = whole.read_bytes()
    result = slim(whole, tmp_path / "small.pcn")
    assert result.targets == ("cpu", "torchscript")
    assert set(result.left_out) == {"calibration.json"}
    assert members(result.path) == members(whole) - {"calibration.json"}
    assert (result.bytes_before, result.bytes_after) == (len(before), result.path.stat().st_size)
    assert result.bytes_after < result.bytes_before
    assert whole.read_bytes() == before
    assert len(result.consequences) == 1
    assert "--calibration-cache" in result.consequences[0]


def test_engines_that_were_not_asked_for_go_with_all_that_was_theirs(whole: Path, tmp_path: Path) -> None:
    small = slim(whole, tmp_path / "small.pcn", targets=["torchscript"]).path
    gone = {"calibration.json", "model.onnx", "parity/cpu.json"}
    assert members(whole) >= EVERYTHING
    assert members(small) == members(whole) - gone
    after = Bundle.open(small)
    assert [entry.target for entry in after.engines] == ["torchscript"]
    assert {proof["target"] for proof in Bundle.open(whole).read_json(BUDGET)["proofs"]} == {"cpu", "torchscript"}
    assert {proof["target"] for proof in after.read_json(BUDGET)["proofs"]} == {"torchscript"}
    slimmed = after.manifest.slimmed
    assert slimmed is not None
    assert slimmed.source_sha256 == hashlib.sha256(whole.read_bytes()).hexdigest()
    assert slimmed.left_out == {name: Bundle.open(whole).manifest.members[name].bytes for name in gone}
    assert slimmed.targets == ("cpu",)
    assert Bundle.open(whole).manifest.slimmed is None


def test_verify_run_inspect_and_extract_work_on_what_is_left(whole: Path, tmp_path: Path) -> None:
    for target, name in (("cpu", "one"), ("torchscript", "two")):
        small = slim(whole, tmp_path / f"{name}.pcn", targets=[target]).path
        some = images(3)
        with pcn_deploy.load(small) as engine, pcn_deploy.load(whole, target) as original:
            assert engine.target == target
            np.testing.assert_array_equal(engine(some), original(some))
        with load_to_verify(small) as engine, load_to_verify(whole, target) as original:
            report, expected = pcn_deploy.verify(engine), pcn_deploy.verify(original)
        assert report
        assert report.metrics == expected.metrics
        assert set(report.executions) == set(expected.executions) == ({"widened"} if target == "cpu" else set())
        description, before = describe(small), describe(whole)
        assert list(description["parity"]) == [target]
        for key in ("layers", "inputs", "outputs", "golden", "judged", "notes"):
            assert description[key] == before[key], key
        assert list(description["slimmed"]["targets"]) == ["torchscript" if target == "cpu" else "cpu"]
        extracted = extract(small, target, tmp_path / f"{name}.plan")
        assert extracted.plan.read_bytes() == Bundle.open(whole).read(Bundle.open(whole).engine(target).member)


def test_what_needs_the_graph_says_that_it_was_left_out(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = slim(whole, tmp_path / "small.pcn", targets=["torchscript"]).path
    digest = hashlib.sha256(whole.read_bytes()).hexdigest()[:16]
    before = small.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(type(get_backend("cpu")), "_build_impl", lambda *_: pytest.fail("built for nothing"))
        with pytest.raises(BundleError, match=rf"holds no model\.onnx\. `pcn-compile slim` left it out; .*{digest}"):
            add_engine(small, "cpu")
    with pytest.raises(
        BundleError, match=rf"no engine for 'cpu'; it holds: torchscript\. `pcn-compile slim`.*{digest}"
    ):
        pcn_deploy.load(small, "cpu")
    with pytest.raises(BundleError, match=r"holds no calibration\.json\. `pcn-compile slim` left it out"):
        Bundle.open(small).read("calibration.json")
    assert small.read_bytes() == before


def test_a_member_that_never_was_is_not_said_to_be_left_out(whole: Path, tmp_path: Path) -> None:
    small = slim(whole, tmp_path / "small.pcn").path
    with pytest.raises(BundleError, match=r"no engine for 'tensorrt'; .*Add one with: pcn-compile engine"):
        pcn_deploy.load(small, "tensorrt")
    with pytest.raises(BundleError, match=r"holds no other\.bin\.$"):
        Bundle.open(small).read("other.bin")


def test_a_slim_bundle_can_be_slimmed_again(whole: Path, tmp_path: Path) -> None:
    first = slim(whole, tmp_path / "first.pcn").path
    result = slim(first, tmp_path / "second.pcn", targets=["torchscript"])
    assert set(result.left_out) == {"model.onnx", "parity/cpu.json"}
    slimmed = Bundle.open(result.path).manifest.slimmed
    assert slimmed is not None
    assert set(slimmed.left_out) == {"calibration.json", "model.onnx", "parity/cpu.json"}
    assert slimmed.source_sha256 == hashlib.sha256(first.read_bytes()).hexdigest()
    assert slim(result.path, tmp_path / "third.pcn").left_out == {}


def test_in_place_and_over_another(whole: Path, tmp_path: Path) -> None:
    path = Path(shutil.copy(whole, tmp_path / "a.pcn"))
    with pytest.raises(OutputError, match=r"exists\. Give --overwrite"):
        slim(path, path)
    assert path.read_bytes() == whole.read_bytes()
    slim(path, path, targets=["cpu"], overwrite=True)
    assert "model.ts" not in members(path)
    with pcn_deploy.load(path) as engine:
        assert engine.target == "cpu"


def test_bad_inputs(whole: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"no engine for 'tensorrt'; it holds: cpu, torchscript"):
        slim(whole, tmp_path / "small.pcn", targets=["tensorrt"])
    spoiled = Path(shutil.copy(whole, tmp_path / "spoiled.pcn"))
    data = bytearray(spoiled.read_bytes())
    data[data.index(Bundle.open(whole).read("calibration.json")) + 100] ^= 1  # what would be left out is checked too
    spoiled.write_bytes(data)
    with pytest.raises(BundleError, match=r"calibration\.json in .* cannot be read|not what was packed"):
        slim(spoiled, tmp_path / "small.pcn")
    assert [entry.name for entry in tmp_path.iterdir()] == ["spoiled.pcn"]


def test_a_manifest_with_a_garbled_note_is_refused(whole: Path, tmp_path: Path) -> None:
    bundle = Bundle.open(whole)
    bundle.manifest.slimmed = Slimmed(source_sha256="0", left_out={"model.onnx": "large"})  # type: ignore[dict-item]
    with pytest.raises(BundleError, match=r"is malformed"):
        Bundle.open(bundle.save(tmp_path / "a.pcn"))


@needs_rtx
def test_an_engine_for_another_machine_ships_without_its_graph(with_rtx: Path, tmp_path: Path) -> None:
    result = slim(with_rtx, tmp_path / "small.pcn", targets=["tensorrt-rtx"])
    assert set(result.left_out) == {"model.onnx", "calibration.json", "parity/cpu.json"}
    assert "model.onnx" in result.consequences[0]
    engine = Bundle.open(with_rtx).read("engines/tensorrt-rtx.engine")
    assert extract(result.path, "tensorrt-rtx", tmp_path / "plan").plan.read_bytes() == engine
    assert describe(result.path)["engines"][0]["target"] == "tensorrt-rtx"
    if get_backend("tensorrt-rtx").availability().can_run:
        pytest.skip("here the engine runs, so that nothing else has to")
    digest = hashlib.sha256(with_rtx.read_bytes()).hexdigest()[:16]
    words = rf"can run here \(tensorrt-rtx: .*holds no model\.onnx\. `pcn-compile slim` left it out; .*{digest}"
    for target in (None, "tensorrt-rtx"):
        for judging in (False, True):
            with pytest.raises(DependencyError, match=words):
                load_to_verify(result.path, target, judging=judging)
    with pytest.raises(DependencyError, match=r"cannot run"):
        pcn_deploy.load(result.path)


@needs_rtx
def test_with_its_graph_it_is_verified_and_extended_anywhere(with_rtx: Path, tmp_path: Path) -> None:
    result = slim(with_rtx, tmp_path / "small.pcn", targets=["tensorrt-rtx"], keep_graph=True)
    assert set(result.left_out) == {"calibration.json", "parity/cpu.json"}
    assert not any("model.onnx" in text for text in result.consequences)
    with load_to_verify(result.path) as engine:
        assert pcn_deploy.verify(engine)
    assert add_engine(result.path, "cpu")
    assert [entry.target for entry in Bundle.open(result.path).engines] == ["tensorrt-rtx", "cpu"]
