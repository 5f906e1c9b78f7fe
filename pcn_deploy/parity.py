"""How far an engine is from the eager model: metrics, budget, verdict. numpy only.

Definitions, with reference r and engine output y, one row per image:
cosine = r.y / (|r| |y|) of the worst image; SQNR = 10 log10(sum r^2 / sum (r - y)^2) in dB over all images;
SQNR of the differences = the same, of what each logit differs from the mean of its row by, on both sides: one number
added to all logits of an image changes no answer, and makes the errors of the others look small;
top-1 agreement = share of images with the same largest logit; top-1 drop = accuracy of r minus that of y, in
percentage points. The default budgets are justified in docs/parity.md.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from pcn_deploy.errors import DataError, OptionError
from pcn_deploy.exact import ExactSum
from pcn_deploy.specs import ATTENTION_MAP, LOGITS

Logits = npt.NDArray[np.floating[Any]]

SQNR_CEILING_DB = 200.0
"""Reported where both sides are equal to the bit; float32 cannot tell smaller errors from none."""


@dataclass(frozen=True, kw_only=True)
class ParityBudget:
    """What is still parity.

    Attributes:
        cosine_min: Least cosine similarity of any image.
        sqnr_db: Least signal to quantisation noise ratio, in dB.
        top1_drop: Largest loss of top-1 accuracy, in percentage points; used where there are labels.
    """

    cosine_min: float
    sqnr_db: float
    top1_drop: float


BUDGETS = {
    "fp32": ParityBudget(cosine_min=0.9999, sqnr_db=60.0, top1_drop=0.1),
    "fp16": ParityBudget(cosine_min=0.999, sqnr_db=40.0, top1_drop=0.2),
    "bf16": ParityBudget(cosine_min=0.99, sqnr_db=20.0, top1_drop=0.5),
    "int8": ParityBudget(cosine_min=0.95, sqnr_db=15.0, top1_drop=1.0),
    "fp8": ParityBudget(cosine_min=0.95, sqnr_db=15.0, top1_drop=1.0),
}
"""Default budget per precision; justified in docs/parity.md."""


def budget_for(precision: str, max_drop: float | None = None) -> ParityBudget:
    """Default budget of a precision, with the user's limit on the top-1 drop if there is one.

    Args:
        precision: One of `BUDGETS`.
        max_drop: Percentage points, from 0 to below 100.

    Raises:
        OptionError: If the limit is negative, or allows everything.
    """
    default = BUDGETS[precision]
    if max_drop is None:
        return default
    if not 0 <= max_drop < 100:
        msg = f"--max-drop {max_drop}: expected percentage points of top-1, from 0 to below 100."
        raise OptionError(msg)
    return ParityBudget(cosine_min=default.cosine_min, sqnr_db=default.sqnr_db, top1_drop=max_drop)


@dataclass(frozen=True, kw_only=True)
class ParityReport:
    """The verdict and the numbers behind it; true if the engine passed.

    Attributes:
        target: The engine judged.
        executed_by: What computed the outputs: the target itself, or `cpu` where the engine cannot run on this
            machine and ONNX Runtime executed the same graph instead.
        images: Number of images compared.
        data: Where they came from.
        metrics: Names as in the module's definitions, `sqnr_differences_db` of logits only; `top1_*` and `top1_drop` in
            percent, with labels only; `attention_map_*` where the engine has that output and the reference too.
        budget: What was allowed.
        failures: One sentence per limit that was broken.
        unreadable: Image files that could not be read and were left out.
        executions: Metrics of further executions of the same graph, by their name; their failures are among `failures`.
        notes: What does not fail the verdict, but has to be known, such as an execution that another program refused.
    """

    target: str
    executed_by: str
    images: int
    data: str
    metrics: dict[str, float]
    budget: ParityBudget
    failures: tuple[str, ...] = field(default=())
    unreadable: int = 0
    executions: dict[str, dict[str, float]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return not self.failures

    @property
    def passed(self) -> bool:
        """Whether every limit was kept."""
        return not self.failures

    def with_execution(self, other: ParityReport) -> ParityReport:
        """This report, with that of another execution of the same graph: passed only if both did."""
        return replace(
            self,
            failures=(*self.failures, *(f"{other.executed_by}: {failure}" for failure in other.failures)),
            executions={**self.executions, other.executed_by: other.metrics},
        )

    def to_json(self) -> dict[str, Any]:
        """Plain values, as `verify --json` prints them and the bundle holds them."""
        return {"passed": self.passed, **asdict(self), "failures": list(self.failures), "notes": list(self.notes)}


def report_from_json(data: dict[str, Any]) -> ParityReport:
    """Inverse of `ParityReport.to_json`.

    Raises:
        KeyError: If an entry is missing.
        TypeError: If an entry is of another kind.
    """
    return ParityReport(
        target=str(data["target"]),
        executed_by=str(data["executed_by"]),
        images=int(data["images"]),
        data=str(data["data"]),
        metrics={str(key): float(value) for key, value in data["metrics"].items()},
        budget=ParityBudget(**data["budget"]),
        failures=tuple(data["failures"]),
        unreadable=int(data["unreadable"]),
        executions=dict(data.get("executions", {})),  # bundles of 0.1.0 have none
        notes=tuple(data.get("notes", ())),
    )


class ParityMeter:
    """Accumulates the comparison batch by batch, in constant memory; grouping and order of the images do not matter.

    Args:
        output: Name of the output that is compared, for messages.
    """

    def __init__(self, output: str = LOGITS) -> None:
        self._output = output
        self._images = 0
        self._labelled = 0
        self._cosine_min = 1.0
        self._max_abs = 0.0
        self._signal, self._noise = ExactSum(), ExactSum()
        self._centred_signal, self._centred_noise = ExactSum(), ExactSum()
        self._agree = self._reference_hits = self._engine_hits = 0

    def update(self, reference: Logits, engine: Logits, labels: npt.NDArray[np.int64] | None = None) -> None:
        """Compare one batch.

        Args:
            reference: Logits of the eager model, `(N, K)`; another output, `(N, ...)`, is one row per image.
            engine: The same of the engine.
            labels: Classes, `(N,)`, if known.

        Raises:
            DataError: If the shapes differ, the reference is not finite, or a label is not one of the K classes.
        """
        rank_fits = reference.ndim == 2 if self._output == LOGITS else reference.ndim > 1
        if reference.shape != engine.shape or not rank_fits:
            shape = "(N, K)" if self._output == LOGITS else "shape (N, ...)"
            msg = (
                f"Reference {self._output} {reference.shape} and engine {self._output} {engine.shape}: "
                f"expected the same {shape}."
            )
            raise DataError(msg)
        ref, out = (values.reshape(len(values), -1).astype(np.float64) for values in (reference, engine))
        if not np.isfinite(ref).all():
            msg = f"The reference {self._output} hold NaN or infinite values; there is nothing to be equal to."
            raise DataError(msg)
        self._images += len(ref)
        self._signal.add((ref**2).sum(1))
        error = np.where(np.isfinite(out), ref - out, np.inf)
        self._noise.add((error**2).sum(1))
        if self._output == LOGITS:
            infinite = np.isinf(error)
            noise = (_centred(np.where(infinite, 0.0, error)) ** 2).sum(1)
            self._centred_signal.add((_centred(ref) ** 2).sum(1))
            self._centred_noise.add(np.where(infinite.any(1), np.inf, noise))
        self._max_abs = max(self._max_abs, float(np.abs(error).max(initial=0.0)))
        self._cosine_min = min(self._cosine_min, float(_cosine(ref, out).min(initial=1.0)))
        best_ref, best_out = ref.argmax(1), out.argmax(1)
        self._agree += int((best_ref == best_out).sum())
        if labels is not None:
            if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < ref.shape[1]:
                msg = f"Labels run from {labels.min()} to {labels.max()}; the network has {ref.shape[1]} classes."
                raise DataError(msg)
            self._labelled += len(labels)
            self._reference_hits += int((best_ref == labels).sum())
            self._engine_hits += int((best_out == labels).sum())

    @property
    def _sums(self) -> tuple[ExactSum, ...]:
        return self._signal, self._noise, self._centred_signal, self._centred_noise

    def state(self) -> bytes:
        """Everything counted so far, as JSON, for `merge` in another process."""
        sums = [[each.units, each.infinite] for each in self._sums]
        extremes = {"cosine_min": self._cosine_min, "max_abs": self._max_abs}
        counts = [self._images, self._labelled, self._agree, self._reference_hits, self._engine_hits]
        return json.dumps({"sums": sums, **extremes, "counts": counts}).encode()

    def merge(self, state: bytes) -> None:
        """Add what another meter counted. Nothing is rounded: the metrics are those of one meter for all images."""
        other = json.loads(state)
        for mine, (units, infinite) in zip(self._sums, other["sums"], strict=True):
            mine.merge(ExactSum(units, infinite=infinite))
        self._cosine_min = min(self._cosine_min, other["cosine_min"])
        self._max_abs = max(self._max_abs, other["max_abs"])
        images, labelled, agree, reference_hits, engine_hits = other["counts"]
        self._images += images
        self._labelled += labelled
        self._agree += agree
        self._reference_hits += reference_hits
        self._engine_hits += engine_hits

    def metrics(self) -> dict[str, float]:
        """The numbers so far.

        Raises:
            DataError: If nothing was compared.
        """
        if self._images == 0:
            msg = "No images were compared."
            raise DataError(msg)
        found = {
            "cosine_min": self._cosine_min,
            "sqnr_db": _sqnr_db(float(self._signal), float(self._noise)),
            "max_abs_error": min(self._max_abs, float(np.finfo(np.float64).max)),  # JSON has no infinity
            "top1_agreement": 100.0 * self._agree / self._images,
        }
        if self._output == LOGITS:
            found["sqnr_differences_db"] = _sqnr_db(float(self._centred_signal), float(self._centred_noise))
        if self._labelled:
            reference = 100.0 * self._reference_hits / self._labelled
            engine = 100.0 * self._engine_hits / self._labelled
            found |= {"top1_reference": reference, "top1_engine": engine, "top1_drop": reference - engine}
        return found

    def report(
        self, *, target: str, executed_by: str, data: str, budget: ParityBudget, attention: ParityMeter | None = None
    ) -> ParityReport:
        """Judge the numbers so far against a budget.

        Args:
            target: The engine judged.
            executed_by: What computed its outputs.
            data: Where the images came from.
            budget: What is still parity.
            attention: The comparison of the attention maps, judged by cosine and SQNR as the logits are.
        """
        metrics, failures = self.metrics(), _failures(self.metrics(), budget)
        if attention is not None:
            seen = attention.metrics()
            metrics |= {f"{ATTENTION_MAP}_{name}": seen[name] for name in ("cosine_min", "sqnr_db", "max_abs_error")}
            failures += [f"attention map: {failure}" for failure in _failures(seen, budget)]
        return ParityReport(
            target=target,
            executed_by=executed_by,
            images=self._images,
            data=data,
            metrics=metrics,
            budget=budget,
            failures=tuple(failures),
        )


def least_sqnr_db(expected: Iterable[Logits], found: Iterable[Logits]) -> float:
    """The least SQNR, in dB, between two lists of outputs `(N, ...)`, each compared with its counterpart.

    Of outputs `(N, K)`, such as logits, that of the differences in a row counts too.

    Raises:
        DataError: If shapes differ, or what is expected is not finite.
    """
    ratios = []
    for first, second in zip(expected, found, strict=True):
        meter = ParityMeter(LOGITS if first.ndim == 2 else "output")
        meter.update(first, second)
        metrics = meter.metrics()
        ratios.append(min(metrics["sqnr_db"], metrics.get("sqnr_differences_db", math.inf)))
    return min(ratios)


def _cosine(ref: npt.NDArray[np.float64], out: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Cosine per row; 1 where both rows are zero, -1 where the engine's is not finite."""
    finite = np.asarray(np.isfinite(out).all(1))
    out = np.where(finite[:, None], out, 0.0)
    norms = np.linalg.norm(ref, axis=1) * np.linalg.norm(out, axis=1)
    both_zero = (np.abs(ref).max(1, initial=0) == 0) & (np.abs(out).max(1, initial=0) == 0)
    cosine = np.where(both_zero, 1.0, (ref * out).sum(1) / np.where(norms > 0, norms, 1.0))
    worst: npt.NDArray[np.float64] = np.where(finite, cosine, -1.0)
    return worst


def _centred(rows: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Rows less their means; a single logit has no others to differ from, and stays."""
    centred: npt.NDArray[np.float64] = rows - rows.mean(1, keepdims=True) if rows.shape[1] > 1 else rows
    return centred


def _sqnr_db(signal: float, noise: float) -> float:
    if noise == 0:
        return SQNR_CEILING_DB
    if signal == 0 or math.isinf(noise):
        return -SQNR_CEILING_DB
    return min(SQNR_CEILING_DB, 10 * math.log10(signal / noise))


def _failures(metrics: dict[str, float], budget: ParityBudget) -> list[str]:
    found = []
    if metrics["cosine_min"] < budget.cosine_min:
        found.append(f"cosine {metrics['cosine_min']:.5f} of the worst image is below {budget.cosine_min}")
    if metrics["sqnr_db"] < budget.sqnr_db:
        found.append(f"SQNR {metrics['sqnr_db']:.1f} dB is below {budget.sqnr_db:.1f} dB")
    elif (differences := metrics.get("sqnr_differences_db", math.inf)) < budget.sqnr_db:
        found.append(
            f"SQNR {metrics['sqnr_db']:.1f} dB is that of what all logits of an image have in common; "
            f"that of their differences, {differences:.1f} dB, is below {budget.sqnr_db:.1f} dB"
        )
    if metrics.get("top1_drop", 0.0) > budget.top1_drop:
        found.append(f"top-1 drops by {metrics['top1_drop']:.2f} points, more than {budget.top1_drop:.2f}")
    return found
