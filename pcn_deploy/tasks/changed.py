"""Which images an engine answers otherwise than the trained network, and how sure both are. numpy only."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import astuple, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pcn_deploy.tasks.metrics import NO_CLASS, Answered

COLUMNS = ("target", "image", "true_class", "reference_class", "reference_margin", "engine_class", "engine_margin")


@dataclass(frozen=True)
class ChangedAnswer:
    """One image with two answers.

    Attributes:
        target: The engine that answers otherwise.
        image: Its name.
        label: Its true class; None without labels.
        reference: The class that the trained network answers.
        reference_margin: By how much its logit is above the next one.
        engine: The class that the engine answers; `NO_CLASS` where its logits are not finite.
        engine_margin: As for the network; NaN without an answer.
    """

    target: str
    image: str
    label: int | None
    reference: int
    reference_margin: float
    engine: int
    engine_margin: float

    @property
    def severity(self) -> float:
        """How far apart both are: the sum of their margins; infinite without an answer."""
        return np.inf if self.engine == NO_CLASS else self.reference_margin + self.engine_margin


def changed_answers(
    target: str,
    reference: Answered,
    engine: Answered,
    labels: npt.NDArray[np.int64] | None,
    name: Callable[[int], str],
) -> list[ChangedAnswer]:
    """The images that an engine answers otherwise.

    Args:
        target: The engine.
        reference: What the trained network answers to N images.
        engine: What the engine answers to them.
        labels: True classes, `(N,)`, if known.
        name: From the index of an image to its name.
    """
    return [
        ChangedAnswer(
            target=target,
            image=name(index),
            label=None if labels is None else int(labels[index]),
            reference=int(reference.classes[index]),
            reference_margin=float(reference.margins[index]),
            engine=int(engine.classes[index]),
            engine_margin=float(engine.margins[index]),
        )
        for index in np.flatnonzero(engine.classes != reference.classes).tolist()
    ]


def to_csv(changed: Iterable[ChangedAnswer], class_names: Sequence[str] = ()) -> str:
    """A table with the columns `COLUMNS`, the gravest first.

    Args:
        changed: The images.
        class_names: What the classes are called; by default by their numbers.
    """
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(COLUMNS)
    for one in sorted(changed, key=lambda one: (-one.severity, one.image, one.target)):
        target, image, label, reference, margin, engine, own_margin = astuple(one)
        known = "" if label is None else _called(label, class_names)
        first, second = _called(reference, class_names), _called(engine, class_names)
        table.writerow([target, image, known, first, f"{margin:.6g}", second, f"{own_margin:.6g}"])
    return text.getvalue()


def confusions(changed: Iterable[ChangedAnswer], class_names: Sequence[str] = ()) -> list[dict[str, Any]]:
    """How often an engine says one class for another of the network's, the most frequent first; plain values."""
    counts = Counter((one.target, one.reference, one.engine) for one in changed)
    return [
        {
            "target": target,
            "reference": _called(first, class_names),
            "engine": _called(second, class_names),
            "images": count,
        }
        for (target, first, second), count in sorted(counts.items(), key=lambda entry: (-entry[1], entry[0]))
    ]


def _called(index: int, class_names: Sequence[str]) -> str:
    if index == NO_CLASS:
        return "none"
    return class_names[index] if class_names else str(index)
