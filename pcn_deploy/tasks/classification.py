"""The role `logits`: one number per class, the largest of which is the answer. numpy only.

SQNR of the differences = that of what each logit differs from the mean of its row by, on both sides: one number added
to all logits of an image changes no answer, and makes the errors of the others look small; what the images change is
measured in these differences. Top-1 agreement = share of images with the same largest logit; top-1 drop = accuracy of
the reference minus that of the engine, in percentage points.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pcn_deploy.aliases import Logits, Outputs
from pcn_deploy.errors import DataError
from pcn_deploy.exact import ExactSum, ExactVector
from pcn_deploy.specs import LOGITS
from pcn_deploy.tasks.bound import PairedCounts, drop_failures, judge_drop
from pcn_deploy.tasks.limits import ParityBudget, changes_limit
from pcn_deploy.tasks.metrics import Doubles, answers, centred, live_classes, power_of_changes, sqnr_db
from pcn_deploy.tasks.parity import Name, ParityMeter
from pcn_deploy.tasks.role import Column, Role

Live = npt.NDArray[np.bool_]

_TASK = {"proven": "proven", "broken": "BROKEN, not", "open": "neither proven nor broken"}
"""Words for what labels tell of a drop."""


SAME_ANSWERS = 75.0
"""Least share of answers, in percent, that must stay where rounding excuses an error as large as what images change: of
eight golden images one or two may be nearly a tie."""


@dataclass(frozen=True)
class ClassScore:
    """One of the most likely classes of an image: its index among the logits, its name, its softmax, 0 to 1."""

    index: int
    name: str
    probability: float


def most_likely(logits: Logits, count: int, names: Sequence[str] | None = None) -> list[ClassScore]:
    """The classes of the largest logits, best first; where two are equal, the first of them.

    Args:
        logits: Of one image, `(K,)`, finite.
        count: At most how many.
        names: Of all classes, in order; by default their indices.

    Raises:
        DataError: If the names are not as many as the classes.
    """
    if names and len(names) != len(logits):
        msg = f"{len(names)} class names were given; the network has {len(logits)} classes."
        raise DataError(msg)
    values = logits.astype(np.float64)
    weights = np.exp(values - values.max())
    shares, best = weights / weights.sum(), np.argsort(-values, kind="stable")[:count]
    return [ClassScore(int(at), names[at] if names else str(at), float(shares[at])) for at in best]


class LogitsMeter(ParityMeter):
    """Compares logits `(N, K)`, and counts answers.

    Args:
        output: Name of the output.
        live: Which of the K logits are compared, `(K,)`, as `metrics.live_classes` tells; by default all. The others
            only count where one of them is the engine's answer.
    """

    shape = "(N, K)"
    measures_changes = True

    def __init__(self, output: str = LOGITS, live: Live | None = None) -> None:
        super().__init__(output)
        self._live = live
        self._sums |= {name: ExactSum() for name in ("centred_signal", "centred_noise")}
        self._class_sums = ExactVector()
        self._labelled = self._agree = self._reference_hits = self._engine_hits = self._lost = 0

    def fresh(self) -> LogitsMeter:
        """A meter of the same output that has counted nothing."""
        return LogitsMeter(self.output, self._live)

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether an array of this shape can be logits."""
        return len(shape) == 2

    def _compare(self, ref: Doubles, out: Doubles, name: Name) -> None:
        finite = np.isfinite(out)
        self._agree += int((ref.argmax(1) == answers(out)).sum())
        stray = np.zeros(len(ref))
        if self._live is not None:
            wrong = ~self._live & (answers(out)[:, None] == np.arange(out.shape[1]))
            stray = (np.where(wrong, ref - out, 0.0) ** 2).sum(1)
            ref, out, finite = ref[:, self._live], out[:, self._live], finite[:, self._live]
        error = np.where(finite, ref - out, np.inf)
        self._sums["signal"].add((ref**2).sum(1))
        self._sums["noise"].add((error**2).sum(1) + stray)
        differences = centred(ref)
        noise = (centred(np.where(finite, error, 0.0)) ** 2).sum(1) + stray
        self._sums["centred_signal"].add((differences**2).sum(1))
        self._sums["centred_noise"].add(np.where(finite.all(1), noise, np.inf))
        self._class_sums.add(differences)
        self._rank(ref, out, error, name)

    def _compare_with(self, labels: npt.NDArray[np.int64], ref: Doubles, out: Doubles) -> None:
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < ref.shape[1]:
            msg = f"Labels run from {labels.min()} to {labels.max()}; the network has {ref.shape[1]} classes."
            raise DataError(msg)
        was_right, right = ref.argmax(1) == labels, answers(out) == labels
        self._labelled += len(labels)
        self._reference_hits += int(was_right.sum())
        self._engine_hits += int(right.sum())
        self._lost += int((was_right & ~right).sum())

    def _state(self) -> dict[str, Any]:
        counts = [self._labelled, self._agree, self._reference_hits, self._engine_hits, self._lost]
        return {**super()._state(), "class_sums": self._class_sums.units, "counts": counts}

    def _add_state(self, other: dict[str, Any]) -> None:
        super()._add_state(other)
        self._class_sums.merge(ExactVector(other["class_sums"]))
        labelled, agree, reference_hits, engine_hits, lost = other["counts"]
        self._labelled += labelled
        self._agree += agree
        self._reference_hits += reference_hits
        self._engine_hits += engine_hits
        self._lost += lost

    @property
    def counts(self) -> PairedCounts:
        """Labelled images, and those lost and gained among them."""
        gained = self._engine_hits - self._reference_hits + self._lost
        return PairedCounts(self._labelled, self._lost, gained)

    def _metrics(self) -> dict[str, float]:
        noise, changes = self.noise(), self.changes()
        metrics = {"top1_agreement": 100.0 * self._agree / len(self._cosines)}
        metrics["sqnr_differences_db"] = sqnr_db(float(self._sums["centred_signal"]), noise)
        if changes is not None:
            metrics["sqnr_changes_db"] = sqnr_db(changes, noise)
        if self._labelled:
            hits, counts = (self._reference_hits, self._engine_hits), self.counts
            reference, engine = (100.0 * each / self._labelled for each in hits)
            metrics |= {"top1_reference": reference, "top1_engine": engine, "top1_drop": reference - engine}
            metrics |= {"top1_lost": float(counts.lost), "top1_gained": float(counts.gained)}
            metrics["top1_drop_bound"] = counts.drop_bound
        return metrics

    def changes(self) -> float | None:
        """Power of what all images together change in the differences; None where they change nothing."""
        signal = float(self._sums["centred_signal"])
        return power_of_changes(signal, self._class_sums.sum_of_squares(), len(self._cosines))

    def noise(self) -> float:
        """Power of the errors in the differences."""
        return float(self._sums["centred_noise"])

    def lost_answers(self, metrics: dict[str, float], budget: ParityBudget) -> list[str]:
        """What fails where a precision loses what the images change, and so the answers to them."""
        changes, same = metrics.get("sqnr_changes_db", math.inf), metrics["top1_agreement"]
        if changes >= changes_limit(budget) or same >= SAME_ANSWERS:
            return []
        return [
            f"what the images change is lost beside what all of them have in common: {changes:.1f} dB of it, and "
            f"{same:.0f} % of the answers, are left. Take large constants off the logits, or keep that part in FP32"
        ]

    def task(self, budget: ParityBudget, *, to_prove: bool) -> tuple[str, list[str]]:
        """What the labels tell of the drop of top-1, and what fails by them; nothing without labels."""
        if not self._labelled:
            return "", []
        return (
            judge_drop(self.counts, budget.top1_drop),
            drop_failures(self.counts, budget.top1_drop, to_prove=to_prove),
        )


class Classification(Role):
    """The role `logits`."""

    name = LOGITS
    axes = ("batch", "class")
    labelled = True
    columns = (
        Column("same top-1 %", "top1_agreement", "{:.2f}"),
        Column("top-1 drop", "top1_drop", "{:+.2f}"),
    )

    def sentences(self, metrics: dict[str, float], task: str, budget: ParityBudget) -> list[str]:
        """Accuracy of both sides, and the bound of the drop, where images are labelled."""
        if not task:
            return []
        drop = f"drop {metrics['top1_drop']:.2f} points, at most {metrics['top1_drop_bound']:.2f} with 95 % confidence"
        return [
            f"top-1: eager {metrics['top1_reference']:.2f} %, engine {metrics['top1_engine']:.2f} %",
            f"{drop}: {_TASK[task]} within {budget.top1_drop:.2f}.",
        ]

    def live(self, rows: Outputs) -> Live:
        """The classes that are candidates for an answer, `(K,)`; see `metrics.live_classes`."""
        return live_classes(rows)

    def differences(self, rows: Doubles) -> Doubles:
        """Rows less their means."""
        return centred(rows)

    def meter(self, output: str, rows: Outputs | None = None) -> LogitsMeter:
        """Compares logits, only those that are live where the rows of several images are known."""
        return LogitsMeter(output, None if rows is None else live_classes(rows))
