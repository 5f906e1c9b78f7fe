"""How far an engine is from the eager model: the meter and its verdict. numpy only.

Definitions, with reference r and engine output y, one row per image:
cosine = r.y / (|r| |y|) of the worst image; SQNR = 10 log10(sum r^2 / sum (r - y)^2) in dB over all images;
SQNR of the differences = the same, of what each logit differs from the mean of its row by, on both sides: one number
added to all logits of an image changes no answer, and makes the errors of the others look small;
SQNR of the changes = what the images change in these differences, over the same noise: what every image of a set gets
alike, such as the priors of the classes, tells no image from another;
top-1 agreement = share of images with the same largest logit; top-1 drop = accuracy of r minus that of y, in
percentage points. An output that is not finite is a failure of its own. The budgets are justified in docs/parity.md.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from pcn_deploy.aliases import Logits
from pcn_deploy.errors import DataError
from pcn_deploy.exact import ExactSum, ExactVector
from pcn_deploy.specs import ATTENTION_MAP, LOGITS
from pcn_deploy.tasks.bound import PairedCounts, drop_failures, judge_drop
from pcn_deploy.tasks.limits import TOLERATED, ParityBudget, changes_limit
from pcn_deploy.tasks.metrics import answers, as_json, centred, cosine, power_of_changes, sqnr_db
from pcn_deploy.tasks.noise_floor import UNMEASURED, NoiseFloor
from pcn_deploy.tasks.report import ParityReport, listed

Name = Callable[[int], str]
"""From the index in a batch to the name of the image."""


class ParityMeter:
    """Accumulates the comparison batch by batch, in 8 bytes per image; grouping and order of the images do not matter.

    Args:
        output: Name of the output that is compared, for messages.
        live: Which of the K logits are compared, `(K,)`, as `metrics.live_classes` tells; by default all. The others
            only count where one of them is the engine's answer.
    """

    def __init__(self, output: str = LOGITS, live: npt.NDArray[np.bool_] | None = None) -> None:
        self.output, self._live = output, live
        self._labelled = 0
        self._cosines: list[float] = []
        self._worst: tuple[float, str] = (math.inf, "")
        self._broken: list[str] = []
        self._max_abs = 0.0
        self._signal, self._noise = ExactSum(), ExactSum()
        self._centred_signal, self._centred_noise = ExactSum(), ExactSum()
        self._class_sums = ExactVector()
        self._agree = self._reference_hits = self._engine_hits = self._lost = 0

    def update(
        self,
        reference: Logits,
        engine: Logits,
        labels: npt.NDArray[np.int64] | None = None,
        name: Name | None = None,
    ) -> None:
        """Compare one batch.

        Args:
            reference: Logits of the eager model, `(N, K)`; another output, `(N, ...)`, is one row per image.
            engine: The same of the engine.
            labels: Classes, `(N,)`, if known.
            name: Names the images; by default by their number.

        Raises:
            DataError: If the shapes differ, the reference is not finite, or a label is not one of the K classes.
        """
        rank_fits = reference.ndim == 2 if self.output == LOGITS else reference.ndim > 1
        if reference.shape != engine.shape or not rank_fits:
            shape = "(N, K)" if self.output == LOGITS else "shape (N, ...)"
            msg = (
                f"Reference {self.output} {reference.shape} and engine {self.output} {engine.shape}: "
                f"expected the same {shape}."
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
        self._compare(ref, out, name)
        if labels is not None:
            self._compare_with(labels, ref, out)

    def _compare(self, ref: npt.NDArray[np.float64], out: npt.NDArray[np.float64], name: Name) -> None:
        finite = np.isfinite(out)
        self._broken += [name(index) for index in np.flatnonzero(~finite.all(1)).tolist()]
        self._agree += int((ref.argmax(1) == answers(out)).sum())
        stray = np.zeros(len(ref))
        if self._live is not None:
            wrong = ~self._live & (answers(out)[:, None] == np.arange(out.shape[1]))
            stray = (np.where(wrong, ref - out, 0.0) ** 2).sum(1)
            ref, out, finite = ref[:, self._live], out[:, self._live], finite[:, self._live]
        error = np.where(finite, ref - out, np.inf)
        self._signal.add((ref**2).sum(1))
        self._noise.add((error**2).sum(1) + stray)
        if self.output == LOGITS:
            differences = centred(ref)
            noise = (centred(np.where(finite, error, 0.0)) ** 2).sum(1) + stray
            self._centred_signal.add((differences**2).sum(1))
            self._centred_noise.add(np.where(finite.all(1), noise, np.inf))
            self._class_sums.add(differences)
        self._max_abs = max(self._max_abs, float(np.abs(error).max(initial=0.0)))
        cosines = cosine(ref, out).tolist()
        self._cosines += cosines
        least = min(cosines, default=math.inf)
        if least <= self._worst[0]:
            self._worst = min(self._worst, (least, min(name(i) for i, one in enumerate(cosines) if one == least)))

    def _compare_with(self, labels: npt.NDArray[np.int64], ref: Logits, out: Logits) -> None:
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < ref.shape[1]:
            msg = f"Labels run from {labels.min()} to {labels.max()}; the network has {ref.shape[1]} classes."
            raise DataError(msg)
        was_right, right = ref.argmax(1) == labels, answers(out) == labels
        self._labelled += len(labels)
        self._reference_hits += int(was_right.sum())
        self._engine_hits += int(right.sum())
        self._lost += int((was_right & ~right).sum())

    @property
    def _sums(self) -> tuple[ExactSum, ...]:
        return self._signal, self._noise, self._centred_signal, self._centred_noise

    def state(self) -> bytes:
        """Everything counted so far, as JSON, for `merge` in another process."""
        whole = {
            "sums": [[each.units, each.infinite] for each in self._sums],
            "class_sums": self._class_sums.units,
            "cosines": self._cosines,
            "worst": self._worst if self._cosines else None,
            "broken": self._broken,
            "max_abs": as_json(self._max_abs),
            "counts": [self._labelled, self._agree, self._reference_hits, self._engine_hits, self._lost],
        }
        return json.dumps(whole, allow_nan=False).encode()

    def merge(self, state: bytes) -> None:
        """Add what another meter counted. Nothing is rounded: the metrics are those of one meter for all images."""
        other = json.loads(state)
        for mine, (units, infinite) in zip(self._sums, other["sums"], strict=True):
            mine.merge(ExactSum(units, infinite=infinite))
        self._class_sums.merge(ExactVector(other["class_sums"]))
        self._cosines += other["cosines"]
        if other["worst"]:
            self._worst = min(self._worst, tuple(other["worst"]))
        self._broken += other["broken"]
        self._max_abs = max(self._max_abs, other["max_abs"])
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

    def metrics(self) -> dict[str, float]:
        """The numbers so far.

        Raises:
            DataError: If nothing was compared.
        """
        if (images := len(self._cosines)) == 0:
            msg = "No images were compared."
            raise DataError(msg)
        found = {
            "cosine_min": self._worst[0],
            "sqnr_db": sqnr_db(float(self._signal), float(self._noise)),
            "max_abs_error": as_json(self._max_abs),
            "top1_agreement": 100.0 * self._agree / images,
            "non_finite": float(len(self._broken)),
        }
        if self.output == LOGITS:
            noise, changes = float(self._centred_noise), self._changes()
            found["sqnr_differences_db"] = sqnr_db(float(self._centred_signal), noise)
            if changes is not None:
                found["sqnr_changes_db"] = sqnr_db(changes, noise)
        if self._labelled:
            hits, counts = (self._reference_hits, self._engine_hits), self.counts
            reference, engine = (100.0 * each / self._labelled for each in hits)
            found |= {"top1_reference": reference, "top1_engine": engine, "top1_drop": reference - engine}
            found |= {"top1_lost": float(counts.lost), "top1_gained": float(counts.gained)}
            found["top1_drop_bound"] = counts.drop_bound
        return found

    def _changes(self) -> float | None:
        """Power of what all images together change; None where they change nothing."""
        return power_of_changes(float(self._centred_signal), self._class_sums.sum_of_squares(), len(self._cosines))

    def report(
        self,
        *,
        target: str,
        executed_by: str,
        data: str,
        budget: ParityBudget,
        attention: ParityMeter | None = None,
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
            attention: The comparison of the attention maps, judged by cosine and SQNR as the logits are.
            tolerant: Whether, of many images, a share may be below the least cosine: `TOLERATED` percent, or less if
                the budget allows less of them to change their answer.
            to_prove: Whether the labels must prove the drop within the budget; else they must not show it broken.
            changes: Whether what the images change is judged: noise tells nothing of that.
            floor: What rounding leaves of it.
        """
        metrics, power, images = self.metrics(), self._changes(), len(self._cosines)
        if not changes:
            metrics.pop("sqnr_changes_db", None)
        elif power is not None and not math.isnan(floor.power):
            metrics["changes_kept_db"] = floor.kept_db(power / images)
        share = min(budget.top1_drop, TOLERATED) if tolerant else 0.0
        metrics["cosine_judged"] = sorted(self._cosines)[int(len(self._cosines) * share / 100)]
        least = floor.least_changes_db(metrics, budget)
        constant = self.output == LOGITS and power is None and images > 1
        notes = (floor.nothing,) if constant else floor.notes(metrics, budget, least)
        task, failures = "", []
        if self._labelled:
            task = judge_drop(self.counts, budget.top1_drop)
            failures = drop_failures(self.counts, budget.top1_drop, to_prove=to_prove)
        failures += self.failures(metrics, budget, least)
        failures += floor.failures(float(self._centred_noise) / images) if constant and not failures else []
        if attention is not None:
            failures += attention._judge_map(metrics, budget)
        return ParityReport(
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

    def added_to(self, report: ParityReport, name: str, limit: ParityBudget) -> ParityReport:
        """A report with this as a further comparison, judged by cosine and SQNR.

        Args:
            report: The report.
            name: Of the comparison, in front of its metrics and failures, with that of another output than logits.
            limit: What is allowed.
        """
        seen = self.metrics()
        seen.pop("sqnr_changes_db", None)
        key, words = name, f"{name} images"
        if self.output != LOGITS:
            key, words = f"{name}_{self.output}", f"{self.output.replace('_', ' ')}: {words}"
        kept = {f"{key}_cosine_min": seen["cosine_min"]}
        kept[f"{key}_sqnr_db"] = min(seen["sqnr_db"], seen.get("sqnr_differences_db", math.inf))
        failures = (f"{words}: {failure}" for failure in self.failures(seen, limit))
        return replace(report, metrics={**report.metrics, **kept}, failures=(*report.failures, *failures))

    def _judge_map(self, metrics: dict[str, float], budget: ParityBudget) -> list[str]:
        """What is wrong with the attention maps; their numbers are added to those of the logits."""
        own = self.metrics()
        metrics |= {f"{ATTENTION_MAP}_{name}": own[name] for name in ("cosine_min", "sqnr_db", "max_abs_error")}
        return [f"attention map: {failure}" for failure in self.failures(own, budget)]

    def failures(self, metrics: dict[str, float], budget: ParityBudget, least: float | None = None) -> list[str]:
        """One sentence per limit that the numbers break, of the changes `least`; if they are no numbers, only that."""
        if self._broken:
            return [f"NaN or infinite {self.output} for {listed(self._broken)}"]
        found = []
        judged = metrics.get("cosine_judged", metrics["cosine_min"])
        if judged < budget.cosine_min:
            which = f"the worst image, {self._worst[1]}," if judged == self._worst[0] else "an image too many"
            found.append(f"cosine {judged:.5f} of {which} is below {budget.cosine_min}")
        sqnr, differences = metrics["sqnr_db"], metrics.get("sqnr_differences_db", math.inf)
        changes, least = metrics.get("sqnr_changes_db", math.inf), changes_limit(budget) if least is None else least
        if sqnr < budget.sqnr_db:
            return [*found, f"SQNR {sqnr:.1f} dB is below {budget.sqnr_db:.1f} dB"]
        if differences < budget.sqnr_db:
            common, what, got, limit = "all logits of an image", "their differences", differences, budget.sqnr_db
        elif changes < least:
            common, what, got, limit = "all images", "what the image changes", changes, least
        else:
            return found
        shared = f"SQNR {sqnr:.1f} dB is that of what {common} have in common"
        return [*found, f"{shared}; that of {what}, {got:.1f} dB, is below {limit:.1f} dB"]
