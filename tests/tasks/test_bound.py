"""The bound on the drop: does it hold as often as it says?"""

from __future__ import annotations

from math import exp, lgamma, log

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pcn_deploy.tasks.bound import PairedCounts, images_needed


def coverage(images: int, lost: float, gained: float) -> float:
    """Exact share of samples whose bound is not below the true drop, for true rates of lost and gained images."""
    covered = 0.0
    for b in range(images + 1):
        for c in range(images - b + 1):
            same = images - b - c
            chance = lgamma(images + 1) - lgamma(b + 1) - lgamma(c + 1) - lgamma(same + 1)
            chance += b * log(lost) + c * log(gained) + same * log(1 - lost - gained)
            if chance > -30 and PairedCounts(images, b, c).drop_bound >= 100 * (lost - gained):
                covered += exp(chance)
    return covered


@pytest.mark.parametrize(("lost", "gained"), [(0.01, 0.001), (0.03, 0.01), (0.02, 0.02), (0.05, 0.01), (0.1, 0.09)])
def test_it_holds_in_95_of_100_samples(lost: float, gained: float) -> None:
    assert coverage(100, lost, gained) > 0.945


def by_grid(images: int, lost: int, gained: int) -> float:
    """The same bound by brute force: every difference, every share of gained images, the likeliest one taken."""
    kept = -1.0
    for difference in np.arange(-0.999, 0.999, 0.001):
        share = np.linspace(max(0.0, -difference), (1 - difference) / 2, 4001)[1:-1]
        same = 1 - 2 * share - difference
        likelihood = lost * np.log(share + difference) + gained * np.log(share)
        likelihood += (images - lost - gained) * np.log(same)
        likeliest = share[np.argmax(likelihood)]
        variance = images * (2 * likeliest + difference - difference**2)
        if (lost - gained - images * difference) / np.sqrt(variance) >= -1.6449:
            kept = difference
    return float(100 * kept)


@pytest.mark.parametrize(("images", "lost", "gained"), [(50, 14, 1), (100, 0, 30), (80, 5, 3), (60, 1, 0)])
def test_it_is_that_of_a_search_over_a_grid(images: int, lost: int, gained: int) -> None:
    assert PairedCounts(images, lost, gained).drop_bound == pytest.approx(by_grid(images, lost, gained), abs=0.2)


def test_without_loss_or_gain_it_is_known_in_closed_form() -> None:
    assert PairedCounts(1000).drop_bound == pytest.approx(100 * 1.64485**2 / (1000 + 1.64485**2), rel=1e-4)


@given(st.integers(1, 5000), st.data())
def test_it_is_above_the_drop_and_grows_with_each_loss(images: int, data: st.DataObject) -> None:
    lost = data.draw(st.integers(0, images))
    gained = data.draw(st.integers(0, images - lost))
    counts = PairedCounts(images, lost, gained)
    assert counts.drop <= counts.drop_bound <= 100
    if lost + gained < images:
        assert PairedCounts(images, lost + 1, gained).drop_bound >= counts.drop_bound
        assert PairedCounts(images, lost, gained + 1).drop_bound <= counts.drop_bound


def test_counts_of_shards_add_up() -> None:
    assert PairedCounts(10, 2, 1) + PairedCounts(5, 0, 3) == PairedCounts(15, 2, 4)


@pytest.mark.parametrize(("lost", "gained"), [(0, 0), (3, 1), (2, 4)])
def test_the_number_of_images_asked_for_is_enough_and_not_too_many(lost: int, gained: int) -> None:
    seen = PairedCounts(1000, lost, gained)
    needed = images_needed(seen, 0.5)
    assert needed is not None
    assert needed > 100

    def bound(images: int) -> float:
        return PairedCounts(images, lost * images / 1000, gained * images / 1000).drop_bound  # type: ignore[arg-type]

    assert bound(needed) <= 0.5 < bound(needed - 1)


def test_no_number_of_images_proves_a_drop_above_the_budget() -> None:
    assert images_needed(PairedCounts(1000, 6, 1), 0.5) is None
    assert images_needed(PairedCounts(1000, 0, 0), 0.0) is None
