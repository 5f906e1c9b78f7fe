"""Plans as TOML: written, read back to the bit, and refused where they cannot be followed."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pcn_deploy.calibration.plan.recipe import parse_recipe, read_recipe, write_recipe
from pcn_deploy.calibration.plan.rules import RESIDUAL_ADD, LayerFacts, PlanEntry, PrecisionPlan, make_plan
from pcn_deploy.errors import OptionError

LAYERS = [
    LayerFacts(path="stem", kind="Conv2d", rows=196, in_channels=64, out_channels=64),
    LayerFacts(path="gelu", kind="GELU"),
    LayerFacts(path="narrow", kind="Conv2d", rows=196, in_channels=8, out_channels=64),
    LayerFacts(path="shared", kind="Linear", rows=196, in_channels=64, out_channels=64, uses=2),
    LayerFacts(path="add", kind=RESIDUAL_ADD, branch="stem", identity=("stem",)),
]
MODULES = ["", "block", *(layer.path for layer in LAYERS)]


def apply(text: str, precision: str = "int8") -> PrecisionPlan:
    recipe = parse_recipe(text)
    return recipe.apply(make_plan(LAYERS, precision), LAYERS, MODULES)


@given(
    st.lists(
        st.builds(
            PlanEntry,
            op=st.text(),
            kind=st.text(),
            precision=st.just("int8"),
            reason=st.text(),
            input_amax=st.floats(min_value=0, exclude_min=True, allow_infinity=False),
        ),
        unique_by=lambda entry: entry.op,
    )
)
def test_what_is_written_is_read_back_to_the_bit(entries: list[PlanEntry]) -> None:
    plan = PrecisionPlan(precision="int8", remainder="fp32", entries=tuple(entries))
    found = parse_recipe(write_recipe(plan))
    assert (found.precision, found.remainder, found.entries) == ("int8", "fp32", plan.entries)


def test_operations_and_types_are_read_back() -> None:
    entries = (
        PlanEntry(op="a", kind="GELU", precision="fp16", reason="r"),
        PlanEntry(op="", kind="Net", precision="fp32", reason="r", operations=True),
    )
    plan = PrecisionPlan(precision="fp16", remainder="fp16", entries=entries)
    assert parse_recipe(write_recipe(plan)).entries == entries
    assert (plan.types(), plan.types(operations=True)) == ({"a": "fp16"}, {"": "fp32"})


def test_layers_left_out_follow_the_rules() -> None:
    plan = apply('precision="int8"\n[layers.narrow]\nprecision="int8"\ninput_amax=3\n[layers.gelu]\nprecision="fp32"\n')
    found = {entry.op: (entry.precision, entry.input_amax) for entry in plan.entries}
    assert found == {
        "stem": ("int8", None),
        "gelu": ("fp32", None),
        "narrow": ("int8", 3.0),
        "shared": ("fp16", None),
        "add": ("int8", None),
    }
    ranged = plan.with_ranges({"stem": 1.0, "add": 2.0})
    assert [entry.input_amax for entry in ranged.entries] == [1.0, None, 3.0, None, 2.0]


def test_an_addition_leaves_int8_with_its_branch() -> None:
    plan = apply('precision="int8"\n[layers.stem]\nprecision="fp32"\n[layers.narrow]\nprecision="int8"\n')
    assert set(plan.quantized_entries) == {"narrow"}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('precision="int8"\nprecision="int8"\n', "line 2"),
        ("[layers]", "precision is missing; expected fp32 or fp16"),
        ('precision="int4"', "precision is 'int4'; expected fp32"),
        ('precision="int8"\nremainder="bf16"', "remainder is 'bf16'; expected fp16 or fp32"),
        ('precision="fp16"\nremainder="fp32"', "leave it out"),
        ('precision="fp16"\nlayer=1', "unknown key 'layer'"),
        ('precision="fp16"\nlayers=1', "layers is 1; expected a table"),
        ('precision="fp16"\n[layers]\nstem="fp32"', "expected a table"),
        ('precision="fp16"\n[layers.stem]\namax=1', "unknown key 'amax'"),
        ('precision="fp16"\n[layers.stem]\nreason="x"', "precision is missing"),
        ('precision="fp16"\n[layers.stem]\nprecision="int8"', "is 'int8'; expected fp16 or fp32"),
        ('precision="fp16"\n[layers.stem]\nprecision="bf16"', "is 'bf16'; expected fp16 or fp32"),
        ('precision="int8"\n[operations.block]\nprecision="int8"', "is 'int8'; expected fp16 or fp32"),
        ('precision="fp16"\n[layers.stem]\nprecision="fp16"\nkind=3', "kind and reason are texts"),
        ('precision="fp16"\n[layers.blocks.0]\nprecision="fp16"', "unknown key '0'.* goes in quotes"),
        ("precision=1" + "0" * 5000, "not valid TOML"),
        ("x=" + "[" * 3000, "not valid TOML"),
    ],
)
def test_what_cannot_be_read_is_named(text: str, words: str) -> None:
    with pytest.raises(OptionError, match=words):
        parse_recipe(text)


@pytest.mark.parametrize("amax", ["0", "0.0", "-1.5", "nan", "inf", "-inf", "true", '"1"', "1" + "0" * 400])
def test_a_range_is_a_finite_number_above_zero(amax: str) -> None:
    text = f'precision="int8"\n[layers.stem]\nprecision="int8"\ninput_amax={amax}'
    words = r'\[layers\."stem"\]: input_amax is .*expected a finite number above 0'
    with pytest.raises(OptionError, match=words):
        parse_recipe(text)


def test_a_range_belongs_to_int8() -> None:
    with pytest.raises(OptionError, match="only where precision is int8"):
        parse_recipe('precision="int8"\n[layers.stem]\nprecision="fp16"\ninput_amax=1.0')


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ('[layers.sten]\nprecision="fp32"', r'\[layers\."sten"\].*Did you mean stem'),
        ('[layers."features.7.conv"]\nprecision="fp32"', "another network"),
        ('[operations.nowhere]\nprecision="fp32"', r"\[operations\..*nowhere"),
        ('[layers.stem]\nkind="Linear"\nprecision="fp16"', "is a Linear there and a Conv2d in this network"),
        ('[layers.gelu]\nprecision="int8"', "cannot be int8: not a Conv2d or Linear.*Expected fp16 or fp32"),
        ('[layers.shared]\nprecision="int8"', "cannot be int8: called more than once"),
        ('[layers.stem]\nprecision="fp16"\n[layers.add]\nprecision="int8"', "together with its branch, 'stem'"),
    ],
)
def test_what_does_not_fit_the_network_is_named(table: str, words: str) -> None:
    with pytest.raises(OptionError, match=words):
        apply(f'precision="int8"\n{table}')


def test_a_file_that_is_missing_or_no_text(tmp_path: Any) -> None:
    with pytest.raises(OptionError, match=r"inspect FILE\.pcn --recipe"):
        read_recipe(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(OptionError, match=r"bad\.toml cannot be read"):
        read_recipe(tmp_path / "bad.toml")


def test_the_smallest_and_largest_ranges_survive() -> None:
    for amax in (5e-324, math.nextafter(1.0, 2.0), 1.7976931348623157e308):
        entry = PlanEntry(op="a", kind="Conv2d", precision="int8", reason="", input_amax=amax)
        plan = PrecisionPlan(precision="int8", remainder="fp16", entries=(entry,))
        assert parse_recipe(write_recipe(plan)).entries == (entry,)
