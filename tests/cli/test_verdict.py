"""The verdict in a sentence: what it means, on what it rests, and why where it is none."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from helpers import small_manifest

from pcn_deploy.artefact.manifest import Judged, Manifest
from pcn_deploy.cli import verdict
from pcn_deploy.proof.budget import NOT_LABELLED, BudgetProof
from pcn_deploy.tasks.bound import PairedCounts
from pcn_deploy.tasks.classification import LogitsMeter
from pcn_deploy.tasks.limits import budget_for
from pcn_deploy.tasks.report import ParityReport


def report(target: str = "cpu", error: float = 0.01, *, labels: bool = False, **given: Any) -> ParityReport:
    expected, noise = np.random.default_rng(0).standard_normal((2, 300, 10))
    meter = LogitsMeter()
    meter.update(expected, expected + error * noise, expected.argmax(1) if labels else None)
    budget = budget_for("int8")
    whole = {"target": target, "executed_by": "cpu", "data": "photos", "budget": budget, **given}
    return meter.report(**whole)


def proof(lost: int, images: int, **given: Any) -> BudgetProof:
    whole: dict[str, Any] = {"target": "cpu", "executed_by": "cpu", "data": "photos", "held_out": True, "top1": 90.0}
    whole |= {"labelled": True, "counts": PairedCounts(images, lost, 0), "budget": 1.0, "given": images, "asked": False}
    return BudgetProof(**{**whole, **given})


def manifest(accuracy: str = "") -> Manifest:
    made = Manifest.from_json({**small_manifest(), "precision": "int8"})
    made.judged = Judged(golden_images=8, edge_images=7, accuracy=accuracy)
    return made


def edged(one: ParityReport, decibels: float) -> ParityReport:
    return replace(one, metrics={**one.metrics, "edge_sqnr_db": decibels})


def test_what_passed_says_on_what_it_rests() -> None:
    seen = edged(report(), 31.04)
    told = verdict.of_build(manifest(), [seen], [proof(0, 300)], "")
    assert told == (
        "Passed: the INT8 engine for cpu answers as the trained network does: SQNR 40.0 dB on 8 images and 31.0 dB on "
        "7 edge images; accuracy drop at most 0.89 points with 95 % confidence on 300 labelled images."
    )
    assert "300 images, by the answers of the trained network." in verdict.of_build(
        manifest(), [seen], [proof(0, 300, labelled=False)], ""
    )


def test_the_worst_engine_and_the_largest_bound_are_told() -> None:
    reports = [edged(report(), 30.0), edged(report("tensorrt-rtx", 0.1), 20.0)]
    proofs = [proof(0, 300), proof(1, 300, target="tensorrt-rtx")]
    told = verdict.of_build(manifest(), reports, proofs, "")
    assert told.startswith(
        "Passed: the INT8 engines for cpu and tensorrt-rtx answer as the trained network does: SQNR 20"
    )
    assert "and 20.0 dB on 7 edge images" in told
    assert (
        "accuracy drop 0.33 points on 300 labelled images, which are too few to tell whether it is within 1.00" in told
    )
    assert told.endswith("For tensorrt-rtx the graph of the engine was run, not the engine.")


def test_an_accuracy_that_was_not_judged_is_said_not_to_be() -> None:
    told = verdict.of_build(manifest(NOT_LABELLED), [report()], [], "")
    assert told.endswith(
        "dB on 8 images; the accuracy was not judged (no labelled images were at hand that did not calibrate: give "
        "--data DIR with a folder for each class)."
    )
    assert "was not judged (the golden set has no labels: --data DIR" in verdict.of_verify(
        manifest(), report(), given=False
    )
    assert "was not judged (the images have no labels)" in verdict.of_verify(manifest(), report(), given=True)


def test_images_with_labels_tell_the_accuracy_of_an_engine() -> None:
    told = verdict.of_verify(manifest(), report(error=1e-6, labels=True), given=True)
    assert told.startswith(
        "Passed: the INT8 engine for cpu answers as the trained network does: SQNR 120.0 dB on 300 i"
    )
    assert told.endswith("accuracy drop at most 0.89 points with 95 % confidence on 300 labelled images.")
    assert "edge" not in told


def test_what_failed_says_why_first() -> None:
    bad = report(error=3.0)
    assert bad.failures
    told = verdict.of_verify(manifest(), bad, given=False)
    assert told.startswith(f"Failed: {bad.failures[0]}")
    assert told.endswith("So the INT8 engine for cpu does not answer as the trained network does.")
    told = verdict.of_build(manifest(), [bad, report("torchscript")], [], "cpu: too far")
    assert told.startswith("Failed: cpu: too far. So the INT8 engines for cpu and torchscript do not answer as the ")


def test_what_so_few_images_cannot_prove_is_not_called_wrong() -> None:
    """A drop that was asked for and is open: the engine may be right."""
    few = report(labels=True, to_prove=True, budget=replace(budget_for("int8"), top1_drop=0.1))
    assert (few.task, len(few.failures)) == ("open", 1)
    told = verdict.of_verify(manifest(), few, given=True)
    assert told.startswith(f"Not proven: {few.failures[0]}. These images do not show whether the INT8 engine for cpu")
    wide = proof(0, 100, asked=True)
    told = verdict.of_build(manifest(), [report()], [wide], wide.failures[0])
    assert told.startswith("Not proven: top-1 drops by 0.00 points on 100 images")
    for reports, proofs in (([report(error=3.0)], [wide]), ([report()], [wide, proof(20, 100, asked=True)])):
        assert verdict.of_build(manifest(), reports, proofs, "why").startswith("Failed: why. So the INT8 engine")


def test_a_constant_is_no_proof() -> None:
    told = verdict.of_verify(manifest(), replace(report(), constant=True), given=False)
    assert told.startswith("Passed, but the network answers the same to every image: nothing else was judged")
    assert verdict.explain_sqnr("int8", [replace(report(), constant=True)]) == ""


@pytest.mark.parametrize(
    ("precision", "decibels", "told"),
    [
        (
            "int8",
            31.0,
            "SQNR 31.0 dB: the error is 2.8 % of the answer (root mean square). INT8 must keep 15 dB (18 %); for "
            "comparison, BF16 20 dB (10 %), FP16 40 dB (1 %), FP32 60 dB (0.1 %). More is better.",
        ),
        ("fp32", 200.0, "SQNR 200 dB stands for answers that are equal to the last bit. FP32 must keep 60 dB (0.1 %)."),
        ("fp16", 120.0, "the error is less than 0.01 % of the answer"),
        ("fp16", -20.0, "the error is 1000 % of the answer"),
    ],
)
def test_decibels_are_explained_by_the_limits_of_the_precision(precision: str, decibels: float, told: str) -> None:
    one = report(budget=budget_for(precision))
    one = replace(one, metrics={**one.metrics, "sqnr_db": decibels})
    assert told in verdict.explain_sqnr(precision, [one, replace(one, metrics={"sqnr_db": 300.0})])
