"""Builds whose plan is given, and builds whose plan keeps FP16 within its range."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from small_builds import images, network, options

import pcn_deploy
from pcn_deploy import CompileResult
from pcn_deploy.calibration.plan.recipe import Recipe, parse_recipe, write_recipe
from pcn_deploy.errors import DataError, ModelError, OptionError

torch = pytest.importorskip("torch")


def overflowing() -> Any:
    model = network()
    model.blocks[1].gamma_1.data.fill_(3e5)
    return model


@pytest.fixture(scope="module")
def int8() -> CompileResult:
    return pcn_deploy.compile(overflowing(), options(precision="int8"), calibration=images())


def recipe_of(result: CompileResult) -> Recipe:
    return parse_recipe(write_recipe(result.plan))


def test_fp16_keeps_what_would_overflow_in_fp32(int8: CompileResult) -> None:
    for result in (pcn_deploy.compile(overflowing(), options(precision="fp16")), int8):
        assert result
        kept = {(entry.op, entry.operations) for entry in result.plan.entries if entry.precision == "fp32"}
        assert {("blocks.1", True), ("blocks.1.attn.qkv_pos.5", False), ("blocks_token_only.0.norm1", False)} == kept


def test_a_plan_given_back_builds_the_same_graph_without_images(int8: CompileResult) -> None:
    again = pcn_deploy.compile(overflowing(), options(precision="int8", recipe=recipe_of(int8)))
    members = [result.bundle.manifest.members["model.onnx"].sha256 for result in (int8, again)]
    assert members[0] == members[1]
    assert again.plan == int8.plan
    assert again.bundle.manifest.calibration is None


def test_only_missing_ranges_are_calibrated(int8: CompileResult) -> None:
    recipe = recipe_of(int8)
    first = next(entry for entry in recipe.entries if entry.precision == "int8")
    entries = tuple(replace(x, input_amax=None) if x == first else x for x in recipe.entries)
    partial = options(precision="int8", recipe=replace(recipe, entries=entries))
    again = pcn_deploy.compile(overflowing(), partial, calibration=images())
    assert again.plan == int8.plan
    assert set(again.bundle.read_json("calibration.json")["ranges"]) == {first.op}
    with pytest.raises(DataError, match=rf"no range for 1 quantised layers, such as {first.op}.*calibration images"):
        pcn_deploy.compile(overflowing(), partial)


def test_a_recipe_of_another_precision_is_refused(int8: CompileResult) -> None:
    with pytest.raises(OptionError, match="is for int8 with remainder fp16; asked for is fp16"):
        options(precision="fp16", recipe=recipe_of(int8))


def test_a_recipe_without_int8_is_not_called_int8(int8: CompileResult) -> None:
    entries = tuple(replace(x, precision="fp16", input_amax=None) for x in recipe_of(int8).entries)
    with pytest.raises(ModelError, match="no layer in INT8"):
        pcn_deploy.compile(network(), options(precision="int8", recipe=replace(recipe_of(int8), entries=entries)))
