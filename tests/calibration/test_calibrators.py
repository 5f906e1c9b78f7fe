"""From a histogram to a range, against slow literal re-implementations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pcn_deploy.calibration.calibrators import CALIBRATORS, PERCENTILE, _divergences, get_calibrator
from pcn_deploy.calibration.observers import HistogramObserver
from pcn_deploy.calibration.statistics import Statistics
from pcn_deploy.errors import OptionError

Floats = npt.NDArray[np.float64]


def histogram_of(values: npt.NDArray[np.float32]) -> Statistics:
    observer = HistogramObserver("layer")
    observer.observe(torch.from_numpy(values))
    return observer.statistics()


def samples(kind: str, seed: int, size: int = 3000) -> npt.NDArray[np.float32]:
    rng = np.random.default_rng(seed)
    kinds: dict[str, Callable[[], npt.NDArray[Any]]] = {
        "normal": lambda: rng.standard_normal(size),
        "laplace": lambda: rng.laplace(size=size),
        "student": lambda: rng.standard_t(2, size),
        "relu": lambda: np.maximum(rng.standard_normal(size), 0),
        "uniform": lambda: rng.uniform(-3, 3, size),
        "outlier": lambda: np.append(rng.standard_normal(size), 40.0),
        "few": lambda: rng.standard_normal(4),
        "gap": lambda: np.concatenate((rng.normal(0, 0.1, size), rng.normal(9, 0.01, size // 50))),
    }
    return kinds[kind]().astype(np.float32)


KINDS = ("normal", "laplace", "student", "relu", "uniform", "outlier", "few", "gap")


def candidates(seen: Statistics) -> list[int]:
    used = int(seen.amax / seen.width) + 1
    return [*range(128, used, 8), used]


def divergence(counts: Floats, bins: int) -> float:
    """KL(P || Q) of a range of so many bins, with P and Q written out."""
    p = counts[:bins].copy()
    p[-1] += counts[bins:].sum()
    q = np.zeros(bins)
    for level in range(128):
        start, stop = bins * level // 128, bins * (level + 1) // 128
        filled = [index for index in range(start, stop) if counts[index] > 0]
        for index in filled:
            q[index] = counts[start:stop].sum() / len(filled)
    p, q = p / p.sum(), q / max(q.sum(), 1)
    if any(p[index] > 0 and q[index] == 0 for index in range(bins)):
        return float("inf")
    return float(sum(p[index] * np.log(p[index] / q[index]) for index in range(bins) if p[index] > 0))


@pytest.mark.parametrize("kind", KINDS)
def test_entropy_equals_its_literal_definition(kind: str) -> None:
    seen = histogram_of(samples(kind, 1))
    counts = seen.counts.astype(np.float64)
    counts[0] = counts[1]
    tried = candidates(seen)[::6]  # a sixth of them: the literal form is slow
    found = get_calibrator("entropy")(seen)
    bins = next(n for n in candidates(seen) if min(n * seen.width, seen.amax) == found)
    best = min(divergence(counts, n) for n in tried)
    assert divergence(counts, bins) <= best + 1e-9


@pytest.mark.parametrize("kind", KINDS)
def test_every_divergence_equals_its_literal_definition(kind: str) -> None:
    seen = histogram_of(samples(kind, 7, 1000))
    counts = seen.counts.astype(np.float64)
    counts[0] = counts[1]
    tried = candidates(seen)[::20]
    found = _divergences(counts, np.array(tried), float(counts.sum()))
    np.testing.assert_allclose(found, [divergence(counts, n) for n in tried], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("kind", ["normal", "outlier", "few"])
def test_entropy_takes_the_very_candidate_of_the_literal_definition(kind: str) -> None:
    seen = histogram_of(samples(kind, 2, 500))
    counts = seen.counts.astype(np.float64)
    counts[0] = counts[1]
    tried = candidates(seen)
    losses = [divergence(counts, n) for n in tried]
    expected = tried[int(np.argmin(losses))]
    assert get_calibrator("entropy")(seen) == min(expected * seen.width, seen.amax)


def test_entropy_clips_a_lone_outlier_and_keeps_a_uniform_range() -> None:
    assert get_calibrator("entropy")(histogram_of(samples("outlier", 3, 50_000))) < 10
    uniform = histogram_of(samples("uniform", 3, 200_000))
    assert get_calibrator("entropy")(uniform) > 0.95 * uniform.amax


def test_entropy_ignores_the_number_of_zeros() -> None:
    values = samples("laplace", 4)
    seen, with_zeros = (histogram_of(np.append(values, np.zeros(n, np.float32))) for n in (0, 100_000))
    assert get_calibrator("entropy")(seen) == get_calibrator("entropy")(with_zeros)


def mean_squared_error(values: npt.NDArray[np.float32], limit: float) -> float:
    scale = limit / 127
    return float(((np.clip(np.rint(values / scale), -127, 127) * scale - values) ** 2).mean())


@pytest.mark.parametrize("kind", ["normal", "laplace", "student", "outlier"])
def test_mse_beats_max_and_every_other_range(kind: str) -> None:
    values = samples(kind, 5, 20_000)
    seen = histogram_of(values)
    limit = get_calibrator("mse")(seen)
    best = mean_squared_error(values, limit)
    assert best < mean_squared_error(values, seen.amax)
    others = [mean_squared_error(values, share * seen.amax) for share in np.linspace(0.05, 1, 60)]
    assert best <= min(others) * 1.03


def test_percentile_brackets_its_share() -> None:
    values = samples("student", 6, 100_000)
    seen = histogram_of(values)
    limit = get_calibrator("percentile")(seen)
    below = np.sort(np.abs(values))
    exact = float(below[int(np.ceil(len(below) * PERCENTILE / 100)) - 1])
    assert exact <= limit <= exact + seen.width
    assert limit < seen.amax / 2


@pytest.mark.parametrize("percentile", [50.1, 90.0, 99.9, 100.0])
def test_the_percentile_is_an_option(percentile: float) -> None:
    values = samples("student", 6, 10_000)
    seen = histogram_of(values)
    limit = get_calibrator("percentile", percentile)(seen)
    exact = float(np.sort(np.abs(values))[int(np.ceil(len(values) * percentile / 100)) - 1])
    assert exact <= limit <= exact + seen.width
    assert (limit == seen.amax) == (percentile == 100)


def test_a_percentile_changes_no_other_calibrator() -> None:
    seen = histogram_of(samples("laplace", 6))
    assert get_calibrator("entropy", 60.0)(seen) == get_calibrator("entropy")(seen)
    with pytest.raises(OptionError, match=r"Percentile 50: .*above 50 and at most 100"):
        get_calibrator("percentile", 50)


def test_max_is_the_largest_magnitude() -> None:
    assert get_calibrator("max")(Statistics(3.25, np.zeros(0, np.int64), 0.0)) == 3.25


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=30),
    zeros=st.integers(0, 1000),
)
def test_every_calibrator_gives_a_range_above_zero_and_within_amax(values: list[float], zeros: int) -> None:
    array = np.array([*values, *[0.0] * zeros], np.float32)
    amax = float(np.abs(array).max())
    assume(amax > 0)
    seen = histogram_of(array)
    before = seen.counts.copy()
    for name in CALIBRATORS:
        assert 0 < get_calibrator(name)(seen) <= amax
    np.testing.assert_array_equal(seen.counts, before)


def test_unknown_calibrator_is_an_error_that_lists_the_known() -> None:
    with pytest.raises(OptionError, match=r"'minmax'\. Known: max, percentile, entropy, mse"):
        get_calibrator("minmax")
