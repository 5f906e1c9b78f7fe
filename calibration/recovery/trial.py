"""Whether a recovery gains: asked on images that did not choose it, and kept only if it clearly does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from torch import nn

from pcn_deploy.calibration.paired import Errors
from pcn_deploy.data.images import ImageSource
from pcn_deploy.progress import Progress, silent

EVERY = 4
"""Of so many calibration images, one judges and the others choose."""
JUDGES = 128
"""Images that judge, at most."""
STEP = "Judging recovery"


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One recovery that was tried.

    Attributes:
        name: One of `RECOVERIES`.
        layers: INT8 layers that it changed.
        kept: Whether it stays.
        images: Images that judged.
        before_db: SQNR of the logits on them without it, in dB.
        after_db: The same with it.
    """

    name: str
    layers: int
    kept: bool
    images: int
    before_db: float
    after_db: float

    def to_json(self) -> dict[str, Any]:
        """Plain values, without the name."""
        values = asdict(self)
        del values["name"]
        return values

    @property
    def note(self) -> str:
        """Why it was dropped, in a sentence."""
        if self.images < 2:
            return f"recovery {self.name} was dropped: it takes {2 * EVERY} images or more to judge it."
        return (
            f"recovery {self.name} was tried on {self.layers} layers and dropped: on {self.images} calibration images "
            f"that did not choose it the SQNR of the logits went from {self.before_db:.2f} to {self.after_db:.2f} dB, "
            "no clear gain."
        )


class Trials:
    """Tries one recovery after the other.

    Args:
        reference: The float network.
        source: Calibration images, shared out between those that choose and those that judge.
        progress: Told the number of recoveries judged.

    Attributes:
        choosing: The images that recoveries are made from.
        judging: Other images, which judge them, from all over the source and of each class in proportion; None where
            they would be too few.
        outcomes: What was tried.
    """

    def __init__(self, reference: nn.Module, source: ImageSource, progress: Progress = silent) -> None:
        judging = source.spread(len(source) // EVERY)
        choosing = np.setdiff1d(np.arange(len(source)), judging)
        self.choosing = source.select(choosing).subset(len(choosing))
        self.outcomes: list[Trial] = []
        self.judging = source.select(judging).subset(JUDGES) if len(judging) > 1 else None
        self._reference, self._progress = reference, progress
        self._before: Errors | None = None

    def start(self, quantized: nn.Module) -> None:
        """Take the network that the next recovery must be better than."""
        self._before = self._errors(quantized)

    def gains(self, name: str, layers: int, quantized: Callable[[], nn.Module]) -> bool:
        """Judge a recovery; if it gains, it is what the next must be better than.

        Args:
            name: One of `RECOVERIES`.
            layers: INT8 layers that it changed; with none there is nothing to judge.
            quantized: Makes the quantised network with it.
        """
        if not layers:
            return False
        self._progress(STEP, len(self.outcomes), len(self.outcomes) + 1)
        before, after = self._before, self._errors(quantized())
        kept = before is not None and after is not None and after.clearly_less_than(before)
        images = len(before) if before else 0
        before_db, after_db = (each.sqnr_db if each else 0.0 for each in (before, after))
        self.outcomes.append(
            Trial(name=name, layers=layers, kept=kept, images=images, before_db=before_db, after_db=after_db)
        )
        self._progress(STEP, len(self.outcomes), len(self.outcomes))
        if kept:
            self._before = after
        return kept

    def _errors(self, quantized: nn.Module) -> Errors | None:
        """What the network errs on the images that judge; None without them."""
        return None if self.judging is None else Errors.of(self._reference, quantized, self.judging)
