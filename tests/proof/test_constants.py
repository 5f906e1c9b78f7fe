"""Networks whose logits hold a constant that dwarfs what the image changes: a wrong graph must not hide behind it."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from small_builds import images, options
from torch import nn

import pcn_deploy
from pcn_deploy import Bundle
from pcn_deploy.artefact.golden import GoldenSet
from pcn_deploy.cli.display import parity_rows
from pcn_deploy.proof import executions as proof
from pcn_deploy.proof.executions import prove
from pcn_deploy.tasks.noise_floor import CONSTANT, SAME
from pcn_deploy.tasks.report import report_from_json
from pcn_deploy.verbs.engine import add_engine


class Small(nn.Module):
    """Features, their difference with a branch, and a head of `classes` logits whose bias is `constant`."""

    def __init__(self, constant: tuple[float, ...]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 8, 3)
        self.head = nn.Linear(8, len(constant))
        self.head.bias.data = torch.tensor(constant)

    def forward(self, x: Any) -> Any:
        return self.head((torch.relu(self.first(x)) - torch.sigmoid(self.second(x))).mean((2, 3)))


def dropped_relu(graph: Any) -> None:
    (node,) = [node for node in graph.node if node.op_type == "Relu"]
    node.op_type = "Identity"


def swapped_inputs(graph: Any) -> None:
    (node,) = [node for node in graph.node if node.op_type == "Sub"]
    node.input[0], node.input[1] = node.input[1], node.input[0]


def scaled_features(graph: Any, factor: float = 0.9) -> None:
    (node,) = [node for node in graph.node if node.op_type == "ReduceMean"]
    name, made = node.output[0], f"{node.output[0]}.unscaled"
    kinds = {value.name: value.type.tensor_type.elem_type for value in graph.value_info}
    number = np.array(factor, helper.tensor_dtype_to_np_dtype(kinds.get(name, onnx.TensorProto.FLOAT)))
    graph.initializer.append(numpy_helper.from_array(number, "scale"))
    node.output[0] = made
    at = list(graph.node).index(node) + 1
    graph.node.insert(at, helper.make_node("Mul", [made, "scale"], [name], name="scaling"))


WRONG = [dropped_relu, swapped_inputs, scaled_features]
CONSTANTS = [(1e4,), (0.0, 1e4), (1e3, 1e3, -1e3)]


def mutated(bundle: Bundle, change: Any) -> Bundle:
    model = onnx.load_from_string(bundle.read("model.onnx"))
    change(model.graph)
    onnx.checker.check_model(model)
    bundle.add_engine("cpu", "model.onnx", model.SerializeToString(), {})
    return bundle


@pytest.mark.parametrize("calibrated", [True, False], ids=["images", "noise"])
@pytest.mark.parametrize("constant", CONSTANTS, ids=str)
def test_fp32(constant: tuple[float, ...], tmp_path: Path, *, calibrated: bool) -> None:
    result = pcn_deploy.compile(
        Small(constant).eval(), options(precision="fp32"), calibration=images() if calibrated else None
    )
    assert result, result.reports[0].failures
    result.bundle.save(tmp_path / "right.pcn")
    for change in WRONG:
        report = prove(mutated(Bundle.open(tmp_path / "right.pcn"), change), "cpu")
        assert not report, (change.__name__, report.metrics, report.notes)


SWALLOWING = (1000.0, 1000.0, -1000.0)
"""A step of FP16 is half at a thousand, more than the image changes: what stores FP16 answers otherwise."""


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_what_fp16_swallows_is_no_parity(precision: str) -> None:
    result = pcn_deploy.compile(Small(SWALLOWING).eval(), options(precision=precision), calibration=images())
    assert not result
    assert any("what the images change is lost" in failure for failure in result.reports[0].failures)


@pytest.mark.parametrize("precision", ["fp16", "int8"])
@pytest.mark.parametrize("constant", [one for one in CONSTANTS if one != SWALLOWING], ids=str)
def test_rounded(constant: tuple[float, ...], precision: str, tmp_path: Path) -> None:
    result = pcn_deploy.compile(Small(constant).eval(), options(precision=precision), calibration=images())
    assert result, result.reports[0].failures
    result.bundle.save(tmp_path / "right.pcn")
    for change in WRONG:
        report = prove(mutated(Bundle.open(tmp_path / "right.pcn"), change), "cpu")
        assert not report, (change.__name__, report.metrics, report.executions, report.notes)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_an_answer_that_no_image_changes_is_no_judgement(precision: str) -> None:
    """As of a head that starts with zeros: it builds, and every report says that nothing was judged."""
    network = Small((1.0, 2.0)).eval()
    nn.init.zeros_(network.head.weight)
    result = pcn_deploy.compile(network, options(precision=precision), calibration=images())
    assert result, result.reports[0].failures
    (report,) = result.reports
    assert report.constant
    assert CONSTANT in report.notes
    assert CONSTANT in result.bundle.manifest.notes
    assert parity_rows([report])[0][1] == "passed (constant)"
    assert report_from_json(json.loads(json.dumps(report.to_json()))) == report


def test_a_constant_that_swallows_the_image_is_no_judgement() -> None:
    """One step of float32 is 1/16 at a million: there is no more than that to hold an engine against."""
    result = pcn_deploy.compile(Small((1e6,)).eval(), options(precision="fp32"), calibration=images())
    assert result
    assert result.reports[0].constant
    report = prove(mutated(result.bundle, dropped_relu), "cpu")
    assert any("the engine is" in failure and "dB more off it than rounding" in failure for failure in report.failures)


def test_what_float32_itself_loses_is_said() -> None:
    result = pcn_deploy.compile(Small((2e3,)).eval(), options(precision="fp32"), calibration=images())
    (report,) = result.reports
    assert result
    assert any("in float32, by a run in float64" in note for note in report.notes), (report.metrics, report.notes)


def test_images_that_are_all_the_same_are_no_judgement() -> None:
    given = np.repeat(images(1), 8, axis=0)
    result = pcn_deploy.compile(Small((1.0, 2.0)).eval(), options(precision="fp32"), calibration=given)
    assert result
    assert result.reports[0].constant
    assert SAME in result.reports[0].notes


def test_the_noise_of_float32_is_that_of_a_run_in_double() -> None:
    network = Small((1e4,)).eval()
    golden = GoldenSet.read(pcn_deploy.compile(network, options(precision="fp32"), calibration=images()).bundle)
    real = torch.from_numpy(golden.images[~golden.edge])
    with torch.no_grad():
        single = torch.cat([network(image[None]) for image in real]).double()
        double = network.double()(real.double())
    power = (single - double).square().mean()
    least = float(np.spacing(np.float32(1e4))) ** 2 / 12
    assert golden.float32_noise == pytest.approx(max(float(power), least), rel=1e-6)


@pytest.mark.parametrize("precision", ["fp16", "int8"])
@pytest.mark.parametrize("given", [images(1), np.repeat(images(1), 8, axis=0)], ids=["one", "eight times one"])
def test_a_build_on_one_image_says_so(precision: str, given: Any) -> None:
    result = pcn_deploy.compile(Small((1.0, 2.0)).eval(), options(precision=precision), calibration=given)
    told = SAME if len(given) > 1 else "the golden set has one image"
    assert any(note.startswith(told) for note in result.notes), result.notes
    ranges = "all 8 calibration images are equal" if len(given) > 1 else "only 1 image: the ranges are guesses"
    assert any(note.startswith(ranges) for note in result.notes) == (precision == "int8")


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_a_wrong_graph_with_fitting_hashes_is_proven_by_nothing(
    precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One percent off, which INT8 hides: `engine` and `verify` take the rounding out, as a build does."""
    result = pcn_deploy.compile(Small((0.1, 0.2, 0.3)).eval(), options(precision=precision), calibration=images())
    result.bundle.save(tmp_path / "right.pcn")
    assert pcn_deploy.verify(pcn_deploy.load(tmp_path / "right.pcn"))
    wrong = mutated(Bundle.open(tmp_path / "right.pcn"), partial(scaled_features, factor=0.99))
    path = wrong.save(tmp_path / "wrong.pcn")
    before = path.read_bytes()
    for report in (pcn_deploy.verify(pcn_deploy.load(path)), add_engine(path, "cpu")):
        assert any(failure.startswith("widened: SQNR 1") for failure in report.failures), report.failures
    assert path.read_bytes() == before
    if precision == "int8":
        monkeypatch.setattr(proof, "EXECUTIONS", ())
        assert add_engine(path, "cpu"), "its golden set alone does not tell"


def test_what_cannot_be_executed_for_want_of_a_library_is_noted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = pcn_deploy.compile(Small((0.1, 0.2)).eval(), options(precision="fp16")).bundle.save(tmp_path / "a.pcn")
    monkeypatch.setitem(sys.modules, "pcn_deploy.engines.rounded", None)
    report = add_engine(path, "cpu")
    assert report
    (note,) = [note for note in report.notes if "not executed as" in note]
    assert note.startswith("the graph was not executed as widened, rounded, by which")
    assert note.endswith("is not installed. Install it: pip install onnx onnx-ir onnxruntime.")
    assert set(report.executions) == {"stock"}
