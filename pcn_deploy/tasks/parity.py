"""How far an output of an engine is from the eager model's: the meter of any output and its verdict. numpy only.

Definitions, with reference r and engine output y, one row per image:
cosine = r.y / (|r| |y|) of the worst image; SQNR = 10 log10(sum r^2 / sum (r - y)^2) in dB over all images;
SQNR of the changes = what the images change in the output, over the same noise: what every image of a set gets alike
tells no image from another. An output that is not finite is a failure of its own. What a role of outputs measures
beside, its own meter does, such as that of `tasks/classification.py`. The budgets are justified in docs/parity.md.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from pcn_deploy.aliases import Outputs
from pcn_deploy.errors import DataError
from pcn_deploy.exact import ExactSum
from pcn_deploy.tasks.limits import TOLERATED, ParityBudget, changes_limit
from pcn_deploy.tasks.metrics import NOTHING, Doubles, as_json, cosine, sqnr_db
from pcn_deploy.tasks.noise_floor import UNMEASURED, NoiseFloor
from pcn_deploy.tasks.report import ParityReport, listed

Name = Callable[[int], str]
"""From the index in a batch to the name of the image."""


class ParityMeter:
    """Accumulates the comparison batch by batch, in 8 bytes per image; grouping and order of the images do not matter.

    Args:
        output: Name of the output that is compared, for messages and as the prefix of metrics.
        usual: What the output is on average over images, `(...)`: what an image changes is what differs from it. By
            default changes are not measured.
    """

    shape = "shape (N, ...)"
    """What is asked of the arrays, in words."""

    def __init__(self, output: str, usual: npt.NDArray[np.floating[Any]] | None = None) -> None:
        self.output = output
        self._usual = None if usual is None else usual.reshape(1, -1).astype(np.float64)
        self._cosines: list[float] = []
        self._worst: tuple[float, str] = (math.inf, "")
        self._broken: list[str] = []
        self._max_abs = 0.0
        self._sums = {name: ExactSum() for name in ("signal", "noise", "changes")}

    def fresh(self) -> ParityMeter:
        """A meter of the same output that has counted nothing, to merge others into."""
        return ParityMeter(self.output, self._usual)

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether an array of this shape can be such an output."""
        return len(shape) > 1

    def update(
        self,
        reference: Outputs,
        engine: Outputs,
        labels: npt.NDArray[np.int64] | None = None,
        name: Name | None = None,
    ) -> None:
        """Compare one batch.

        Args:
            reference: Output of the eager model, `(N, ...)`, one row per image.
            engine: The same of the engine.
            labels: What the images are labelled with, `(N,)`, if known, and if the output answers that.
            name: Names the images; by default by their number.

        Raises:
            DataError: If the shapes differ, the reference is not finite, or a label cannot be.
        """
        if reference.shape != engine.shape or not self.fits(reference.shape):
            msg = (
                f"Reference {self.output} {reference.shape} and engine {self.output} {engine.shape}: "
                f"expected the same {self.shape}."
            )
            raise DataError(msg)
        seen = len(self._cosines)
        name = name or (lambda index: f"image {seen + index}")
        ref, out = (values.reshape(len(values), -1).astype(np.float64) for values in (reference, engine))
        no_reference = np.flatnonzero(~np.isfinite(ref).all(1)).tolist()
        if no_reference:
            msg = (
                f"The reference {self.output} hold NaN or infinite values for {listed(map(name, no_reference))}; "
                "there is nothing to be equal to."
            )
            raise DataError(msg)
        self._broken += [name(index) for index in np.flatnonzero(~np.isfinite(out).all(1)).tolist()]
        self._compare(ref, out, name)
        if labels is not None:
            self._compare_with(labels, ref, out)

    def _compare(self, ref: Doubles, out: Doubles, name: Name) -> None:
        """Compare rows `(N, K)`."""
        error = np.where(np.isfinite(out), ref - out, np.inf)
        self._sums["signal"].add((ref**2).sum(1))
        self._sums["noise"].add((error**2).sum(1))
        if self._usual is not None:
            self._sums["changes"].add(((ref - self._usual) ** 2).sum(1))
        self._rank(ref, out, error, name)

    def _rank(self, ref: Doubles, out: Doubles, error: Doubles, name: Name) -> None:
        """Keep the largest error, and the worst image."""
        self._max_abs = max(self._max_abs, float(np.abs(error).max(initial=0.0)))
        cosines = cosine(ref, out).tolist()
        self._cosines += cosines
        least = min(cosines, default=math.inf)
        if least <= self._worst[0]:
            self._worst = min(self._worst, (least, min(name(i) for i, one in enumerate(cosines) if one == least)))

    def _compare_with(self, labels: npt.NDArray[np.int64], ref: Doubles, out: Doubles) -> None:
        """Compare both with labels, where the output answers what they say."""

    def _state(self) -> dict[str, Any]:
        """Everything counted so far, as JSON."""
        return {
            "sums": {name: [each.units, each.infinite] for name, each in self._sums.items()},
            "cosines": self._cosines,
            "worst": self._worst if self._cosines else None,
            "broken": self._broken,
            "max_abs": as_json(self._max_abs),
        }

    def _add_state(self, other: dict[str, Any]) -> None:
        """Add what another meter counted."""
        for name, (units, infinite) in other["sums"].items():
            self._sums[name].merge(ExactSum(units, infinite=infinite))
        self._cosines += other["cosines"]
        if other["worst"]:
            self._worst = min(self._worst, tuple(other["worst"]))
        self._broken += other["broken"]
        self._max_abs = max(self._max_abs, other["max_abs"])

    def state(self) -> bytes:
        """Everything counted so far, as JSON, for `merge` in another process."""
        return json.dumps(self._state(), allow_nan=False).encode()

    def merge(self, state: bytes) -> None:
        """Add what another meter counted. Nothing is rounded: the metrics are those of one meter for all images."""
        self._add_state(json.loads(state))

    def metrics(self) -> dict[str, float]:
        """The numbers so far.

        Raises:
            DataError: If nothing was compared.
        """
        if len(self._cosines) == 0:
            msg = "No images were compared."
            raise DataError(msg)
        return {
            "cosine_min": self._worst[0],
            "sqnr_db": sqnr_db(float(self._sums["signal"]), float(self._sums["noise"])),
            "max_abs_error": as_json(self._max_abs),
            **self._metrics(),
            "non_finite": float(len(self._broken)),
        }

    def _metrics(self) -> dict[str, float]:
        """Those of the role."""
        changes = self.changes()
        return {} if changes is None else {"sqnr_changes_db": sqnr_db(changes, self.noise())}

    def changes(self) -> float | None:
        """Power of what all images together change; None where they change nothing, or it is not measured."""
        changed, images = float(self._sums["changes"]), len(self._cosines)
        return changed if images > 1 and changed > NOTHING * float(self._sums["signal"]) else None

    def noise(self) -> float:
        """Power of the errors that what the images change is compared with."""
        return float(self._sums["noise"])

    @property
    def measures_changes(self) -> bool:
        """Whether what the images change is measured."""
        return self._usual is not None

    def lost_answers(self, metrics: dict[str, float], budget: ParityBudget) -> list[str]:
        """What fails where a precision loses what the images change, and so the answers to them."""
        return []

    def task(self, budget: ParityBudget, *, to_prove: bool) -> tuple[str, list[str]]:
        """What the labels tell, `proven`, `broken` or `open`, and what fails by them; nothing without labels."""
        return "", []

    def report(
        self,
        *,
        target: str,
        executed_by: str,
        data: str,
        budget: ParityBudget,
        others: Sequence[tuple[ParityMeter, NoiseFloor]] = (),
        tolerant: bool = False,
        to_prove: bool = False,
        changes: bool = True,
        floor: NoiseFloor = UNMEASURED,
    ) -> ParityReport:
        """Judge the numbers so far against a budget.

        Args:
            target: The engine judged.
            executed_by: What computed its outputs.
            data: Where the images came from.
            budget: What is still parity.
            others: The comparisons of further outputs, judged by the same budget, with what rounding leaves of each.
            tolerant: Whether, of many images, a share may be below the least cosine: `TOLERATED` percent, or less if
                the budget allows less of them to change their answer.
            to_prove: Whether the labels must prove the drop within the budget; else they must not show it broken.
            changes: Whether what the images change is judged: noise tells nothing of that.
            floor: What rounding leaves of it.
        """
        metrics, power, images = self.metrics(), self.changes(), len(self._cosines)
        if not changes:
            metrics.pop("sqnr_changes_db", None)
        elif power is not None and not math.isnan(floor.power):
            metrics["changes_kept_db"] = floor.kept_db(power / images)
        share = min(budget.top1_drop, TOLERATED) if tolerant else 0.0
        metrics["cosine_judged"] = sorted(self._cosines)[int(len(self._cosines) * share / 100)]
        least = floor.least_changes_db(metrics, budget)
        constant = self.measures_changes and power is None and images > 1
        notes = (floor.nothing,) if constant else floor.notes(metrics, budget, least)
        task, failures = self.task(budget, to_prove=to_prove)
        failures += self.failures(metrics, budget, least)
        failures += floor.failures(self.noise() / images) if constant and not failures else []
        if not failures and least == -math.inf < floor.natural_db:
            failures += (lost := self.lost_answers(metrics, budget))
            notes = () if lost else notes
        report = ParityReport(
            target=target,
            executed_by=executed_by,
            images=images,
            data=data,
            metrics=metrics,
            budget=budget,
            failures=tuple(failures),
            task=task,
            worst_image=self._worst[1],
            constant=constant,
            notes=notes,
        )
        for other, own in others:
            report = other._beside(report, changes=changes, floor=own)
        return report

    def _beside(self, report: ParityReport, *, changes: bool, floor: NoiseFloor) -> ParityReport:
        """A report with this, the comparison of a further output of the same images."""
        own, power, images = self.metrics(), self.changes(), len(self._cosines)
        if not changes:
            own.pop("sqnr_changes_db", None)
        elif power is not None and not math.isnan(floor.power):
            own["changes_kept_db"] = floor.kept_db(power / images)
        failures = self.failures(own, report.budget, floor.least_changes_db(own, report.budget))
        if self.measures_changes and power is None and images > 1 and not failures:
            failures = floor.failures(self.noise() / images)
        kept = {f"{self.output}_{name}": value for name, value in own.items() if name != "non_finite"}
        return report.with_part(self.output, kept, failures, self.words)

    def added_to(self, report: ParityReport, name: str, limit: ParityBudget, *, first: bool = True) -> ParityReport:
        """A report with this as a further comparison, judged by cosine and SQNR.

        Args:
            report: The report.
            name: Of the comparison, in front of its metrics and failures, with that of another output than the first.
            limit: What is allowed.
            first: Whether this is the first output.
        """
        seen = self.metrics()
        seen.pop("sqnr_changes_db", None)
        key = name if first else f"{name}_{self.output}"
        kept = {f"{key}_cosine_min": seen["cosine_min"]}
        kept[f"{key}_sqnr_db"] = min(seen["sqnr_db"], seen.get("sqnr_differences_db", math.inf))
        words = f"{name} images" if first else f"{self.words}: {name} images"
        return report.with_part(key, kept, self.failures(seen, limit), words)

    @property
    def words(self) -> str:
        """The output as messages call it."""
        return self.output.replace("_", " ")

    def failures(self, metrics: dict[str, float], budget: ParityBudget, least: float | None = None) -> list[str]:
        """One sentence per limit that the numbers break, of the changes `least`; if they are no numbers, only that."""
        if self._broken:
            return [f"NaN or infinite {self.output} for {listed(self._broken)}"]
        failures = []
        judged = metrics.get("cosine_judged", metrics["cosine_min"])
        if judged < budget.cosine_min:
            which = f"the worst image, {self._worst[1]}," if judged == self._worst[0] else "an image too many"
            failures.append(f"cosine {judged:.5f} of {which} is below {budget.cosine_min}")
        sqnr, differences = metrics["sqnr_db"], metrics.get("sqnr_differences_db", math.inf)
        changes, least = metrics.get("sqnr_changes_db", math.inf), changes_limit(budget) if least is None else least
        if sqnr < budget.sqnr_db:
            return [*failures, f"SQNR {sqnr:.1f} dB is below {budget.sqnr_db:.1f} dB"]
        if differences < budget.sqnr_db:
            common, what, got, limit = "all logits of an image", "their differences", differences, budget.sqnr_db
        elif changes < least:
            common, what, got, limit = "all images", "what the image changes", changes, least
        else:
            return failures
        shared = f"SQNR {sqnr:.1f} dB is that of what {common} have in common"
        return [*failures, f"{shared}; that of {what}, {got:.1f} dB, is below {limit:.1f} dB"]
