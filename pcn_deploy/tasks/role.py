"""What an output means: the contract that every role keeps. numpy only."""

from __future__ import annotations

from abc import ABC
from typing import Any, ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt

from pcn_deploy.aliases import Outputs
from pcn_deploy.tasks.limits import ParityBudget
from pcn_deploy.tasks.metrics import Doubles
from pcn_deploy.tasks.parity import ParityMeter


class Column(NamedTuple):
    """A column of the tables of parity: its title, the metric it shows, and how."""

    title: str
    metric: str
    form: str

    def text(self, metrics: dict[str, float]) -> str:
        """What stands in the column; a dash where the metric is not known."""
        return self.form.format(metrics[self.metric]) if self.metric in metrics else "-"


class Role(ABC):
    """What an output means. Golden set, proof, tables and `run` ask the role, and know no output by its name.

    A role is one subclass in a file of its own, and one line in `tasks/roles.py`.
    """

    name: ClassVar[str]
    """As bundles and `--output-name NAME:ROLE` call it."""

    axes: ClassVar[tuple[str, ...]] = ()
    """Names of its axes, `batch` first; empty where they may be any."""

    labelled: ClassVar[bool] = False
    """Whether class labels of images judge it."""

    columns: ClassVar[tuple[Column, ...]] = ()
    """What the tables of parity show of it beside cosine, SQNR and the largest error."""

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether an output of this shape, `(N, ...)`, can have the role."""
        return self.meter(self.name).fits(shape) and len(self.axes or shape) == len(shape)

    def live(self, rows: Outputs) -> npt.NDArray[np.bool_] | None:
        """Which entries of a row are compared, `(K,)`, by what several images have, `(N, K)`; None for all."""
        return None

    def differences(self, rows: Doubles) -> Doubles:
        """Rows `(N, K)` less what changes no answer."""
        return rows

    def meter(self, output: str, rows: Outputs | None = None) -> ParityMeter:
        """What compares an output of this role.

        Args:
            output: Its name.
            rows: What the reference has for several images, `(N, ...)`, if that is known: what is usual in them is
                taken off before what an image changes is judged.
        """
        return ParityMeter(output, None if rows is None or len(rows) < 2 else rows.mean(0, dtype=np.float64))

    def sentences(self, metrics: dict[str, float], task: str, budget: ParityBudget) -> list[str]:
        """What `verify` tells below its table.

        Args:
            metrics: Of the report.
            task: What labels tell, `proven`, `broken` or `open`; empty without labels.
            budget: What is still parity.
        """
        return []

    def answer(self, values: Outputs) -> dict[str, Any]:
        """What `run` tells of the output for one image, `(...)`: the role, and any plain values beside it."""
        wide = values.astype(np.float64)
        summary = {"smallest": float(wide.min()), "largest": float(wide.max()), "mean": float(wide.mean())}
        return {"role": self.name, "shape": list(values.shape), **summary}


def power_of_noise(reference: Outputs, outputs: Outputs, role: Role, live: npt.NDArray[np.bool_] | None) -> float:
    """Mean power of the errors in the rows of an output, less what changes no answer.

    Args:
        reference: The output, `(N, ...)`.
        outputs: The same with errors.
        role: What it means.
        live: Which entries of a row are compared, `(K,)`; None for all.
    """
    rows = (values.reshape(len(values), -1).astype(np.float64) for values in (reference, outputs))
    first, second = (role.differences(each if live is None else each[:, live]) for each in rows)
    return float(np.square(first - second).sum(1).mean())
