"""Every form of a network is compared with what it was made from, and the one that departs is named."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from small_builds import images, network, options
from torch import Tensor, nn

import pcn_deploy
from pcn_deploy.artefact.golden import GoldenSet
from pcn_deploy.calibration.plan.rules import PrecisionPlan
from pcn_deploy.errors import ExecutionError, ModelError
from pcn_deploy.graph.export import serialise, to_onnx
from pcn_deploy.graph.torchscript import to_torchscript
from pcn_deploy.network.deploy import to_deploy
from pcn_deploy.network.evaluation_mode import in_evaluation_mode
from pcn_deploy.progress import silent
from pcn_deploy.proof.agreement import EQUAL_DB, SHARPEST_DB, Forms, check_agreement, executing
from pcn_deploy.verbs.steps.preparation import prepare
from pcn_deploy.verbs.steps.sources import open_sources

OPTIONS = options(precision="int8", targets=("cpu", "torchscript"))


@pytest.fixture(scope="module")
def built() -> dict[str, Any]:
    bundle = pcn_deploy.compile(network(), OPTIONS, calibration=[images()]).bundle
    source, _ = open_sources([images()], None, OPTIONS)
    prepared = prepare(in_evaluation_mode(network()), OPTIONS, source, silent)
    plan = PrecisionPlan.from_json(bundle.read_json("plan.json"))
    other, _ = to_deploy(network(seed=7), torch.from_numpy(images(1)))
    spec = bundle.manifest.interface
    return {
        "bundle": bundle,
        "golden": GoldenSet.read(bundle),
        "spec": spec,
        "forms": Forms.of(network(), prepared.deployed, prepared.unrounded, prepared.scales, plan),
        "other": other,
        "model.ts": to_torchscript(other, torch.from_numpy(images(2)), OPTIONS.batch),
        "model.onnx": serialise(to_onnx(other, (3, 32, 32), OPTIONS.batch, {})),
    }


def with_member(bundle: Any, name: str, data: bytes) -> Any:
    return SimpleNamespace(read=lambda member: data if member == name else bundle.read(member))


def check(built: dict[str, Any], bundle: Any, forms: Forms) -> GoldenSet:
    return check_agreement(bundle, built["golden"], built["spec"], forms, scripted=True, rounded=True)[0]


def test_what_was_built_agrees(built: dict[str, Any]) -> None:
    golden = check(built, built["bundle"], built["forms"])
    assert len(golden.widened_db) == 8
    assert (golden.widened_db > EQUAL_DB).all(), "nothing but the order of summation is apart"
    assert (golden.widened_db <= SHARPEST_DB).all()
    assert golden.widened["logits"].shape == (8, 5)


@pytest.mark.parametrize(("name", "departs"), [("model.ts", "TorchScript graph"), ("model.onnx", "ONNX graph")])
def test_the_graph_of_another_network_is_the_one_that_departs(built: dict[str, Any], name: str, departs: str) -> None:
    with pytest.raises(ModelError, match=rf"The {departs} departs"):
        check(built, with_member(built["bundle"], name, built[name]), built["forms"])


def test_a_graph_that_fails_when_it_runs_is_named_with_its_own_words() -> None:
    with pytest.raises(ModelError, match=r"model\.ts cannot .*: the line that tells"), executing("torchscript"):
        raise ExecutionError from RuntimeError("a stack\nthe line that tells")


def test_a_deploy_form_of_another_network_departs(built: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match="The deploy form departs"):
        check(built, built["bundle"], replace(built["forms"], unrounded=built["other"]))


class Amplified(nn.Module):
    """Periodic functions of large numbers: FP16 cannot tell one period from another, float32 can."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.layer, self.middle = nn.Conv2d(3, 32, 3), nn.Conv2d(32, 32, 3)
        self.head, self.factor = nn.Linear(32, 5), factor

    def forward(self, x: Tensor) -> Tensor:
        """Classify `(N, 3, H, W)`."""
        features = 1 + self.middle(self.layer(x).relu())
        waves = torch.sin(self.factor * features) + torch.cos(3 * self.factor * features)
        logits: Tensor = self.head(waves.mean((2, 3)))
        return logits


class Cancelling(nn.Module):
    """A variance by hand, about a mean that float32 has few digits beside."""

    def __init__(self, mean: float) -> None:
        super().__init__()
        self.layer, self.head, self.mean = nn.Conv2d(3, 16, 3), nn.Linear(16, 5), mean

    def forward(self, x: Tensor) -> Tensor:
        """Classify `(N, 3, H, W)`."""
        features = self.layer(x) + self.mean
        logits: Tensor = self.head(features.square().mean((2, 3)) - features.mean((2, 3)).square())
        return logits


def test_rounding_to_fp16_that_the_network_enlarges_is_no_fault_of_a_graph() -> None:
    """It fails as what it is: by the parity of the FP16 graph."""
    torch.manual_seed(0)
    result = pcn_deploy.compile(Amplified(3000).eval(), options(precision="fp16"), calibration=images())
    assert any("SQNR" in failure for failure in result.reports[0].failures)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
@pytest.mark.parametrize(("made", "size"), [(Cancelling, 400.0), (Cancelling, 3000.0), (Amplified, 1e7)])
def test_a_network_whose_answers_are_its_own_rounding_is_told_so(made: type[Any], size: float, precision: str) -> None:
    """It is built, and fails parity: no engine can be equal to it."""
    torch.manual_seed(0)
    result = pcn_deploy.compile(made(size).eval(), options(precision=precision), calibration=images(16))
    (note,) = [note for note in result.bundle.manifest.notes if "enlarges its own rounding" in note]
    assert "in float32 and in float64 agree to" in note
    assert not result


def test_a_network_that_only_runs_in_float32_is_held_against_itself(built: dict[str, Any]) -> None:
    def refuse(images: Tensor) -> Tensor:
        if (1 * images).dtype != torch.float32:
            raise TypeError("expected float32")
        logits: Tensor = forms.stored(images)
        return logits

    forms = built["forms"]
    wrong = with_member(built["bundle"], "model.onnx", built["model.onnx"])
    with pytest.raises(ModelError, match="The ONNX graph departs"):
        check(built, wrong, replace(forms, stored=refuse))


def test_weights_that_the_graph_computes_before_it_rounds_them_agree() -> None:
    """Weight standardisation: FP16 holds the standardised weight, not the one that was trained."""

    class Standardised(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
            deviation = weight.square().mean((1, 2, 3), keepdim=True).sqrt()
            return nn.functional.conv2d(x, weight / (deviation + 1e-3), self.bias, self.stride, self.padding)

    torch.manual_seed(0)
    net = nn.Sequential(Standardised(3, 32, 3), nn.ReLU(), Standardised(32, 32, 3), nn.Flatten(), nn.LazyLinear(5))
    net(torch.from_numpy(images(1)))
    result = pcn_deploy.compile(net.eval(), options(precision="fp16"), calibration=[images()])
    assert result, result.reports
    assert np.isfinite(result.reports[0].executions["widened"]["sqnr_db"])


class ExportedOtherwise(nn.Module):
    """A decision on how it is run that moves the answers by about half a percent: 45 dB."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.middle, self.head = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        """Classify `(N, 3, H, W)`."""
        features = self.middle(self.layer(x).relu()).relu()
        if torch.compiler.is_exporting():
            features = features * 1.005
        logits: Tensor = self.head(features.mean((2, 3)))
        return logits


@pytest.mark.parametrize(
    ("precision", "remainder"), [("fp32", "fp16"), ("fp16", "fp16"), ("int8", "fp16"), ("int8", "fp32")]
)
def test_a_small_departure_is_refused_in_every_precision(precision: str, remainder: str) -> None:
    with pytest.raises(ModelError, match="The ONNX graph departs"):
        pcn_deploy.compile(
            ExportedOtherwise(), options(precision=precision, remainder=remainder), calibration=[images()]
        )
