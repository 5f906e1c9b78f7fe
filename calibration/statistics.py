"""Histograms of magnitudes, whose bins depend on the largest magnitude alone. numpy only."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

BINS = 4096
"""Bins of a histogram of magnitudes; between half and all of them are in use, so thresholds resolve to 0.05 %."""

_NARROWEST = 2.0**-126
"""Narrowest bin: its reciprocal is still a float32."""


@dataclass(frozen=True, eq=False)
class Statistics:
    """What was seen of one tensor.

    Attributes:
        amax: Largest magnitude.
        counts: Magnitudes counted in bins of `width`, int64 `(BINS,)`; empty where only `amax` was observed.
        width: Width of a bin, a power of two, in the unit of the tensor.
    """

    amax: float
    counts: npt.NDArray[np.int64]
    width: float

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Statistics):
            return NotImplemented
        return (self.amax, self.width) == (other.amax, other.width) and np.array_equal(self.counts, other.counts)

    __hash__ = None  # type: ignore[assignment] # it holds an array

    def widened(self, amax: float) -> Statistics:
        """The same counts in the bins that a larger magnitude elsewhere asks for, to be added to counts from there.

        Args:
            amax: At least this one's.
        """
        width = bin_width(amax)
        if not self.counts.size or self.width == width:
            return Statistics(amax, self.counts, self.width)
        counts = np.zeros_like(self.counts)
        merged = min(int(width / self.width), BINS) if self.width else BINS  # zeros alone are all in the first bin
        counts[: BINS // merged] = self.counts.reshape(-1, merged).sum(1)
        return Statistics(amax, counts, width)


def bin_width(amax: float) -> float:
    """Width of a bin, by the largest magnitude alone: however it was reached, the bins are the same. 0 for 0."""
    return max(2.0 ** math.frexp(amax)[1] / BINS, _NARROWEST) if amax > 0 else 0.0
