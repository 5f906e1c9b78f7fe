"""How large can the true drop be? A one-sided 95 % bound from paired answers on the same images. Standard library only.

Each image is answered by the trained network and by the engine. Images that both get right, or both wrong, say nothing
about the drop; what counts are `lost` (right before, wrong now) and `gained` (wrong before, right now). The bound
inverts the score test of which McNemar's is the case of no drop.

Source: Tango, "Equivalence test and confidence interval for the difference in proportions for the paired-sample
design", Statistics in Medicine 17, 1998. Newcombe's interval (method 10, same volume) was tried: without any lost or
gained image among n it promises a drop below about 1 / n, where three unlucky images in n could not be ruled out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

DROPS = "top-1 drops by"
"""How a failure begins that speaks of the drop alone."""

CONFIDENCE = 0.95
_Z = NormalDist().inv_cdf(CONFIDENCE)
_HALVINGS = 60


@dataclass(frozen=True)
class PairedCounts:
    """Answers of two classifiers on the same images; counts add up over shards.

    Attributes:
        images: Number of images.
        lost: Images that the first answers correctly and the second does not.
        gained: Images that the second answers correctly and the first does not.
    """

    images: int = 0
    lost: int = 0
    gained: int = 0

    def __add__(self, other: PairedCounts) -> PairedCounts:
        return PairedCounts(self.images + other.images, self.lost + other.lost, self.gained + other.gained)

    @property
    def drop(self) -> float:
        """Observed drop of accuracy, in percentage points; negative for a gain."""
        return 100 * (self.lost - self.gained) / self.images

    @property
    def drop_bound(self) -> float:
        """The drop, in percentage points, that the true one exceeds with a probability of 5 % at most."""
        return self.drop_bound_at(_Z)

    def drop_bound_at(self, deviations: float) -> float:
        """The bound at another confidence, given in standard deviations: 1.645 are 95 %, 3.09 are 99.9 %."""
        return 100 * _upper(self.lost, self.gained, self.images, deviations)

    @property
    def drop_shown(self) -> float:
        """The drop, in percentage points, that the true one is below with a probability of 5 % at most.

        Half a lost image is taken off, the usual correction for continuity: without it a single lost image of ten
        would show a drop of a point.
        """
        return -100 * _upper(self.gained, max(self.lost - 0.5, 0.0), self.images)


def judge_drop(counts: PairedCounts, budget: float) -> str:
    """What answers to the same images tell of the drop of top-1.

    Args:
        counts: Images lost and gained.
        budget: Largest drop, in percentage points.

    Returns:
        `proven` within the budget or `broken`, each with 95 % confidence; else `open`: so many images cannot tell.
    """
    if counts.drop_bound <= budget:
        return "proven"
    return "broken" if counts.drop_shown > budget else "open"


def drop_failures(counts: PairedCounts, budget: float, *, to_prove: bool, total_images: int = 0) -> list[str]:
    """What speaks against a pass, in words.

    Args:
        counts: Images lost and gained.
        budget: Largest drop, in percentage points.
        to_prove: Whether the drop must be proven within the budget; else it must not be shown to break it.
        total_images: Images given in all, where some of them did not judge.
    """
    task = judge_drop(counts, budget)
    if task == "broken":
        shown = f"with {CONFIDENCE:.0%} confidence by more than {counts.drop_shown:.2f}"
        return [f"{DROPS} {counts.drop:.2f} points on {counts.images} images, {shown}: above {budget:.2f}"]
    if task == "open" and to_prove:
        needed = images_needed(counts, budget)
        needed = needed and math.ceil(needed * (total_images or counts.images) / counts.images)
        remedy = f"{needed} images would prove it at this rate" if needed else "more images will not help at this rate"
        return [
            f"{DROPS} {counts.drop:.2f} points on {counts.images} images, with {CONFIDENCE:.0%} confidence by "
            f"no more than {counts.drop_bound:.2f}, which is above {budget:.2f}; {remedy}"
        ]
    return []


def images_needed(counts: PairedCounts, budget: float) -> int | None:
    """Number of images that would prove a drop within `budget` percentage points, at the rates seen so far.

    Returns:
        The number; None if the drop seen is not below the budget, so that no number would do.
    """
    if budget <= 0 or counts.drop >= budget:
        return None
    lost, gained = counts.lost / counts.images, counts.gained / counts.images

    def proves(images: int) -> bool:
        return 100 * _upper(lost * images, gained * images, images) <= budget

    high = 1
    while not proves(high):
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if proves(middle) else (middle, high)
    return high


def _upper(lost: float, gained: float, images: float, deviations: float = _Z) -> float:
    """Largest difference in [-1, 1] that the score test does not reject on the upper side."""
    low, high = (lost - gained) / images, 1.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if _score(lost, gained, images, middle) >= -deviations:
            low = middle
        else:
            high = middle
    return high


def _score(lost: float, gained: float, images: float, difference: float) -> float:
    """Deviation of the counts from a true `difference`, in standard deviations estimated under that difference."""
    a = 2 * images
    b = difference * (a - lost + gained) - lost - gained
    c = -gained * difference * (1 - difference)
    share_gained = (math.sqrt(max(b * b - 4 * a * c, 0.0)) - b) / (2 * a)
    variance = images * (2 * share_gained + difference * (1 - difference))
    deviation = lost - gained - images * difference
    return deviation / math.sqrt(variance) if variance > 0 else math.copysign(math.inf, deviation or -1.0)
