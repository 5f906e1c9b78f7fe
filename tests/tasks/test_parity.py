"""Metrics against the formulas written out, and the verdict."""

from __future__ import annotations

import itertools
import json
import math
import re
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from pcn_deploy.calibration.plan.rules import PRECISIONS
from pcn_deploy.errors import DataError, OptionError
from pcn_deploy.tasks.classification import LogitsMeter
from pcn_deploy.tasks.limits import BUDGETS, ParityBudget, budget_for
from pcn_deploy.tasks.metrics import SQNR_CEILING_DB
from pcn_deploy.tasks.noise_floor import ALIKE, NoiseFloor, natural_db
from pcn_deploy.tasks.report import ParityReport, report_from_json

Floats = npt.NDArray[np.floating[Any]]
STRICT = ParityBudget(cosine_min=0.99, sqnr_db=30.0, top1_drop=1.0)

logits = arrays(np.float32, (5, 4), elements=st.floats(-100, 100, width=32))


def measure(reference: Floats, engine: Floats, labels: npt.NDArray[np.int64] | None = None) -> dict[str, float]:
    meter = LogitsMeter()
    meter.update(reference, engine, labels)
    return meter.metrics()


def judge(reference: Floats, engine: Floats, labels: npt.NDArray[np.int64] | None = None) -> ParityReport:
    meter = LogitsMeter()
    meter.update(reference, engine, labels)
    return meter.report(target="cpu", executed_by="cpu", data="test", budget=STRICT)


@given(logits, logits)
def test_metrics_are_the_formulas(reference: Floats, engine: Floats) -> None:
    r, y = reference.astype(np.float64), engine.astype(np.float64)
    assume(np.linalg.norm(r, axis=1).min() > 1e-6 and np.linalg.norm(y, axis=1).min() > 1e-6)
    assume(((r - y) ** 2).sum() > 1e-12)
    found = measure(reference, engine)
    cosines = [float(a @ b / (np.sqrt(a @ a) * np.sqrt(b @ b))) for a, b in zip(r, y, strict=True)]
    assert found["cosine_min"] == pytest.approx(min(cosines), abs=1e-9)
    expected = 10 * np.log10(np.sum(r * r) / np.sum((r - y) * (r - y)))
    assert found["sqnr_db"] == pytest.approx(min(expected, SQNR_CEILING_DB), abs=1e-6)
    assert found["max_abs_error"] == np.max(np.abs(r - y))
    same = [int(np.argmax(a)) == int(np.argmax(b)) for a, b in zip(r, y, strict=True)]
    assert found["top1_agreement"] == pytest.approx(100 * sum(same) / len(same))


@given(logits, logits, st.integers(1, 4), arrays(np.int64, 5, elements=st.integers(0, 3)))
def test_batches_do_not_matter(reference: Floats, engine: Floats, cut: int, labels: npt.NDArray[np.int64]) -> None:
    meter = LogitsMeter()
    for part in (slice(cut), slice(cut, None)):
        meter.update(reference[part], engine[part], labels[part])
    assert meter.metrics() == pytest.approx(measure(reference, engine, labels), abs=1e-9)


def test_metrics_are_the_same_to_the_bit_in_any_order_grouping_and_number_of_meters() -> None:
    random = np.random.default_rng(0)
    reference = random.standard_normal((33, 300)) * np.logspace(-6, 6, 33)[:, None]
    engine = reference + random.standard_normal(reference.shape) * 1e-3
    labels = random.integers(0, 300, 33)
    whole = LogitsMeter()
    whole.update(reference, engine, labels)
    for seed in range(5):
        order = np.random.default_rng(seed).permutation(33)
        meters = [LogitsMeter() for _ in range(3)]
        for number, part in enumerate(np.array_split(order, 1 + 3 * seed)):
            meters[number % 3].update(reference[part], engine[part], labels[part])
        merged = LogitsMeter()
        for meter in meters:
            merged.merge(meter.state())
        assert merged.metrics() == whole.metrics()


def test_a_broken_image_is_broken_after_merging() -> None:
    meter, merged = LogitsMeter(), LogitsMeter()
    meter.update(np.ones((2, 4)), np.array([[1.0] * 4, [np.nan] * 4]))
    merged.merge(meter.state())
    assert merged.metrics() == meter.metrics()
    assert (merged.metrics()["cosine_min"], merged.metrics()["sqnr_db"]) == (-1, -SQNR_CEILING_DB)
    merged.merge(LogitsMeter().state())
    assert merged.metrics() == meter.metrics()


@given(logits)
def test_equal_outputs_are_perfect(reference: Floats) -> None:
    found = measure(reference, reference.copy())
    assert found["cosine_min"] == pytest.approx(1.0, abs=1e-12)
    assert found["sqnr_db"] == SQNR_CEILING_DB
    assert (found["max_abs_error"], found["top1_agreement"]) == (0.0, 100.0)
    assert judge(reference, reference.copy())


def test_accuracy_with_labels() -> None:
    reference = np.eye(4, dtype=np.float32)
    engine = reference[[0, 1, 2, 2]]
    found = measure(reference, engine, np.array([0, 1, 0, 3]))
    assert (found["top1_reference"], found["top1_engine"], found["top1_drop"]) == (75.0, 50.0, 25.0)
    assert found["top1_agreement"] == 75.0
    assert "top1_drop" not in measure(reference, engine)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [(0, 0), (2, 3)])
def test_outputs_that_are_not_numbers_fail(bad: float, place: tuple[int, int]) -> None:
    reference = np.arange(12, dtype=np.float32).reshape(3, 4) + 1
    engine = reference.copy()
    engine[place] = bad
    report = judge(reference, engine)
    assert not report
    assert report.metrics["cosine_min"] == -1.0
    assert report.metrics["sqnr_db"] == -SQNR_CEILING_DB
    assert report.metrics["max_abs_error"] > 1e300


def test_an_engine_of_zeros_fails() -> None:
    reference = np.ones((2, 3), np.float32)
    report = judge(reference, np.zeros_like(reference))
    assert not report
    assert report.metrics["cosine_min"] == 0.0
    assert report.metrics["sqnr_db"] == pytest.approx(0.0)


def test_noise_where_the_reference_is_silent_fails() -> None:
    report = judge(np.zeros((2, 3), np.float32), np.full((2, 3), 1e-3, np.float32))
    assert not report
    assert report.metrics["sqnr_db"] == -SQNR_CEILING_DB


def test_one_bad_image_among_many_decides_the_cosine() -> None:
    reference = np.ones((100, 3), np.float32)
    engine = reference.copy()
    engine[41] = [1, 1, -1]
    report = judge(reference, engine)
    assert report.metrics["cosine_min"] == pytest.approx(1 / 3)
    assert len(report.failures) == 2
    assert "cosine 0.33333 of the worst image, image 41, is below 0.99" in report.failures[0]
    assert "SQNR 18.8 dB is below 30.0 dB" in report.failures[1]


def test_what_all_logits_have_in_common_hides_no_error() -> None:
    rng = np.random.default_rng(0)
    reference, wrong = (rng.standard_normal((20, 10)).astype(np.float32) for _ in range(2))
    report = judge(reference + 300, wrong + 300)
    assert report.metrics["cosine_min"] > 0.9999
    assert report.metrics["sqnr_db"] > 40
    assert len(report.failures) == 1
    assert re.search(r"^SQNR 4\d\.\d dB is that of .* differences, -\d\.\d dB, is below 30\.0 dB$", report.failures[0])
    shifted = (reference + rng.standard_normal((20, 1)) / 100).astype(np.float32)
    assert judge(reference + 30, shifted + 30).metrics["sqnr_differences_db"] > 90, "the same for all logits: no error"
    alone = LogitsMeter()
    alone.update(reference[:, :1], reference[:, :1] + 1e-3)
    assert 50 < alone.metrics()["sqnr_differences_db"] < 70, "a single logit is measured from zero"


def test_the_drop_alone_fails() -> None:
    """Logits nearly equal, but the class changes: only labels can tell that it matters."""
    reference = np.array([[1.0, 0.9999, -1.0]] * 10, np.float32)
    engine = reference[:, [1, 0, 2]].copy()
    assert judge(reference, engine)
    report = judge(reference, engine, np.zeros(10, np.int64))
    (failure,) = report.failures
    assert failure.startswith("top-1 drops by 100.00 points on 10 images, with 95% confidence by more than 53.48")
    assert not report.passed
    assert judge(reference, engine, np.ones(10, np.int64)), "a gain is no drop"


def test_a_limit_that_is_just_kept_passes() -> None:
    reference, engine = np.eye(4, dtype=np.float32), np.eye(4, dtype=np.float32)
    engine[3] = [1, 0, 0, 1.0001]
    metrics = measure(reference, engine, np.array([0, 1, 2, 3]))
    exact = ParityBudget(cosine_min=metrics["cosine_min"], sqnr_db=metrics["sqnr_db"], top1_drop=metrics["top1_drop"])
    meter = LogitsMeter()
    meter.update(reference, engine, np.array([0, 1, 2, 3]))
    assert meter.report(target="cpu", executed_by="cpu", data="test", budget=exact)


@pytest.mark.parametrize("labels", [[0, 4], [-1, 0]])
def test_labels_outside_the_classes(labels: list[int]) -> None:
    reference = np.ones((2, 4), np.float32)
    with pytest.raises(DataError, match=rf"Labels run from {min(labels)} to {max(labels)}; the network has 4 classes"):
        LogitsMeter().update(reference, reference, np.array(labels))


@pytest.mark.parametrize(("one", "other"), [((2, 4), (2, 3)), ((2, 4), (1, 4)), ((4,), (4,)), ((2, 4, 1), (2, 1, 4))])
def test_shapes_that_differ(one: tuple[int, ...], other: tuple[int, ...]) -> None:
    with pytest.raises(DataError, match=r"expected the same"):
        LogitsMeter().update(np.ones(one, np.float32), np.ones(other, np.float32))


def test_nothing_compared_is_no_parity() -> None:
    with pytest.raises(DataError, match=r"No images were compared"):
        LogitsMeter().report(target="cpu", executed_by="cpu", data="none", budget=STRICT)


def test_every_precision_has_a_budget_and_lower_ones_allow_more() -> None:
    assert tuple(BUDGETS) == PRECISIONS
    assert BUDGETS["fp8"] == BUDGETS["int8"]
    budgets = [budget_for(precision) for precision in PRECISIONS if precision != "fp8"]
    for tight, loose in itertools.pairwise(budgets):
        assert tight.cosine_min > loose.cosine_min
        assert tight.sqnr_db > loose.sqnr_db
        assert tight.top1_drop < loose.top1_drop


def test_the_limit_of_the_user_replaces_the_drop_only() -> None:
    budget, default = budget_for("int8", 0.25), BUDGETS["int8"]
    assert (budget.cosine_min, budget.sqnr_db, budget.top1_drop) == (default.cosine_min, default.sqnr_db, 0.25)
    assert budget_for("int8", 0.0).top1_drop == 0.0


@pytest.mark.parametrize("limit", [-0.1, 100.0, math.nan, math.inf])
def test_a_limit_that_is_none(limit: float) -> None:
    with pytest.raises(OptionError, match=r"--max-drop .*from 0 to below 100"):
        budget_for("fp16", limit)


def test_the_json_form_keeps_its_keys() -> None:
    reference = np.eye(3, dtype=np.float32)
    meter = LogitsMeter()
    meter.update(reference, reference, np.arange(3))
    found = meter.report(target="tensorrt", executed_by="cpu", data="golden", budget=STRICT).to_json()
    assert json.loads(json.dumps(found)) == found
    assert (found["passed"], found["target"], found["executed_by"], found["images"]) == (True, "tensorrt", "cpu", 3)
    assert (found["data"], found["failures"]) == ("golden", [])
    names = {"cosine_min", "cosine_judged", "sqnr_db", "sqnr_differences_db", "sqnr_changes_db", "max_abs_error"}
    names |= {"non_finite", "top1_lost", "top1_gained", "top1_drop_bound"}
    names |= {"top1_agreement", "top1_reference", "top1_engine", "top1_drop"}
    assert set(found["metrics"]) == names
    assert found["budget"] == {"cosine_min": 0.99, "sqnr_db": 30.0, "top1_drop": 1.0}


def test_a_reference_that_is_no_number_is_no_reference() -> None:
    reference = np.ones((3, 4))
    reference[1, 2] = np.nan
    with pytest.raises(DataError, match="nothing to be equal to"):
        LogitsMeter().update(reference, np.ones((3, 4)))


def test_an_infinite_error_is_still_json() -> None:
    meter = LogitsMeter()
    meter.update(np.ones((1, 4)), np.full((1, 4), np.inf))
    report = meter.report(target="cpu", executed_by="cpu", data="golden", budget=BUDGETS["int8"])
    assert not report
    assert "Infinity" not in json.dumps(report.to_json())
    assert report_from_json(json.loads(json.dumps(report.to_json()))) == report


def test_what_every_image_gets_alike_hides_no_error() -> None:
    """Priors of the classes of 100 standard deviations; the engine answers them and nothing of the image."""
    rng = np.random.default_rng(0)
    priors, changes = 100 * rng.standard_normal(10), rng.standard_normal((40, 10))
    reference, engine = priors + changes, priors + rng.standard_normal((40, 10))
    report = judge(reference, engine)
    assert report.metrics["sqnr_db"] > 34
    assert report.metrics["sqnr_differences_db"] > 34
    (failure,) = report.failures
    assert "what all images have in common; that of what the image changes, -2.7 dB" in failure
    rows = reference - reference.mean(1, keepdims=True)
    error = rows - (engine - engine.mean(1, keepdims=True))
    unbiased = rows.var(0, ddof=1).sum() * len(rows)
    expected = 10 * np.log10(unbiased / (error**2).sum())
    assert report.metrics["sqnr_changes_db"] == pytest.approx(expected, abs=1e-6)
    assert judge(reference, priors + 0.99 * changes)


@pytest.mark.parametrize(
    ("precision", "changes", "noise", "passed", "noted"),
    [
        ("fp16", 10**-3.5, 10**-3.5, True, True),  # 70 dB are what FP16 rounds: an engine that tells no more is right
        ("fp16", 10**-2.77, 10**-2.57, False, False),  # 51 dB are not
        ("fp32", 10**-3.5, 10**-3.5, False, False),
        ("bf16", 10**-2.5, 10**-2.2, True, True),
        ("int8", 10**-2.77, 10**-2.57, False, False),
        ("fp16", 0.1, 1e-3, True, False),
    ],
)
def test_changes_that_a_precision_cannot_tell_are_noted(
    precision: str, changes: float, noise: float, *, passed: bool, noted: bool
) -> None:
    rng = np.random.default_rng(0)
    reference = rng.standard_normal(100) + changes * rng.standard_normal((40, 100))
    meter = LogitsMeter()
    meter.update(reference, reference + noise * rng.standard_normal((40, 100)))
    report = meter.report(
        target="cpu",
        executed_by="cpu",
        data="test",
        budget=BUDGETS[precision],
        floor=NoiseFloor(natural_db=natural_db(np.eye(4, dtype=np.float32), precision)),
    )
    assert bool(report) == passed, report.failures
    assert report.notes == ((ALIKE,) if noted else ())
    assert "sqnr_changes_db" in report.metrics


def test_images_that_change_nothing_say_nothing() -> None:
    assert "sqnr_changes_db" not in measure(np.ones((1, 4)), np.ones((1, 4)))
    same = np.tile(np.arange(4.0), (5, 1))
    assert "sqnr_changes_db" not in measure(same, same + 1e-3)


def test_images_without_a_finite_answer_are_named_and_wrong() -> None:
    reference = np.eye(4)
    engine = reference.copy()
    engine[0] = np.nan  # argmax of NaN is 0, the right class
    engine[2, 1] = np.inf
    meter = LogitsMeter()
    meter.update(reference, engine, np.arange(4), ["a.png", "b.png", "c.png", "d.png"].__getitem__)
    merged = LogitsMeter()
    merged.merge(meter.state())
    for each in (meter, merged):
        report = each.report(target="cpu", executed_by="cpu", data="set", budget=STRICT)
        assert "NaN or infinite logits for a.png, c.png" in report.failures
        assert (report.metrics["non_finite"], report.metrics["top1_agreement"]) == (2, 50)
        assert (report.metrics["top1_engine"], report.metrics["top1_lost"]) == (50, 2)
        json.dumps(report.to_json(), allow_nan=False)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_budget_that_lets_everything_pass(bad: float) -> None:
    with pytest.raises(OptionError, match="not finite"):
        ParityBudget(cosine_min=bad, sqnr_db=1.0, top1_drop=1.0)


@pytest.mark.parametrize(
    ("images", "bad", "tolerant", "passed"),
    [(1000, 10, True, True), (1000, 11, True, False), (1000, 1, False, False), (99, 1, True, False)],
)
def test_one_image_in_a_hundred_of_a_large_set_may_be_below_the_cosine(
    images: int, bad: int, *, tolerant: bool, passed: bool
) -> None:
    reference = np.random.default_rng(0).standard_normal((images, 10))
    engine = reference.copy()
    engine[:bad] += 0.2 * np.roll(reference[:bad], 1, axis=1)  # a cosine of about 0.98
    meter = LogitsMeter()
    meter.update(reference, engine)
    report = meter.report(target="cpu", executed_by="cpu", data="set", budget=STRICT, tolerant=tolerant)
    sqnr_is_kept = [failure for failure in report.failures if "SQNR" in failure] == []
    assert sqnr_is_kept
    assert bool(report) == passed
    assert report.metrics["cosine_min"] < 0.99
    assert report.metrics["cosine_judged"] == pytest.approx(
        sorted(a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in zip(reference, engine, strict=True))[
            images // 100 if tolerant else 0
        ]
    )


@pytest.mark.parametrize(
    ("images", "lost", "task", "asked", "passed"),
    [
        (1000, 0, "proven", True, True),
        (200, 4, "open", False, True),
        (200, 4, "open", True, False),
        (1000, 19, "broken", False, False),
        (6, 6, "broken", False, False),
    ],
)
def test_a_drop_is_proven_broken_or_open(images: int, lost: int, task: str, *, asked: bool, passed: bool) -> None:
    """2 points of 200 images are no proof of more than 1; 1.9 of 1,000 are."""
    reference = np.tile([1.0, 0.9999, -1.0], (images, 1)) + np.random.default_rng(0).standard_normal((images, 1)) / 10
    engine = reference.copy()
    engine[:lost] = engine[:lost, [1, 0, 2]]
    meter = LogitsMeter()
    meter.update(reference, engine, np.zeros(images, np.int64))
    report = meter.report(target="cpu", executed_by="cpu", data="set", budget=STRICT, to_prove=asked)
    assert (report.task, bool(report)) == (task, passed), report.failures
    assert report.metrics["top1_drop"] == pytest.approx(100 * lost / images)
    assert report.metrics["top1_drop_bound"] >= report.metrics["top1_drop"]
