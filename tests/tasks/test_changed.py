"""Images with another answer, on logits that are known."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from typing import Any

import numpy as np

from pcn_deploy.tasks.changed import ChangedAnswer, changed_answers, confusions, to_csv
from pcn_deploy.tasks.metrics import Answered

REFERENCE = np.array([[3, 1, 0], [0, 5, 1], [2, 1, 0], [1, 0, 9], [0, 1, 0]], np.float32)
ENGINE = np.array([[3, 1, 0], [6, 5, 1], [1, 1.5, 0], [1, 0, 9], [np.nan, 1, 0]], np.float32)
NAMES = ("ant", "bee", "cat")


def changed_of(reference: Any, engine: Any, labels: Any, name: Callable[[int], str]) -> list[ChangedAnswer]:
    return changed_answers("cpu", Answered.of(reference), Answered.of(engine), labels, name)


def test_the_gravest_come_first() -> None:
    changed = changed_of(REFERENCE, ENGINE, np.array([0, 1, 1, 2, 1]), "image {}".format)
    rows = list(csv.DictReader(io.StringIO(to_csv(changed, NAMES))))
    assert [row["image"] for row in rows] == ["image 4", "image 1", "image 2"], "no answer, 4 + 1 apart, 1 + 0.5 apart"
    assert rows[1] == {
        "target": "cpu",
        "image": "image 1",
        "true_class": "bee",
        "reference_class": "bee",
        "reference_margin": "4",
        "engine_class": "ant",
        "engine_margin": "1",
    }
    assert (rows[0]["engine_class"], rows[0]["engine_margin"]) == ("none", "nan")


def test_without_labels_and_names() -> None:
    changed = changed_of(REFERENCE, ENGINE, None, str)
    rows = list(csv.reader(io.StringIO(to_csv(changed))))
    assert rows[2] == ["cpu", "1", "", "1", "4", "0", "1"]
    assert confusions(changed + changed[:1]) == [
        {"target": "cpu", "reference": "1", "engine": "0", "images": 2},
        {"target": "cpu", "reference": "0", "engine": "1", "images": 1},
        {"target": "cpu", "reference": "1", "engine": "none", "images": 1},
    ]


def test_a_name_with_a_comma_and_one_class() -> None:
    one = np.array([[1.0]], np.float32)
    assert changed_of(one, one, None, str) == []
    (changed,) = changed_of(one, one * np.nan, None, "a,b {}".format)
    assert next(csv.reader(io.StringIO(to_csv([changed]).splitlines()[1])))[1] == "a,b 0"


def test_several_engines_are_told_apart() -> None:
    first, second = Answered(np.array([0]), np.array([1.0])), Answered(np.array([1]), np.array([2.0]))
    both = [one for target in ("cpu", "rtx") for one in changed_answers(target, first, second, None, str)]
    assert [row["target"] for row in csv.DictReader(io.StringIO(to_csv(both)))] == ["cpu", "rtx"]
    assert [(entry["target"], entry["images"]) for entry in confusions(both)] == [("cpu", 1), ("rtx", 1)]
