"""The two portable graphs are compared, and the one that departs is named."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from small_builds import images, network, options

import pcn_deploy
from pcn_deploy import agreement
from pcn_deploy.agreement import check_agreement, executing
from pcn_deploy.errors import ExecutionError, ModelError
from pcn_deploy.golden import GoldenSet
from pcn_deploy.graph.export import serialise, to_onnx
from pcn_deploy.graph.torchscript import to_torchscript
from pcn_deploy.models.deploy import to_deploy
from pcn_deploy.specs import EngineSpec

OPTIONS = options(precision="int8", remainder="fp32")


@pytest.fixture(scope="module")
def built() -> dict[str, Any]:
    bundle = pcn_deploy.compile(network(), OPTIONS, calibration=[images()]).bundle
    other, _ = to_deploy(network(seed=7), torch.from_numpy(images(1)))
    example = torch.from_numpy(images(2))
    spec = EngineSpec.from_json(bundle.manifest["interface"])
    return {
        "bundle": bundle,
        "golden": replace(simulated := GoldenSet.read(bundle, [tensor.name for tensor in spec.outputs]), simulated={}),
        "simulated": simulated,
        "spec": spec,
        "model.ts": to_torchscript(other, example, OPTIONS.batch),
        "model.onnx": serialise(to_onnx(other, (3, 32, 32), OPTIONS.batch, {})),
    }


def with_member(bundle: Any, name: str, data: bytes) -> Any:
    return SimpleNamespace(read=lambda member: data if member == name else bundle.read(member))


@pytest.mark.parametrize(("name", "departs"), [("model.ts", "TorchScript"), ("model.onnx", "ONNX")])
def test_the_graph_of_another_network_is_the_one_that_departs(built: dict[str, Any], name: str, departs: str) -> None:
    assert check_agreement(built["bundle"], built["golden"], built["spec"], OPTIONS) == ""
    wrong = with_member(built["bundle"], name, built[name])
    with pytest.raises(ModelError, match=rf"the {departs} graph departs"):
        check_agreement(wrong, built["golden"], built["spec"], OPTIONS)


def test_what_the_simulation_has_answered_is_not_computed_again(built: dict[str, Any]) -> None:
    """The graph is held against it, image by image; the TorchScript module is not even read."""
    golden, bundle = built["simulated"], with_member(built["bundle"], "model.ts", b"is not read")
    assert check_agreement(bundle, golden, built["spec"], OPTIONS) == ""
    others = {name: values[::-1] for name, values in golden.simulated.items()}
    with pytest.raises(ModelError, match="the TorchScript graph departs"):
        check_agreement(bundle, replace(golden, simulated=others), built["spec"], OPTIONS)


def test_a_graph_that_fails_when_it_runs_is_named_with_its_own_words() -> None:
    with pytest.raises(ModelError, match=r"model\.ts cannot .*: the line that tells"), executing("torchscript"):
        raise ExecutionError from RuntimeError("a stack\nthe line that tells")


class FakeForms:
    """A fake: a network whose answers in float32 are so far from those in float64 by rounding alone."""

    scales = True
    options = OPTIONS

    def __init__(self, right: Any, rounding: float) -> None:
        self._right, self._rounding = right, rounding

    def graph(self, *, quantized: bool) -> bytes:
        return b"with codes" if quantized else b"without codes"

    def run(self, images: Any, *, quantized: bool, double: bool = False) -> list[Any]:
        return [noisy(self._right, self._rounding, 3) if quantized and not double else self._right]


def noisy(values: Any, decibels: float, seed: int) -> Any:
    noise = np.random.default_rng(seed).standard_normal(values.shape).astype(np.float32)
    return values + noise * np.linalg.norm(values) / np.linalg.norm(noise) * 10 ** (-decibels / 20)


@pytest.mark.parametrize(
    ("rounding", "scripted", "exported", "without_codes", "refused"),
    [
        (14.0, 15.0, 16.0, 90.0, ""),  # no further apart than rounding alone makes them
        (14.0, 15.0, 16.0, 30.0, "ONNX|TorchScript"),  # the graph is another one without codes too
        (60.0, 60.0, 15.0, 90.0, "the ONNX graph departs"),  # rounding does not explain it
        (60.0, 15.0, 60.0, 90.0, "the TorchScript graph departs"),
    ],
)
def test_rounding_explains_what_it_can(
    built: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    rounding: float,
    scripted: float,
    exported: float,
    without_codes: float,
    refused: str,
) -> None:
    right = np.random.default_rng(0).standard_normal((1, 50)).astype(np.float32)
    found = {
        b"without codes": noisy(right, without_codes, 1),
        built["bundle"].read("model.ts"): noisy(right, scripted, 2),
    }
    monkeypatch.setattr(agreement, "_outputs", lambda _target, graph, *_: [found.get(graph, noisy(right, exported, 4))])
    forms: Any = FakeForms(right, rounding)
    if refused:
        with pytest.raises(ModelError, match=refused):
            check_agreement(built["bundle"], built["golden"], built["spec"], OPTIONS, forms)
    else:
        assert "the order of summation alone moves the INT8 answers" in check_agreement(
            built["bundle"], built["golden"], built["spec"], OPTIONS, forms
        )


class Amplified(torch.nn.Module):
    """Periodic functions of large numbers: FP16 cannot tell one period from another, float32 can."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = torch.nn.Conv2d(3, 16, 3), torch.nn.Linear(16, 5)

    def forward(self, x: Any) -> Any:
        features = 1 + self.layer(x).mean((2, 3))
        return self.head(torch.sin(3000 * features) + torch.cos(9000 * features))


class Cancelling(torch.nn.Module):
    """A variance by hand, about a mean that float32 has few digits beside."""

    def __init__(self, mean: float) -> None:
        super().__init__()
        self.layer, self.head, self.mean = torch.nn.Conv2d(3, 16, 3), torch.nn.Linear(16, 5), mean

    def forward(self, x: Any) -> Any:
        features = self.layer(x) + self.mean
        return self.head(features.square().mean((2, 3)) - features.mean((2, 3)).square())


def test_rounding_to_fp16_that_the_network_enlarges_is_no_fault_of_a_graph() -> None:
    """It fails as what it is: by the parity of the FP16 graph."""
    torch.manual_seed(0)
    result = pcn_deploy.compile(Amplified().eval(), options(precision="fp16"), calibration=images())
    assert any("SQNR" in failure for failure in result.reports[0].failures)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
@pytest.mark.parametrize("mean", [400.0, 3000.0])
def test_a_network_whose_answers_are_its_own_rounding_is_told_so(mean: float, precision: str) -> None:
    torch.manual_seed(0)
    model = Cancelling(mean).eval()
    try:
        result = pcn_deploy.compile(model, options(precision=precision), calibration=images(16))
    except ModelError as error:
        assert "eager float32 and eager float64 agree to" in str(error)
    else:
        (note,) = [note for note in result.bundle.manifest["notes"] if "enlarges its own rounding" in note]
        assert "in float32 and in float64 agree to" in note
        assert not result


def test_a_network_that_only_runs_in_float32_is_held_against_itself(
    built: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **given: Any) -> Any:
        raise TypeError("expected float32")

    forms: Any = FakeForms(built["golden"].outputs["logits"], 60.0)
    monkeypatch.setattr(FakeForms, "run", refuse)
    wrong = with_member(built["bundle"], "model.onnx", built["model.onnx"])
    with pytest.raises(ModelError, match=r"From the eager network .* the ONNX graph departs"):
        check_agreement(wrong, built["golden"], built["spec"], OPTIONS, forms)
