"""What a build that fails was tried with."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from small_builds import images, network, options

import pcn_deploy
from pcn_deploy import CompileResult
from pcn_deploy.calibration.record import Calibration
from pcn_deploy.tasks.limits import ParityBudget
from pcn_deploy.verbs.options import CompileOptions

torch = pytest.importorskip("torch")

HARMFUL = "blocks.0.attn.qkv_pos.5"


@pytest.fixture
def strict(monkeypatch: pytest.MonkeyPatch) -> None:
    """A budget that INT8 keeps clearly, but for what is spoiled."""
    budget = ParityBudget(cosine_min=0.999, sqnr_db=45.0, top1_drop=1.0)
    monkeypatch.setattr(CompileOptions, "budget", property(lambda self: budget))


def build(monkeypatch: pytest.MonkeyPatch, calibrator: str, layers: set[str] | None) -> CompileResult:
    """Ranges of one calibrator that are 300 times too wide, of the layers named: a fake of a calibrator that loses."""
    from pcn_deploy.calibration import collect

    def spoiled(seen: Calibration, path: str) -> float:
        return 300.0 if seen.calibrator == calibrator and (layers is None or path in layers) else 1.0

    for name in ("calibrate", "recalibrate"):
        real = getattr(collect, name)

        def patched(*given: Any, _real: Any = real, **named: Any) -> Calibration:
            seen: Calibration = _real(*given, **named)
            for path in seen.ranges:
                seen.ranges[path] *= spoiled(seen, path)
            return seen

        monkeypatch.setattr(collect, name, patched)
    return pcn_deploy.compile(network(), options(precision="int8", calibrator=calibrator), calibration=images())


@pytest.mark.usefixtures("strict")
def test_another_calibrator_helps_and_does_what_was_said(monkeypatch: pytest.MonkeyPatch) -> None:
    result = build(monkeypatch, "entropy", None)
    assert not result
    best = result.advice[0]
    assert best.passed
    name = best.words.removeprefix("--calibrator ")
    assert name in ("max", "mse", "percentile")
    again = pcn_deploy.compile(network(), options(precision="int8", calibrator=name), calibration=images())
    assert again
    assert again.advice == ()
    assert again.reports[0].metrics["sqnr_db"] == pytest.approx(best.sqnr_db, abs=3)


@pytest.mark.usefixtures("strict")
def test_the_layer_that_harms_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    result = build(monkeypatch, "max", {HARMFUL})
    assert not result
    (attempt,) = [one for one in result.advice if one.words.startswith("--recipe")]
    assert attempt.passed
    assert f'[layers."{HARMFUL}"] precision = "fp16"' in attempt.words
    assert attempt.words.count("[layers.") == 1
    assert np.isfinite(attempt.sqnr_db)


def test_a_build_that_passes_tries_nothing() -> None:
    assert pcn_deploy.compile(network(), options(precision="int8"), calibration=images()).advice == ()


def test_a_remainder_that_is_too_coarse_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The graph in FP16 answers otherwise than its simulation: a fake of the engine."""
    from pcn_deploy.proof import executions as proof
    from pcn_deploy.proof import judgement

    def spoiled(engine: Any, *rest: Any) -> Any:
        real = engine.outputs
        engine.outputs = lambda given: {"logits": real(given)["logits"][:, ::-1]}
        return judgement.verify_golden(engine, *rest)

    monkeypatch.setattr(proof, "verify_golden", spoiled)
    monkeypatch.setattr(proof, "EXECUTIONS", ())
    result = pcn_deploy.compile(network(), options(precision="int8"), calibration=images())
    assert not result
    (attempt,) = result.advice
    assert (attempt.words, attempt.passed) == ("--remainder fp32", True)
    assert "within the budget" in str(attempt)
