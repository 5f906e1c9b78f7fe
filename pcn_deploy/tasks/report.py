"""The report of parity: the verdict and the numbers behind it, as plain data. numpy only."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from pcn_deploy.specs import ATTENTION_MAP, LOGITS
from pcn_deploy.tasks.limits import ParityBudget

NAMED = 5
"""Most images that a message names."""


@dataclass(frozen=True, kw_only=True)
class ParityReport:
    """The verdict and the numbers behind it; true if the engine passed.

    Attributes:
        target: The engine judged.
        executed_by: What computed the outputs: the target itself, or `cpu` where the engine cannot run on this
            machine and ONNX Runtime executed the same graph instead.
        images: Number of images compared.
        data: Where they came from.
        metrics: Names as `tasks/parity.py` defines them, `sqnr_differences_db` and `sqnr_changes_db` of logits only;
            `cosine_judged` is that of the worst image but those that are tolerated; `non_finite` counts images;
            `top1_*` and `top1_drop` in percent, `top1_lost` and `top1_gained` in images, with labels only;
            those of a further output have its name in front, as `attention_map_sqnr_db`.
        budget: What was allowed.
        outputs: Role of each output that was compared, by its name, that of `metrics` without a prefix first.
        failures: One sentence per limit that was broken.
        parts: Whether each further comparison passed, by its name: outputs, `edge` and `simulated` images, executions.
        unreadable: Image files that could not be read and were left out.
        task: What the labels tell of the drop: `proven` within the budget, `broken`, `open`; empty without labels.
        worst_image: Name of the image with the least cosine.
        executions: Metrics of further executions of the same graph, by their name; their failures are among `failures`.
        constant: Whether the reference answers the same to every image, so that nothing else was judged.
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
    task: str = ""
    worst_image: str = ""
    executions: dict[str, dict[str, float]] = field(default_factory=dict)
    constant: bool = False
    notes: tuple[str, ...] = ()
    outputs: dict[str, str] = field(default_factory=dict)
    parts: dict[str, bool] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return not self.failures

    @property
    def role(self) -> str:
        """What the output means that the network is judged by."""
        return next(iter(self.outputs.values()), LOGITS)

    @property
    def passed(self) -> bool:
        """Whether every limit was kept."""
        return not self.failures

    def with_execution(self, other: ParityReport) -> ParityReport:
        """This report, with that of another execution of the same graph: passed only if both did."""
        name = other.executed_by
        whole = self.with_part(name, {}, other.failures, name)
        notes = tuple(dict.fromkeys((*self.notes, *other.notes)))
        return replace(whole, notes=notes, executions={**self.executions, name: other.metrics})

    def with_part(self, name: str, metrics: dict[str, float], failures: Iterable[str], words: str) -> ParityReport:
        """This report, with a further comparison of the same execution or of another: passed only if both did.

        Args:
            name: Of the comparison.
            metrics: Of it, under the names that they have in the report.
            failures: One sentence per limit that it broke.
            words: What these sentences start with.
        """
        sentences = [f"{words}: {failure}" for failure in failures]
        passed = self.parts.get(name, True) and not sentences
        return replace(
            self,
            metrics={**self.metrics, **metrics},
            failures=(*self.failures, *sentences),
            parts={**self.parts, name: passed},
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
        task=str(data.get("task", "")),  # this and the others are not in bundles of 0.1.0
        worst_image=str(data.get("worst_image", "")),
        executions=dict(data.get("executions", {})),
        constant=bool(data.get("constant", False)),
        notes=tuple(data.get("notes", ())),
        outputs=dict(data["outputs"] if "outputs" in data else _outputs_of_schema_1(data)),
        parts=dict(data["parts"] if "parts" in data else _parts_of_schema_1(data)),
    )


def _outputs_of_schema_1(data: dict[str, Any]) -> dict[str, str]:
    """The outputs of a report that does not name them."""
    return {name: name for name in (LOGITS, ATTENTION_MAP) if name == LOGITS or f"{name}_sqnr_db" in data["metrics"]}


def _parts_of_schema_1(data: dict[str, Any]) -> dict[str, bool]:
    """Whether the parts of a report passed that tells it in words only."""
    words = {name: name for name in data.get("executions", {})}
    words |= {"edge": "edge images", ATTENTION_MAP: "attention map"}
    return {name: not any(text.startswith(f"{said}: ") for text in data["failures"]) for name, said in words.items()}


def listed(names: Iterable[str]) -> str:
    """So many images, the first of them by name."""
    every = sorted(names)
    more = f" and {len(every) - NAMED} more" if len(every) > NAMED else ""
    return ", ".join(every[:NAMED]) + more
