"""The arithmetic of parity: cosine, SQNR, what has to be taken off before. numpy only; defined in docs/parity.md."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pcn_deploy.aliases import Logits

Doubles = npt.NDArray[np.float64]

SQNR_CEILING_DB = 200.0
"""Reported where both sides are equal to the bit; float32 cannot tell smaller errors from none."""

NO_CLASS = -1
"""The answer of a row that holds NaN or infinity: no class is the largest."""

NOTHING = 1e-14
"""Share of the power of the logits below which the images change nothing: less than the last bit of float32."""

_FAR = 100.0
"""A class is no candidate if it stays so many times further below the answer than any class moves between images, and
than the candidates are large."""


def live_classes(logits: Logits) -> npt.NDArray[np.bool_]:
    """The classes that are candidates for an answer, `(K,)`: those that a network masks, as with -1e9, are not.

    A mask is as large as no error is: beside it none would be seen.

    Args:
        logits: Of several images, `(N, K)`, finite.
    """
    rows = logits.astype(np.float64)
    moves = float(rows.std(0).max(initial=0.0))
    if len(rows) < 2 or moves == 0:
        return np.ones(rows.shape[1], np.bool_)
    below = rows.max(1).min() - rows.max(0)
    scale = max(moves, float(np.abs(rows[:, below <= _FAR * moves]).max(initial=0.0)))
    live: npt.NDArray[np.bool_] = below <= _FAR * scale
    return live


@dataclass(frozen=True)
class Answered:
    """Answers to N images, and how sure they are.

    Attributes:
        classes: The classes, `(N,)`; `NO_CLASS` where logits are not finite.
        margins: By how much the logit of each is above the next one, `(N,)`; NaN without an answer or a next one.
    """

    classes: npt.NDArray[np.int64]
    margins: npt.NDArray[np.float64]

    @classmethod
    def of(cls, logits: Logits) -> Answered:
        """Those of logits `(N, K)`."""
        if logits.shape[1] < 2:
            return cls(answers(logits), np.full(len(logits), np.nan))
        finite = np.asarray(np.isfinite(logits).all(1))
        below, largest = np.partition(np.where(finite[:, None], logits.astype(np.float64), 0.0), -2, axis=1).T[-2:]
        return cls(answers(logits), np.where(finite, largest - below, np.nan))

    @classmethod
    def joined(cls, parts: Sequence[Answered]) -> Answered:
        """Those of several batches, one after the other."""
        return cls(np.concatenate([one.classes for one in parts]), np.concatenate([one.margins for one in parts]))


def answers(logits: Logits) -> npt.NDArray[np.int64]:
    """The class of the largest logit of each row, `(N,)`; `NO_CLASS` where the row is not finite.

    Args:
        logits: `(N, K)`.
    """
    return np.where(np.isfinite(logits).all(1), logits.argmax(1), NO_CLASS).astype(np.int64)


def cosine(reference: Doubles, engine: Doubles) -> Doubles:
    """Cosine per row of `(N, K)`; 1 where both rows are zero, -1 where the engine's is not finite."""
    finite = np.asarray(np.isfinite(engine).all(1))
    out = np.where(finite[:, None], engine, 0.0)
    norms = np.linalg.norm(reference, axis=1) * np.linalg.norm(out, axis=1)
    both_zero = (np.abs(reference).max(1, initial=0) == 0) & (np.abs(out).max(1, initial=0) == 0)
    cosines = np.where(both_zero, 1.0, (reference * out).sum(1) / np.where(norms > 0, norms, 1.0))
    worst: Doubles = np.where(finite, cosines, -1.0)
    return worst


def centred(rows: Doubles) -> Doubles:
    """Rows less their means; a single logit has no others to differ from, and stays."""
    centred_rows: Doubles = rows - rows.mean(1, keepdims=True) if rows.shape[1] > 1 else rows
    return centred_rows


def sqnr_db(signal: float, noise: float) -> float:
    """Signal to quantisation noise ratio from both powers, in dB, within the ceiling."""
    if noise == 0:
        return SQNR_CEILING_DB
    if signal == 0 or math.isinf(noise):
        return -SQNR_CEILING_DB
    return min(SQNR_CEILING_DB, 10 * math.log10(signal / noise))


def alike(images: Logits, least_db: float) -> bool:
    """Whether images `(N, ...)` hardly differ: the power of their changes is below a share of theirs, in dB."""
    rows = images.reshape(len(images), -1).astype(np.float64)
    power = float(np.square(rows).sum())
    changes = power_of_changes(power, float(np.square(rows.sum(0)).sum()), len(rows))
    return changes is None or sqnr_db(changes, power) < least_db


def as_json(value: float) -> float:
    """JSON has no infinity: the largest double stands for it."""
    return min(value, float(np.finfo(np.float64).max))


def power_of_changes(power: float, squared_sums: float, images: int) -> float | None:
    """Power of what differs between images: of each logit less its mean over all images.

    Args:
        power: Sum of the squares of all logits.
        squared_sums: Sum over the classes of the square of the sum of their logits.
        images: Number of images; the mean of few images takes a share of 1 / images of the changes off with it, which
            is given back.

    Returns:
        The power; None where the images change nothing, or there is only one.
    """
    changes = power - squared_sums / images
    return changes * images / (images - 1) if images > 1 and changes > NOTHING * power else None
