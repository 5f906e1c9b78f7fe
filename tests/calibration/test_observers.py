"""Streaming statistics: exact whatever the grouping and the order."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pcn_deploy.calibration.observers import AmaxObserver, HistogramObserver
from pcn_deploy.calibration.statistics import BINS, Statistics, bin_width
from pcn_deploy.errors import DataError

VALUES = st.lists(
    st.one_of(
        st.floats(width=32, allow_nan=False, allow_infinity=False),
        st.floats(-4, 4, width=32),
        st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5, 2.0**-149, 2.0**-126, 3.4e38]),
    ),
    min_size=1,
    max_size=40,
)


def observed(*batches: object) -> Statistics:
    observer = HistogramObserver("layer")
    for batch in batches:
        observer.observe(batch if isinstance(batch, torch.Tensor) else torch.tensor(batch, dtype=torch.float32))
    return observer.statistics()


def assert_identical(one: Statistics, other: Statistics) -> None:
    assert (one.amax, one.width) == (other.amax, other.width)
    np.testing.assert_array_equal(one.counts, other.counts)


def literal(values: list[float], width: float) -> npt.NDArray[np.int64]:
    counts = np.zeros(BINS, np.int64)
    for value in np.array(values, np.float32).tolist():
        counts[int(abs(value) / width)] += 1
    return counts


@settings(max_examples=150, deadline=None)
@given(values=VALUES, data=st.data())
def test_statistics_do_not_depend_on_grouping_or_order(values: list[float], data: st.DataObject) -> None:
    whole = observed(values)
    shuffled = data.draw(st.permutations(values))
    cuts = sorted(data.draw(st.sets(st.integers(1, len(values)), max_size=4)) | {0, len(values)})
    pieces = [shuffled[start:stop] for start, stop in pairwise(cuts)]
    assert_identical(observed(*pieces), whole)
    amax = float(np.abs(np.array(values, np.float32)).max())
    assert whole.amax == amax
    assert whole.counts.sum() == len(values)
    if amax > 0:
        assert math.frexp(whole.width)[0] == 0.5, "a power of two"
        assert amax < whole.width * BINS
        np.testing.assert_array_equal(whole.counts, literal(values, whole.width))


@settings(max_examples=150, deadline=None)
@given(parts=st.lists(st.one_of(VALUES, st.just([0.0])), min_size=2, max_size=4))
def test_widened_counts_add_up_to_those_of_one_observer(parts: list[list[float]]) -> None:
    each = [observed(part) for part in parts]
    amax = max(one.amax for one in each)
    widened = [one.widened(amax) for one in each]
    assert {one.width for one in widened} == {bin_width(amax)}
    total = Statistics(amax, np.sum([one.counts for one in widened], axis=0), widened[0].width)
    assert total == observed([value for part in parts for value in part])


def test_statistics_are_equal_where_every_count_is() -> None:
    one = observed([1.0, 2.0])
    assert one == observed([2.0, 1.0])
    assert one != observed([2.0, 1.5])
    assert one != observed([2.0, 1.0, 0.0])
    assert one != "statistics"


@pytest.mark.parametrize("amax", [1.0, 0.99, 7.3, 1e-3, 1e30])
def test_at_least_half_of_the_bins_are_in_use(amax: float) -> None:
    statistics = observed([amax / 64], [amax, -amax / 3])
    used = int(np.flatnonzero(statistics.counts)[-1]) + 1
    assert BINS / 2 < used <= BINS


def test_zeros_alone_have_no_range() -> None:
    statistics = observed([0.0, -0.0], [0.0])
    assert (statistics.amax, statistics.width) == (0, 0)
    assert statistics.counts.sum() == statistics.counts[0] == 3


def test_zeros_before_and_after_values_are_counted() -> None:
    before, after = observed([0.0] * 5, [1.0, -2.0], [0.0] * 3), observed([1.0, -2.0, *[0.0] * 8])
    assert_identical(before, after)
    assert before.counts[0] == 8
    assert before.counts.sum() == 10


@pytest.mark.parametrize("kind", [AmaxObserver, HistogramObserver])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_a_number_is_an_error_that_names_the_layer(kind: type[AmaxObserver], value: float) -> None:
    observer = kind("blocks.7.attn")
    observer.observe(torch.ones(3))
    with pytest.raises(DataError, match=r"input of blocks\.7\.attn holds NaN or infinite"):
        observer.observe(torch.tensor([[1.0, value]]))


def test_memory_layout_does_not_matter() -> None:
    x = torch.from_numpy(np.random.default_rng(0).standard_normal((2, 5, 7, 3)).astype(np.float32))
    layouts = (
        x.contiguous(memory_format=torch.channels_last),
        x.transpose(1, 2),
        torch.cat((x, x), 1)[:, :5],
        x.reshape(2, 15, 7),
    )
    for layout in layouts:
        assert_identical(observed(layout), observed(x))
    assert observed(x[:, :1].contiguous(memory_format=torch.channels_last)).counts.sum() == 42


def test_every_element_of_a_large_tensor_is_counted_once() -> None:
    x = np.random.default_rng(0).standard_normal((3, 100_001)).astype(np.float32)
    statistics = observed(torch.from_numpy(x))
    expected = np.bincount((np.abs(x.ravel()).astype(np.float64) / statistics.width).astype(np.int64), minlength=BINS)
    np.testing.assert_array_equal(statistics.counts, expected)


def test_the_given_tensor_is_not_changed() -> None:
    x = torch.linspace(-3, 3, 50)
    observed(x, x)
    assert torch.equal(x, torch.linspace(-3, 3, 50))


def test_amax_observer_keeps_the_largest_magnitude_of_either_sign() -> None:
    observer = AmaxObserver("layer")
    for batch, amax in ([[1.0, -2.0]], 2.0), ([[3.0, 0.5]], 3.0), ([[-2.5]], 3.0):
        observer.observe(torch.tensor(batch))
        assert observer.statistics().amax == amax
    assert observer.statistics().counts.size == 0
