"""Builds with an accuracy budget: the plan is searched, the engine is judged."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from helpers import invoke, refused
from small_builds import images, network, options

import pcn_deploy
from pcn_deploy import CompileResult
from pcn_deploy.calibration.collect import recalibrate
from pcn_deploy.calibration.record import Calibration
from pcn_deploy.calibration.search.digests import run_digests
from pcn_deploy.calibration.search.evaluation import Answers
from pcn_deploy.calibration.statistics import Statistics
from pcn_deploy.data.images import ImageSource
from pcn_deploy.errors import DataError, OptionError, ParityError
from pcn_deploy.network.evaluation_mode import in_evaluation_mode
from pcn_deploy.progress import silent
from pcn_deploy.proof.budget import Judges, check_count, prove_budget
from pcn_deploy.verbs.steps.preparation import prepare
from pcn_deploy.verbs.steps.sources import open_sources

torch = pytest.importorskip("torch")

HARMFUL = "blocks.0.attn.qkv_pos.5"


def spoil(monkeypatch: pytest.MonkeyPatch, layers: set[str] | None, *, histograms: bool = False) -> None:
    """Ranges so wide that the layers named (all of them if None) round everything to zero: faked calibrations.

    Without histograms there are no others to take.
    """
    from pcn_deploy.calibration import collect

    real = collect.calibrate

    def spoiled(*given: Any, **named: Any) -> Calibration:
        seen = real(*given, **named)
        for path in seen.ranges:
            if layers is None or path in layers:
                seen.ranges[path] *= 300
        if histograms:
            return seen
        bare = {path: Statistics(kept.amax, np.zeros(0, np.int64), 0.0) for path, kept in seen.statistics.items()}
        return replace(seen, statistics=bare)

    monkeypatch.setattr(collect, "calibrate", spoiled)


def build(budget: float, **given: Any) -> CompileResult:
    chosen = options(**{"precision": "int8", "max_drop": budget, **given.pop("options", {})})
    return pcn_deploy.compile(network(), chosen, calibration=images(16), **given)


def test_a_harmful_layer_is_left_out_and_the_engine_is_proven(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    spoil(monkeypatch, {HARMFUL})
    record = tmp_path / "search"
    result = build(6.0, evaluation=[images(160)], search_record=record, options={"targets": ("cpu", "torchscript")})
    assert result
    assert result.search is not None
    assert result.search.unquantized[0] == HARMFUL
    assert len(result.search.unquantized) < 3
    assert result.search.confirmed is not None
    entry = next(entry for entry in result.plan.entries if entry.op == HARMFUL)
    assert (entry.precision, entry.input_amax) == ("fp16", None)
    assert "budget of 6.0 points" in entry.reason
    quantized = list(onnx.load_from_string(result.bundle.read("model.onnx")).graph.node)
    assert sum(HARMFUL in node.name for node in quantized if node.op_type == "QuantizeLinear") == 0
    assert sum(node.op_type == "QuantizeLinear" for node in quantized) == len(result.plan.quantized_entries) > 2
    assert [(proof.target, proof.held_out, proof.labelled) for proof in result.proofs] == [
        ("cpu", True, False),
        ("torchscript", True, False),
    ]
    assert all(proof.counts.images == 80 for proof in result.proofs)
    saved = result.bundle.read_json("budget.json")
    assert saved["search"]["unquantized"] == list(result.search.unquantized)
    assert [proof["passed"] for proof in saved["proofs"]] == [True, True]
    assert saved["proofs"][0]["drop_bound"] == result.proofs[0].counts.drop_bound <= 6.0
    assert record.exists(), "it goes when the bundle is on disk"


def test_other_ranges_are_tried_before_a_layer_is_given_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    spoil(monkeypatch, {HARMFUL}, histograms=True)
    result = build(6.0, evaluation=[images(160)], search_record=tmp_path / "search")
    assert result
    assert result.search is not None
    assert HARMFUL not in result.search.unquantized
    kept = result.bundle.read_json("calibration.json")
    assert any("was chosen by the SQNR of the logits" in note for note in kept["notes"])
    entry = next(entry for entry in result.plan.entries if entry.op == HARMFUL)
    assert entry.input_amax == kept["ranges"][HARMFUL] <= kept["amax"][HARMFUL]
    assert kept["scales"][HARMFUL]["input"] == pytest.approx(kept["ranges"][HARMFUL] / 127, rel=1e-3)


def test_other_ranges_leave_the_weights_as_they_are() -> None:
    chosen = options(precision="int8", recovery=("weight-rounding",), weight_calibrator="mse", calibrator="percentile")
    prepared = prepare(in_evaluation_mode(network()), chosen, ImageSource(images(8), chosen.transform), silent)
    assert prepared.calibration is not None
    other = prepared.with_calibration(recalibrate(prepared.calibration, "max", 99.99))
    assert other.deployed is prepared.deployed
    for path, own in other.scales.items():
        np.testing.assert_array_equal(own.weight, prepared.scales[path].weight)
        assert own.input > prepared.scales[path].input
        assert other.plan.quantized_entries[path].input_amax == prepared.calibration.amax[path]


def test_a_layer_given_up_is_judged_by_the_rules_of_fp16() -> None:
    chosen = options(precision="int8")
    net = network()
    net.blocks[0].gamma_1.data *= 1e-6
    prepared = prepare(in_evaluation_mode(net), chosen, ImageSource(images(4), chosen.transform), silent)
    assert HARMFUL in prepared.scales, "INT8 weights are codes"
    left = {entry.op: entry for entry in prepared.leave_out(frozenset({HARMFUL}), "why").plan.entries}
    assert left[HARMFUL].precision == "fp32"
    assert "subnormal in FP16" in left[HARMFUL].reason
    assert {left[op] for op in left if op != HARMFUL} <= set(prepared.plan.entries)


def test_each_difference_of_two_runs_has_a_digest_of_its_own() -> None:
    """A record of earlier measurements holds only where all of them are equal."""

    def digests(
        *, calibrator: str = "max", spoiled: float = 0.0, judged: int = 20, labels: int = 0, answers: int = 0
    ) -> dict[str, str]:
        chosen, net = options(precision="int8", calibrator=calibrator), network()
        net.head.bias.data += spoiled
        prepared = prepare(in_evaluation_mode(net), chosen, ImageSource(images(4), chosen.transform), silent)
        source = ImageSource([images(judged)], chosen.transform)
        assert sum(len(batch) for batch, _ in source.batches(8)) == judged
        expected, reference = np.full(judged, labels), np.full(judged, answers)
        return run_digests(
            prepared.deployed,
            prepared.scales,
            [Answers(source, expected, reference, labelled=True, margins=np.ones(judged))],
        )

    first = digests()
    assert digests() == first
    changes: dict[str, dict[str, Any]] = {
        "weights": {"spoiled": 1.0},
        "scales": {"calibrator": "mse"},
        "images to judge by": {"judged": 21},
        "expected answers": {"labels": 1},
    }
    for what, change in changes.items():
        assert digests(**change)[what] != first[what], what
    assert digests(answers=1)["expected answers"] != first["expected answers"]
    assert set(first) == set(changes)


def test_every_layer_harmful(monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch, None)
    with pytest.raises(ParityError, match=r"No INT8 layer is left .* alone in INT8: \d+ of \d+ .* --precision fp16"):
        build(3.0, evaluation=[images(160)])


def test_an_engine_that_breaks_the_budget_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """The simulation is right and the engine is not: fake answers of the engine, for our own judgement."""

    def spoiled(engine: Any, *given: Any) -> Any:
        real = engine.predict
        engine.predict = lambda images: real(images) * np.where(np.arange(len(images)) % 4, 1, -1)[:, None]
        return prove_budget(engine, *given)

    monkeypatch.setattr("pcn_deploy.verbs.build.prove_budget", spoiled)
    result = build(6.0, evaluation=[images(160)])
    assert [bool(report) for report in result.reports] == [True]
    assert [bool(proof) for proof in result.proofs] == [False]
    assert not result
    assert result.proofs[0].counts.lost >= 15


def test_fp16_is_proven_without_a_search() -> None:
    result = build(6.0, evaluation=[images(64)], options={"precision": "fp16"})
    assert result
    assert result.search is None
    assert (result.proofs[0].held_out, result.proofs[0].counts.images) == (True, 64)


def test_the_calibration_images_judge_where_there_are_no_others() -> None:
    chosen = options(precision="int8", max_drop=6.0, calibration_images=8)
    result = pcn_deploy.compile(network(), chosen, calibration=[images(48)])
    assert result.bundle.manifest.calibration["images"] == 8
    assert (result.proofs[0].held_out, result.proofs[0].counts.images) == (False, 48)


def test_without_labels_nothing_is_judged_and_it_says_so() -> None:
    result = pcn_deploy.compile(network(), options(precision="int8"), calibration=images(8))
    assert (result.search, result.proofs) == (None, ())
    judged = result.bundle.manifest.judged
    assert (judged.golden_images, judged.edge_images, judged.golden_calibrated) == (8, 7, True)
    assert "--data" in judged.accuracy


@pytest.mark.parametrize("precision", ["int8", "fp16"])
def test_a_budget_that_was_not_asked_for_refuses_nothing(precision: str) -> None:
    """20 images cannot prove 1.0 points, nor break it."""
    result = pcn_deploy.compile(
        network(), options(precision=precision), calibration=images(8), evaluation=[images(28)[8:]]
    )
    assert result
    assert result.search is None
    (proof,) = result.proofs
    assert (proof.verdict, proof.asked, proof.counts.images) == ("open", False, 20)
    saved = result.bundle.read_json("budget.json")["proofs"][0]
    assert (saved["verdict"], saved["passed"]) == ("open", True)
    assert saved["drop"] <= saved["drop_bound"]
    assert result.bundle.manifest.judged.golden_calibrated is False


def test_a_budget_asked_for_is_proven_in_every_precision() -> None:
    with pytest.raises(DataError, match=r"must be proven on images: give --data"):
        pcn_deploy.compile(network(), options(precision="fp16", max_drop=1.0))
    with pytest.raises(ParityError, match="cannot prove"):
        pcn_deploy.compile(network(), options(precision="fp16", max_drop=1.0), calibration=images(8))


def labelled(path: Path, count: int, *, shift: int = 0) -> Path:
    """Images with the answers of the network as their labels."""
    pixels = images(count)
    with torch.inference_mode():
        labels = network()(torch.from_numpy(pixels)).argmax(1).numpy()
    np.savez(path, images=pixels, labels=(labels + shift) % 5)
    return path


@pytest.mark.parametrize(
    ("count", "limit", "calibrated", "judged"), [(90, 512, 72, 18), (90, 30, 30, 60), (70, 512, 70, 0)]
)
def test_labelled_calibration_images_are_held_out(
    tmp_path: Path, count: int, limit: int, calibrated: int, judged: int
) -> None:
    chosen = options(precision="int8", calibrator="max", calibration_images=limit)
    result = pcn_deploy.compile(network(), chosen, calibration=labelled(tmp_path / "set.npz", count))
    assert result.bundle.manifest.calibration["images"] == calibrated
    assert [proof.counts.images for proof in result.proofs] == ([judged] if judged else [])
    assert result.bundle.manifest.judged.golden_calibrated == (judged == 0)
    source, held_out = open_sources(tmp_path / "set.npz", None, chosen)
    assert source is not None
    names = [sample.name for sample in source]
    assert len(set(names)) == calibrated
    assert held_out is None or not set(names) & {sample.name for sample in held_out}


def test_folders_that_are_no_classes_stop_no_build(tmp_path: Path) -> None:
    result = pcn_deploy.compile(
        network(), options(precision="fp16"), calibration=labelled(tmp_path / "set.npz", 400, shift=1)
    )
    assert result
    assert result.proofs == ()
    assert result.bundle.manifest.judged.accuracy


def test_an_image_without_an_answer_is_lost() -> None:
    source = ImageSource(
        [np.arange(4, dtype=np.float32).reshape(4, 1, 1, 1) * np.ones((4, 3, 32, 32), np.float32)], options().transform
    )
    answers = Answers(source, np.array([0, 0, 1, 1]), np.array([0, 1, 1, 1]), labelled=True, margins=np.ones(4))

    def forward(batch: Any) -> Any:
        logits = np.tile([1.0, 0.0], (len(batch), 1))
        logits[batch[:, 0, 0, 0] < 2] = np.nan  # argmax of NaN is class 0
        return logits

    found = answers.predict(forward)
    assert found.tolist() == [-1, -1, 0, 0]
    counts = answers.count(found)
    assert (counts.images, counts.lost, counts.gained) == (4, 4, 0)
    assert answers.unanswered(found) == ("array[0]", "array[1]")
    assert answers.compare(forward, lambda *_: False)[0] == counts


def test_too_few_images_are_refused_before_any_work() -> None:
    with pytest.raises(ParityError, match=r"^100 images cannot prove .* may be 2\.63 .* Give 539 images or more"):
        build(0.5, evaluation=[images(100)])
    with pytest.raises(OptionError, match="no number of images"):
        build(0.0, evaluation=[images(100)])


def test_halves_are_held_out_only_if_each_could_prove_the_budget() -> None:
    needed = check_count(1000, 3.0)

    def judges(count: int) -> Judges:
        source = ImageSource([np.zeros((count, 3, 32, 32), np.float32)], options().transform)
        found = Answers(source, np.arange(count), np.arange(count), labelled=True, margins=np.ones(count))
        return Judges.share_out(found, 3.0, searching=True)

    enough = judges(2 * needed)
    assert enough.held_out
    assert enough.search.expected.tolist() == list(range(0, 2 * needed, 2))
    assert enough.proof.expected.tolist() == list(range(1, 2 * needed, 2))
    assert not judges(2 * needed - 1).held_out


def test_both_halves_see_all_classes_though_they_come_in_turn() -> None:
    count = 2 * check_count(1000, 3.0)
    source = ImageSource([np.zeros((count, 3, 32, 32), np.float32)], options().transform)
    labels = np.arange(count) % 2
    found = Judges.share_out(
        Answers(source, labels, labels, labelled=True, margins=np.ones(count)), 3.0, searching=True
    )
    for half in (found.search, found.proof):
        assert abs(np.bincount(half.expected, minlength=2) - len(half) / 2).max() <= 1


@pytest.fixture
def words(tmp_path: Path) -> list[Any]:
    from safetensors.torch import save_file

    model = network()
    save_file(model.state_dict(), tmp_path / "small.safetensors")
    pixels = images(160)
    with torch.inference_mode():
        labels = model(torch.from_numpy(pixels)).argmax(1).numpy()
    np.savez(tmp_path / "images.npz", images=pixels, labels=labels)
    given = ["build", "patchconvnet", "--weights", tmp_path / "small.safetensors", "--resolution", 32, "-q"]
    return [*given, "--precision", "int8", "--calibration", tmp_path / "images.npz", "-o", tmp_path / "out.pcn"]


def test_the_command_prints_the_proof(words: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch, {HARMFUL})
    result = invoke(*words, "--data", tmp_path / "images.npz", "--max-drop", 6)
    assert result.exit_code == 0, result.output
    printed = " ".join(result.stdout.split())
    assert re.search(rf"Search: \d layers? left unquantised: {re.escape(HARMFUL)}", printed)
    assert "Accuracy: judged on 80 images by the labels of" in printed
    assert "none of these images chose the plan" in printed
    assert (tmp_path / "out.pcn").exists()
    assert not (tmp_path / "out.pcn.search").exists()


def test_the_command_exits_3_where_nothing_is_proven(words: list[Any], tmp_path: Path) -> None:
    refused(invoke(*words, "--max-drop", 0.5), 3, "160 images cannot prove", "Give 539 images or more")
    assert not (tmp_path / "out.pcn").exists()


def test_a_record_is_removed_only_by_the_build_that_it_belongs_to(words: list[Any], tmp_path: Path) -> None:
    """An FP16 build to the same file, and one that cannot be written, leave the record of a killed search."""
    record = tmp_path / "out.pcn.search"
    record.write_text("of a killed search")
    given = ["build", "patchconvnet", *words[2:]]
    given[given.index("int8")] = "fp16"
    assert invoke(*given).exit_code == 0
    assert record.read_text() == "of a killed search"
