from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pcn_deploy.errors import OptionError
from pcn_deploy.specs import BatchRange, EngineSpec, TensorSpec


@given(st.integers(1, 99), st.integers(0, 99), st.integers(0, 99))
def test_a_range_reads_what_it_prints(low: int, more: int, most: int) -> None:
    batch = BatchRange(min=low, opt=low + more, max=low + more + most)
    assert BatchRange.parse(str(batch)) == batch
    assert batch.is_dynamic == (more + most > 0)


def test_one_number_is_a_fixed_batch() -> None:
    assert BatchRange.parse("8") == BatchRange(min=8, opt=8, max=8)
    assert not BatchRange.parse("8").is_dynamic


@pytest.mark.parametrize("text", ["", "a", "1:2", "1:2:3:4", "-1:1:1", "1.5", "1:x:3", " 1", "1::3"])
def test_text_that_is_no_range(text: str) -> None:
    with pytest.raises(OptionError, match=r"was not understood\. Give MIN:OPT:MAX, such as 1:8:16"):
        BatchRange.parse(text)


@pytest.mark.parametrize(("low", "opt", "high"), [(0, 1, 1), (2, 1, 4), (1, 5, 4), (4, 4, 1), (-1, 1, 1)])
def test_ranges_out_of_order(low: int, opt: int, high: int) -> None:
    with pytest.raises(OptionError, match=f"{low}:{opt}:{high} is not ordered"):
        BatchRange(min=low, opt=opt, max=high)


def test_the_batch_axis_alone_is_replaced() -> None:
    assert TensorSpec(name="x", dtype="float32", shape=("batch", 3, 8, 4)).with_batch(5) == (5, 3, 8, 4)
    assert TensorSpec(name="x", dtype="float32", shape=(2, 3, 8, 4)).with_batch(5) == (2, 3, 8, 4)


def test_an_interface_survives_json() -> None:
    spec = EngineSpec(
        inputs=(TensorSpec(name="images", dtype="float32", shape=("batch", 3, 8, 8)),),
        outputs=(
            TensorSpec(name="logits", dtype="float32", shape=("batch", 10)),
            TensorSpec(name="attention", dtype="float16", shape=("batch", 1, 64)),
        ),
        batch=BatchRange(min=1, opt=2, max=3),
    )
    assert EngineSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec
