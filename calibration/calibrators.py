"""From the distribution of a tensor to its range: the amax that the largest INT8 code stands for. numpy only."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Protocol

import numpy as np
import numpy.typing as npt

from pcn_deploy.errors import OptionError

LEVELS = 128
"""Magnitudes a symmetric signed 8-bit code can take, zero included."""

PERCENTILE = 99.99
"""Default share of magnitudes, in percent, inside the range of the percentile calibrator."""

WEIGHT_CALIBRATORS = ("max", "mse")
"""How the range of each output channel of a weight is found; see `calibration/weights.py`."""

_CANDIDATE_STEP = 8

Floats = npt.NDArray[np.float64]


class Histogram(Protocol):
    """Largest magnitude, counts of magnitudes in equal bins, and the width of a bin."""

    @property
    def amax(self) -> float:
        """Largest magnitude."""

    @property
    def counts(self) -> npt.NDArray[np.int64]:
        """Magnitudes per bin, `(BINS,)`."""

    @property
    def width(self) -> float:
        """Width of a bin."""


def calibrate_max(histogram: Histogram) -> float:
    """The largest magnitude: nothing is clipped."""
    return histogram.amax


def calibrate_percentile(histogram: Histogram, percentile: float = PERCENTILE) -> float:
    """The magnitude below which `percentile` percent of all values lie."""
    cumulative = np.cumsum(histogram.counts)
    last = int(np.searchsorted(cumulative, cumulative[-1] * percentile / 100))
    return min((last + 1) * histogram.width, histogram.amax)


def calibrate_mse(histogram: Histogram) -> float:
    """The range with the least mean squared error of clipping and rounding together."""
    centres = (np.arange(len(histogram.counts)) + 0.5) * histogram.width
    used = histogram.counts > 0
    counts, centres = histogram.counts[used].astype(np.float64), centres[used]
    candidates = _candidates(histogram, step=4 * _CANDIDATE_STEP) * histogram.width
    # what clipping costs, sum of count * (centre - limit)^2, needs only sums over the bins beyond
    inside = np.searchsorted(centres, candidates)
    beyond = [np.append(np.cumsum((counts * centres**power)[::-1])[::-1], 0.0)[inside] for power in range(3)]
    clipping = beyond[2] - 2 * candidates * beyond[1] + candidates**2 * beyond[0]
    rounding = [
        float(counts[:end] @ (np.rint(centres[:end] * (127 / limit)) * (limit / 127) - centres[:end]) ** 2)
        for limit, end in zip(candidates, inside, strict=True)
    ]
    return float(min(candidates[int(np.argmin(clipping + rounding))], histogram.amax))


def calibrate_entropy(histogram: Histogram) -> float:
    """The range whose quantised distribution loses the least information about the clipped one.

    For each candidate, P is the histogram up to it with everything above added to its last bin, and Q spreads the
    count of each of the `LEVELS` levels evenly over the non-empty bins of that level; the candidate of least
    Kullback-Leibler divergence KL(P || Q) wins. The divergence of a level needs only three sums over its bins, so
    cumulative sums give all candidates at once. The first bin takes the count of the second: zero is exact in any
    range and must not decide it.

    Source: Migacz, "8-bit Inference with TensorRT", GTC 2017, slides 25 to 27; treatment of the first bin as in
    NVIDIA's pytorch-quantization.
    """
    counts = histogram.counts.astype(np.float64)
    counts[0] = counts[1]
    candidates = _candidates(histogram)
    total = counts.sum()
    if total == 0:
        return histogram.amax
    divergences = _divergences(counts, candidates, total)
    return float(min(candidates[int(np.argmin(divergences))] * histogram.width, histogram.amax))


def _candidates(histogram: Histogram, step: int = _CANDIDATE_STEP) -> npt.NDArray[np.int64]:
    """Numbers of bins a range may span: from one bin per level up to the largest magnitude."""
    used = min(int(histogram.amax / histogram.width) + 1, len(histogram.counts))
    if used <= LEVELS:
        return np.array([used])
    return np.unique(np.append(np.arange(LEVELS, used, step), used))


def _cumulative(values: Floats) -> Floats:
    return np.concatenate(([0.0], np.cumsum(values)))


def _xlogy(x: Floats, y: Floats) -> Floats:
    """Return x log y, 0 where x is 0."""
    return x * np.log(np.where(x > 0, y, 1.0))


def _divergences(counts: Floats, candidates: npt.NDArray[np.int64], total: float) -> Floats:
    """KL(P || Q) of every candidate, `(K,)`; infinite where Q is 0 and P is not."""
    inside = _cumulative(counts)[candidates]
    inside = np.maximum(inside, 1.0)
    last = counts[candidates - 1]
    clipped = last + total - _cumulative(counts)[candidates]
    # sum over bins of p log p, the last bin holding all that is clipped
    entropy = _cumulative(_xlogy(counts, counts))[candidates] - _xlogy(last, last) + _xlogy(clipped, clipped)
    # sum over levels of (counts of the level) log(counts / non-empty bins), the clipped part on the last level
    edges = (candidates[:, None] * np.arange(LEVELS + 1)[None, :]) // LEVELS
    level = np.diff(_cumulative(counts)[edges], axis=1)
    occupied = np.maximum(np.diff(_cumulative((counts > 0).astype(np.float64))[edges], axis=1), 1.0)
    spread = level / occupied
    cross = _xlogy(level, spread).sum(1) + (clipped - last) * np.log(np.maximum(spread[:, -1], 1e-300))
    divergence = (entropy - cross) / total - np.log(total) + np.log(inside)
    return np.where((clipped > 0) & (last == 0), np.inf, divergence)


_CALIBRATORS: dict[str, Callable[[Histogram], float]] = {
    "max": calibrate_max,
    "percentile": calibrate_percentile,
    "entropy": calibrate_entropy,
    "mse": calibrate_mse,
}
CALIBRATORS = tuple(_CALIBRATORS)
_OF_PRECISION = {"int8": ("mse", "max", "percentile", "entropy"), "fp8": ("max", "percentile")}
AUTO = "auto"
"""Asks for the one of `CALIBRATORS` that costs the network least, see `calibration.auto`."""


def calibrators_of(precision: str) -> tuple[str, ...]:
    """The calibrators of an 8-bit precision, its default first; those of E4M3 ask nothing of the codes."""
    return _OF_PRECISION.get(precision, CALIBRATORS)


def get_calibrator(name: str, percentile: float = PERCENTILE) -> Callable[[Histogram], float]:
    """Return the calibrator of that name.

    Args:
        name: One of `CALIBRATORS`.
        percentile: For the percentile calibrator, in percent, above 50 and at most 100.

    Raises:
        OptionError: If there is none of that name (the known ones are listed), or the percentile is out of range.
    """
    if name not in _CALIBRATORS:
        msg = f"Unknown calibrator {name!r}. Known: {', '.join(CALIBRATORS)}."
        raise OptionError(msg)
    if not 50 < percentile <= 100:
        msg = f"Percentile {percentile}: expected the share of magnitudes inside the range, above 50 and at most 100."
        raise OptionError(msg)
    if name == "percentile":
        return partial(calibrate_percentile, percentile=percentile)
    return _CALIBRATORS[name]


def check_weight_calibrator(name: str) -> None:
    """Check the name.

    Raises:
        OptionError: If it is not one of `WEIGHT_CALIBRATORS`.
    """
    if name not in WEIGHT_CALIBRATORS:
        msg = f"Unknown weight calibrator {name!r}. Known: {', '.join(WEIGHT_CALIBRATORS)}."
        raise OptionError(msg)
