"""The verb `compile`, end to end on a network that takes seconds."""

from __future__ import annotations

import json
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from declared import run_declared
from PIL import Image
from small_builds import images, needs_rtx, network, options

import pcn_deploy
from pcn_deploy import BatchRange, CompileResult, Engine, ImageSource
from pcn_deploy.artefact.golden import GoldenSet
from pcn_deploy.engines.base import Backend, EngineArtifact, GraphSource
from pcn_deploy.engines.onnxruntime import OnnxRuntimeBackend
from pcn_deploy.errors import CheckpointError, DataError, DependencyError, ModelError
from pcn_deploy.progress import Progress
from pcn_deploy.tasks.distance import least_sqnr_db
from pcn_deploy.tasks.limits import BUDGETS
from pcn_deploy.verbs.steps.sources import synthetic_images

torch = pytest.importorskip("torch")
nn = torch.nn


@pytest.fixture(scope="module")
def results() -> dict[str, CompileResult]:
    """One build per precision, for the targets that run it anywhere."""
    return {
        precision: pcn_deploy.compile(
            network(),
            options(precision=precision, targets=("cpu",) if precision == "fp16" else ("cpu", "torchscript")),
            calibration=images() if precision == "int8" else None,
        )
        for precision in ("fp32", "fp16", "int8")
    }


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_every_precision_keeps_parity(results: dict[str, CompileResult], precision: str) -> None:
    result = results[precision]
    assert result
    targets = ["cpu"] if precision == "fp16" else ["cpu", "torchscript"]
    assert [(report.target, report.executed_by) for report in result.reports] == [(name, name) for name in targets]
    for report in result.reports:
        assert report.images == 8
        assert report.data == "golden"
        assert report.budget == BUDGETS[precision]
        assert report.metrics["sqnr_db"] > BUDGETS[precision].sqnr_db


def test_precisions_are_truly_different(results: dict[str, CompileResult]) -> None:
    """FP16 rounds more than FP32 and INT8 more than FP16: nothing was left in a higher precision silently."""
    noise = [results[precision].reports[0].metrics["sqnr_db"] for precision in ("fp32", "fp16", "int8")]
    assert noise[0] > noise[1] + 20 > noise[2] + 20
    sizes = [len(results[precision].bundle.read("model.onnx")) for precision in ("fp32", "fp16", "int8")]
    assert sizes[0] > sizes[1] > sizes[2]


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_the_bundle_holds_what_the_design_says(results: dict[str, CompileResult], precision: str) -> None:
    bundle = results[precision].bundle
    expected = {"model.onnx", "golden.npz", "plan.json", "parity/cpu.json"}
    expected |= set() if precision == "fp16" else {"model.ts", "parity/torchscript.json"}
    assert set(bundle.manifest.members) == expected | ({"calibration.json"} if precision == "int8" else set())
    assert [entry.member for entry in bundle.engines] == ["model.onnx", "model.ts"][: 1 if precision == "fp16" else 2]
    for entry in bundle.engines:
        assert entry.bytes == len(bundle.read(entry.member))
    assert bundle.read_json("parity/cpu.json") == results[precision].reports[0].to_json()
    assert bundle.read_json("plan.json") == json.loads(json.dumps(results[precision].plan.to_json()))
    assert bundle.manifest.interface.batch == BatchRange(min=1, opt=2, max=4)
    assert bundle.manifest.transform.resolution == (32, 32)


def test_the_golden_set_is_the_eager_network(results: dict[str, CompileResult]) -> None:
    golden = results["int8"].bundle.read_arrays("golden.npz")
    with torch.inference_mode():
        expected = network()(torch.from_numpy(golden["images"])).numpy()
    np.testing.assert_allclose(golden["logits"], expected, atol=1e-5)
    given = images()
    assert golden["edge"].tolist() == [False] * 8 + [True] * 7
    assert all(any(np.array_equal(image, one) for one in given) for image in golden["images"][:8])
    for name, image in zip(golden["names"][:8], golden["images"], strict=False):
        np.testing.assert_array_equal(image, given[int(name.removeprefix("array[").removesuffix("]"))])


def test_int8_records_its_calibration(results: dict[str, CompileResult]) -> None:
    bundle = results["int8"].bundle
    kept = bundle.read_json("calibration.json")
    assert (kept["calibrator"], kept["images"], kept["unreadable"]) == ("mse", 12, 0)
    quantised = {entry["op"] for entry in bundle.read_json("plan.json")["entries"] if entry["precision"] == "int8"}
    assert quantised == set(kept["ranges"])
    assert quantised
    assert bundle.manifest.calibration["dataset_sha256"] == kept["dataset_sha256"]
    assert results["fp16"].bundle.manifest.calibration is None


def test_int8_without_images_is_refused() -> None:
    with pytest.raises(DataError, match=r"INT8 and FP8 need calibration images.*--calibration DIR or FILE\.npz"):
        pcn_deploy.compile(network(), options(precision="int8"))


def test_the_network_is_left_as_it_is() -> None:
    model = network()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modules = [type(module) for module in model.modules()]
    pcn_deploy.compile(model, options(precision="int8"), calibration=images())
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert [type(module) for module in model.modules()] == modules
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


@needs_rtx
def test_an_engine_that_cannot_run_here_is_proven_through_its_graph() -> None:
    result = pcn_deploy.compile(network(), options(precision="fp16", targets=("tensorrt-rtx",)))
    (report,) = result.reports
    assert report.target == "tensorrt-rtx"
    entry = result.bundle.engine("tensorrt-rtx")
    assert entry.member == "engines/tensorrt-rtx.engine"
    assert entry.built_with["flavour"] == "TensorRT-RTX"
    if not pcn_deploy.engines.registry.get_backend("tensorrt-rtx").availability().can_run:
        assert report.executed_by == "cpu"
        assert result.bundle.read_json("parity/tensorrt-rtx.json")["executed_by"] == "cpu"


@pytest.mark.parametrize("target", ["cpu", pytest.param("tensorrt-rtx", marks=needs_rtx)])
def test_bf16_is_proven_on_a_cpu(target: str) -> None:
    """ONNX Runtime has no kernels for it there; each tensor is rounded to it."""
    result = pcn_deploy.compile(network(), options(precision="bf16", targets=(target,)), calibration=images())
    assert result
    assert 25 < result.reports[0].metrics["sqnr_db"] < 60, "computed in BF16, not in FP16"
    golden = GoldenSet.read(result.bundle)
    with Engine.open(result.bundle, target, executed_by="cpu") as engine:
        found = engine.predict(golden.images)
    declared = run_declared(result.bundle.read("model.onnx"), golden.images)
    assert least_sqnr_db([declared], [found]) > least_sqnr_db([golden.outputs["logits"]], [found]) - 6
    np.testing.assert_array_less(np.abs(found - declared).max(), 2.0**-6 * np.abs(declared).max())


def test_a_spoiled_engine_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    real = OnnxRuntimeBackend._build_impl
    other = pcn_deploy.compile(network(seed=1), options(precision="fp32")).bundle.read("model.onnx")

    def spoiled(self: Any, source: Any, progress: Any) -> Any:
        import dataclasses

        return real(self, dataclasses.replace(source, onnx=other), progress)

    monkeypatch.setattr(OnnxRuntimeBackend, "_build_impl", spoiled)
    result = pcn_deploy.compile(network(), options(precision="fp32", targets=("cpu", "torchscript")))
    assert not result
    assert [bool(report) for report in result.reports] == [False, True]
    assert "SQNR" in " ".join(result.reports[0].failures)
    assert result.bundle.read_json("parity/cpu.json")["passed"] is False


class Broken(nn.Module):  # type: ignore[name-defined,misc]
    """A network with one fault, chosen by name."""

    def __init__(self, fault: str) -> None:
        super().__init__()
        self.fault = fault
        self.layer = nn.Conv2d(3, 16, 3, padding=1)

    def forward(self, x: Any) -> Any:
        y = self.layer(x)
        y = y.mean((2, 3))
        if self.fault == "not finite":
            return y / torch.zeros_like(y)
        return {"shape": x.shape, "best": y.argmax(1)}


@pytest.mark.parametrize(
    ("fault", "kind", "words"),
    [
        ("none", ModelError, "one row for each image"),
        ("not finite", DataError, "NaN or infinite logits"),
    ],
)
def test_networks_that_have_no_answer(fault: str, kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=words):
        pcn_deploy.compile(Broken(fault).eval(), options(precision="fp32"))


def test_weights_that_are_no_numbers() -> None:
    model = network()
    model.head.bias.data[0] = float("nan")
    with pytest.raises(CheckpointError, match=r"NaN or infinite values in 1 tensors: head\.bias"):
        pcn_deploy.compile(model, options(precision="fp32"))


def test_images_of_another_size() -> None:
    with pytest.raises(DataError, match=r"Set --resolution HxW"):
        pcn_deploy.compile(network(), options(precision="int8"), calibration=np.zeros((2, 3, 16, 16), np.float32))


def test_a_target_whose_library_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = (
        OnnxRuntimeBackend()
        .availability()
        .__class__(
            can_build=False,
            can_run=False,
            detail="onnxruntime is not installed",
            remedy="pip install 'pcn-deploy[runtime]'",
        )
    )
    monkeypatch.setattr(OnnxRuntimeBackend, "availability", lambda self: missing)
    with pytest.raises(DependencyError, match=r"'cpu' cannot be built here.*pip install 'pcn-deploy\[runtime\]'"):
        pcn_deploy.compile(network(), options(precision="fp32"))


def test_synthetic_images_follow_the_seed() -> None:
    first = synthetic_images(2, options(seed=3))
    assert first.shape == (2, 3, 32, 32)
    np.testing.assert_array_equal(first, synthetic_images(2, options(seed=3)))
    assert not np.array_equal(first, synthetic_images(2, options(seed=4)))


def test_each_step_reports_its_start_and_its_end() -> None:
    calls: dict[str, list[tuple[int, int]]] = {}

    def progress(step: str, done: int, total: int, unit: str = "", /) -> None:
        calls.setdefault(step, []).append((done, total))

    chosen = options(precision="int8", targets=("cpu", "torchscript"))
    pcn_deploy.compile(network(), chosen, calibration=images(), progress=progress)
    assert {"Calibrating", "Scripting", "Exporting to ONNX", "Proving cpu"} <= set(calls)
    for step, seen in calls.items():
        assert seen[0][0] == 0, step
        assert seen[-1][0] == seen[-1][1], step
        assert [done for done, _ in seen] == sorted(done for done, _ in seen), step


def test_an_engine_is_let_go_before_the_next_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is in the bundle, which keeps it on disk; two in memory would add up."""
    built, alive, build = list[Any](), list[bool](), Backend.build

    def watched(backend: Backend, source: GraphSource, progress: Progress) -> EngineArtifact:
        alive.append(any(engine() for engine in built))
        artifact = build(backend, source, progress)
        built.append(weakref.ref(artifact))
        return artifact

    monkeypatch.setattr(Backend, "build", watched)
    assert pcn_deploy.compile(network(), options(precision="fp32", targets=("cpu", "torchscript")))
    assert alive == [False, False]


def test_a_network_in_training_mode_is_built_in_evaluation_mode() -> None:
    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 16, 3), torch.nn.BatchNorm2d(16), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()
    ).train()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    assert pcn_deploy.compile(net, options(precision="fp32"))
    assert net.training
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())


def test_an_unreadable_image_below_the_limit_does_not_stop_the_golden_set(tmp_path: Path) -> None:
    for index in range(40):
        Image.fromarray(np.full((40, 40, 3), index, np.uint8)).save(tmp_path / f"{index:02d}.png")
    chosen = next(iter(ImageSource(tmp_path, options().transform).subset(8)))
    Path(chosen.name).write_bytes(b"no image")
    result = pcn_deploy.compile(network(), options(precision="int8"), calibration=tmp_path)
    assert result.bundle.manifest.calibration["unreadable"] == 1
    assert result.reports[0].images == 7


def test_graphs_that_differ_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A unit test of our own check: the TorchScript module is replaced by that of another network, a fake."""
    from pcn_deploy.graph import torchscript

    other = torchscript.to_torchscript(network(seed=7), torch.from_numpy(images(1)))
    monkeypatch.setattr(torchscript, "to_torchscript", lambda *_: other)
    with pytest.raises(ModelError, match="The TorchScript graph departs"):
        pcn_deploy.compile(network(), options(precision="fp32", targets=("torchscript",)))
