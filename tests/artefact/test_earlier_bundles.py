"""Bundles of earlier versions still open: kept as they were written, by 0.1.0 of 2026-11-26."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import invoke

import pcn_deploy
from pcn_deploy.engines.onnxruntime import truncates_half

pytest.importorskip("onnxruntime")

FIXTURES = Path(__file__).parents[1] / "fixtures"


@pytest.fixture(params=["schema1_fp32_map", "schema1_int8_budget"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return Path(shutil.copy(FIXTURES / f"{request.param}.pcn", tmp_path))


def inspected(path: Path) -> dict[str, Any]:
    result = invoke("inspect", path, "--json")
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def expected_exit(path: Path) -> int:
    """Before 1.30, ONNX Runtime cuts off the INT8 codes of FP16, which it did not where these were built: no parity."""
    return 3 if "int8" in path.name and truncates_half() else 0


def test_they_are_proven_again(path: Path) -> None:
    result = invoke("verify", path, "--target", "cpu", "--json")
    assert result.exit_code == expected_exit(path), result.output
    assert json.loads(result.stdout)["passed"] is (result.exit_code == 0)


def test_they_answer(path: Path) -> None:
    images = np.random.default_rng(0).standard_normal((5, 3, 16, 16), dtype=np.float32)
    with pcn_deploy.load(path, "cpu") as engine:
        outputs = engine.outputs(images)
    assert outputs["logits"].shape == (5, 3)
    assert ("attention_map" in outputs) == ("map" in path.name)


def test_they_take_another_engine(path: Path) -> None:
    result = invoke("engine", path, "--target", "cpu", "-o", path.with_name("again.pcn"))
    assert result.exit_code == expected_exit(path), result.output


def test_what_they_hold_is_shown() -> None:
    found = inspected(FIXTURES / "schema1_int8_budget.pcn")
    (proof,) = found["budget"]["proofs"]
    assert (found["golden"], found["judged"]["edge_images"], found["choice"]) == ("fix.npz", 7, None)
    assert found["rewrites"]["separate_additions"] == 1
    assert (proof["verdict"], proof["counts"]["images"]) == ("proven", 96)
    assert "bias-correction was tried" in found["notes"][0]
    shown = invoke("inspect", FIXTURES / "schema1_int8_budget.pcn").output
    for text in ("8 images and 7 edge images, from fix.npz", "separate_additions 1", "2.74", "Note: recovery"):
        assert text in shown, text
