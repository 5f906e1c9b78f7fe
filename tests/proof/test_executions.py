"""The verdict of a build: the engine, and every further execution of its graph."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from small_builds import images, network, options

import pcn_deploy
from pcn_deploy import Bundle, CompileResult, Transform
from pcn_deploy.artefact.golden import GoldenSet, edge_images
from pcn_deploy.engines.registry import get_backend
from pcn_deploy.progress import silent
from pcn_deploy.proof.executions import Execution, prove
from pcn_deploy.proof.reference import eager_outputs, golden_set
from pcn_deploy.specs import EngineSpec, OutputSpec
from pcn_deploy.tasks.report import report_from_json
from pcn_deploy.verbs.steps.sources import real_images

torch = pytest.importorskip("torch")


def spec_of(bundle: Bundle) -> EngineSpec:
    return bundle.manifest.interface


def further(name: str, answer: Any, *, applies: bool = True) -> Execution:
    """ONNX Runtime, whose logits go through `answer`: a fake of another execution, for our own judgement."""

    def open_session(read: Any, spec: Any) -> Any:
        session = get_backend("cpu").open(read(), spec)
        real = session._run_impl
        session._run_impl = lambda inputs, out: {"logits": answer(real(inputs, {})["logits"])}  # type: ignore[method-assign]
        return session

    return Execution(name=name, applies=lambda manifest: applies and manifest.precision == "fp32", open=open_session)


def test_every_execution_of_the_graph_must_pass(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = (
        further("right", lambda logits: logits),
        further("wrong", lambda logits: logits[:, ::-1]),
        further("not asked", lambda logits: logits[:, ::-1], applies=False),
    )
    monkeypatch.setattr("pcn_deploy.proof.executions.EXECUTIONS", given[:1])
    report = prove(Bundle.open(path), "cpu")
    assert report
    seen = report.executions["right"]
    assert {name: report.metrics[name] for name in seen} == pytest.approx(seen)
    monkeypatch.setattr("pcn_deploy.proof.executions.EXECUTIONS", given)
    report = prove(Bundle.open(path), "cpu")
    assert not report
    assert report.executed_by == "cpu"
    assert set(report.executions) == {"right", "wrong"}
    assert report.failures
    assert all(failure.startswith("wrong: ") for failure in report.failures)
    assert report_from_json(report.to_json()) == report


def test_the_scripted_module_is_not_the_graph(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pcn_deploy.proof.executions.EXECUTIONS", (further("wrong", lambda logits: logits[:, ::-1]),))
    assert prove(Bundle.open(path), "torchscript")


class Normalised(torch.nn.Module):  # type: ignore[name-defined,misc]
    """Divides by what is 0 on a black image without bias; `epsilon` is what stands against it."""

    def __init__(self, epsilon: float) -> None:
        super().__init__()
        self.layer = torch.nn.Conv2d(3, 16, 3, bias=False)
        self.head = torch.nn.Linear(16, 3)
        self.epsilon = epsilon

    def forward(self, x: Any) -> Any:
        features = self.layer(x).mean((2, 3))
        normalised = features / (features.square().sum(1, keepdim=True).sqrt() + self.epsilon)
        return self.head(normalised)


def build_normalised(epsilon: float, **given: Any) -> CompileResult:
    """Black is zero for this transform."""
    torch.manual_seed(0)
    black_is_zero = Transform(resolution=(32, 32), mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    chosen = options(**{"precision": "fp32", "transform": black_is_zero, **given})
    return pcn_deploy.compile(Normalised(epsilon).eval(), chosen, calibration=images(16))


def without_constant(bundle: Bundle, value: float) -> Bundle:
    """A bundle in whose graph constants of this value are 0."""
    graph = onnx.load_from_string(bundle.read("model.onnx"))
    for tensor in (
        *graph.graph.initializer,
        *(a.t for n in graph.graph.node for a in n.attribute if a.name == "value"),
    ):
        if np.allclose(values := onnx.numpy_helper.to_array(tensor), value, rtol=1e-5, atol=0):
            tensor.CopyFrom(onnx.numpy_helper.from_array(np.zeros_like(values), tensor.name))
    bundle.add_engine("cpu", "model.onnx", graph.SerializeToString(), {})
    return bundle


def test_a_graph_that_is_not_finite_on_black_fails_by_name() -> None:
    result = build_normalised(1e-3)
    assert result
    report = prove(without_constant(result.bundle, 1e-3), "cpu")
    assert "edge images: NaN or infinite logits for black" in report.failures
    json.dumps(report.to_json(), allow_nan=False)


def test_what_the_network_itself_cannot_answer_is_left_out_and_said() -> None:
    result = build_normalised(0.0)
    assert result
    golden = GoldenSet.read(result.bundle)
    assert "black" not in golden.names
    assert "white" in golden.names
    (note,) = [note for note in result.bundle.manifest.notes if "NaN" in note]
    assert "for black" in note


class Standardised(torch.nn.Module):  # type: ignore[name-defined,misc]
    """Divides by the deviation of the pixels of an image, which is 0 where it is flat."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Conv2d(3, 16, 3), torch.nn.ReLU(), torch.nn.Conv2d(16, 5, 3))

    def forward(self, x: Any) -> Any:
        x = x[:, :1]
        mean, deviation = x.mean((2, 3), keepdim=True), x.std((2, 3), keepdim=True)
        return self.layers(((x - mean) / (deviation + 1e-6)).expand(-1, 3, -1, -1)).mean((2, 3))


class HighPass(torch.nn.Module):  # type: ignore[name-defined,misc]
    """Sees differences between neighbours only, without biases."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = torch.nn.Conv2d(3, 16, 3, bias=False), torch.nn.Linear(16, 5, bias=False)
        self.first.weight.data -= self.first.weight.data.mean((2, 3), keepdim=True)

    def forward(self, x: Any) -> Any:
        return self.head(self.first(x).relu().mean((2, 3)))


class InFloat32(HighPass):
    """Does not run in float64."""

    def forward(self, x: Any) -> Any:
        return super().forward(torch.from_numpy(x.numpy().astype(np.float32)) if x.dtype == torch.float32 else 1 / 0)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("made", [Standardised, HighPass])
def test_edge_images_that_the_network_answers_with_its_rounding_must_only_be_finite(
    made: type[Any], precision: str
) -> None:
    torch.manual_seed(0)
    result = pcn_deploy.compile(made().eval(), options(precision=precision), calibration=images(16))
    assert result, result.reports
    golden = GoldenSet.read(result.bundle)
    rounding = {name for name, one in zip(golden.names, golden.rounding, strict=True) if one}
    assert {"white", "grey"} <= rounding
    assert not {"checkerboard", "random pixels"} & rounding
    (note,) = [note for note in result.bundle.manifest.notes if "its own rounding" in note]
    assert "white" in note


def test_an_engine_that_is_not_finite_where_the_network_rounds_fails_by_name() -> None:
    torch.manual_seed(0)
    halves = Transform(resolution=(32, 32), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))  # sums of which are exact
    result = pcn_deploy.compile(HighPass().eval(), options(precision="fp32", transform=halves), calibration=images(16))
    golden = GoldenSet.read(result.bundle)
    assert "white" in {name for name, one in zip(golden.names, golden.rounding, strict=True) if one}
    faulty = further("broken", lambda logits: np.where(np.abs(logits) < 1e-5, np.nan, logits))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pcn_deploy.proof.executions.EXECUTIONS", (faulty,))
        report = prove(result.bundle, "cpu")
    assert any("broken: edge images: NaN or infinite outputs for" in failure for failure in report.failures)


def golden_of(model: Any, **given: Any) -> tuple[GoldenSet, list[str]]:
    chosen = options(precision="fp32", **given)
    forward, real = eager_outputs(model, attention_map=False), real_images(chosen, None)
    return golden_set(forward, real, chosen.transform, (OutputSpec(),), chosen.batch, silent)


def test_a_network_that_only_runs_in_float32_keeps_its_edge_images() -> None:
    torch.manual_seed(0)
    model = InFloat32().eval()
    model.first.weight.data += 0.1
    golden, notes = golden_of(model)
    assert (int(golden.edge.sum()), notes) == (7, [])


def test_an_exact_answer_of_nothing_is_an_answer() -> None:
    black_is_zero = Transform(resolution=(32, 32), mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    golden, _ = golden_of(HighPass().eval(), transform=black_is_zero)
    assert "black" in golden.names


def test_pictures_that_hardly_differ_are_noted() -> None:
    """One scene with noise, whose changes 8 bits lose."""
    rng = np.random.default_rng(0)
    scene = rng.standard_normal((3, 32, 32)) + 0.03 * rng.standard_normal((16, 3, 32, 32))
    result = pcn_deploy.compile(network(), options(precision="int8"), calibration=scene.astype(np.float32))
    report = result.reports[0]
    assert result, report.failures
    assert report.metrics["sqnr_changes_db"] < 6
    assert any("Give more varied images" in note for note in result.bundle.manifest.notes)


def test_edge_images_are_the_ends_of_the_transform() -> None:
    transform = Transform(resolution=(4, 6), mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.5))
    found = edge_images(transform)
    for name, value in (("black", 0.0), ("white", 1.0), ("grey", 127 / 255)):
        expected = [(value - mean) / std for mean, std in zip(transform.mean, transform.std, strict=True)]
        np.testing.assert_allclose(found[name], np.broadcast_to(np.reshape(expected, (3, 1, 1)), (3, 4, 6)), atol=1e-6)
    every = np.stack(list(found.values()))
    assert every.min(axis=(0, 2, 3)) == pytest.approx(found["black"].min((1, 2)))
    assert every.max(axis=(0, 2, 3)) == pytest.approx(found["white"].max((1, 2)))
    assert len(edge_images(Transform(resolution=(4, 4), mean=(0.5,), std=(0.5,)))) == len(found) - 2


def test_an_8_bit_graph_is_held_against_its_simulation() -> None:
    """Scales of two bits less stay within the budget of INT8, and are not what was built."""
    chosen = options(precision="int8", remainder="fp32", targets=("cpu", "torchscript"))
    bundle = pcn_deploy.compile(network(), chosen, calibration=images()).bundle
    golden = GoldenSet.read(bundle)
    assert prove(bundle, "cpu")
    with torch.inference_mode(), get_backend("torchscript").open(bundle.read("model.ts"), spec_of(bundle)) as session:
        again = [session.run({"images": image[None]})["logits"] for image in golden.images]
    np.testing.assert_allclose(golden.simulated["logits"], np.concatenate(again), atol=1e-5)
    graph = onnx.load_from_string(bundle.read("model.onnx"))
    used = {node.input[1] for node in graph.graph.node if node.op_type == "QuantizeLinear"}
    for tensor in graph.graph.initializer:
        if tensor.name in used:
            values = onnx.numpy_helper.to_array(tensor)
            tensor.CopyFrom(onnx.numpy_helper.from_array((values * 4).astype(values.dtype), tensor.name))
    bundle.add_engine("cpu", "model.onnx", graph.SerializeToString(), {})
    report = prove(bundle, "cpu")
    assert report.metrics["sqnr_db"] > report.budget.sqnr_db
    assert any(failure.startswith("simulated images: SQNR") for failure in report.failures)
