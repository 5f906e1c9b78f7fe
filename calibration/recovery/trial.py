"""Whether a recovery gains: asked on images that did not choose it, and kept only if it clearly does."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from pcn_deploy.calibration.collect import BATCH
from pcn_deploy.data.images import ImageSource
from pcn_deploy.progress import Progress, silent

EVERY = 4
"""Of so many calibration images, one judges and the others choose."""
JUDGES = 128
"""Images that judge, at most."""
CLEARLY = 1.645
"""Standard errors by which the mean gain must be above 0: chance alone does so in 5 of 100 cases."""
STEP = "Judging recovery"

Errors = npt.NDArray[np.float64]


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
        found: What was tried.
    """

    def __init__(self, reference: nn.Module, source: ImageSource, progress: Progress = silent) -> None:
        judging = source.spread(len(source) // EVERY)
        choosing = np.setdiff1d(np.arange(len(source)), judging)
        self.choosing = source.select(choosing).subset(len(choosing))
        self.found: list[Trial] = []
        self.judging = source.select(judging).subset(JUDGES) if len(judging) > 1 else None
        self._reference, self._progress = reference, progress
        self._before: tuple[Errors, Errors] | None = None

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
        self._progress(STEP, len(self.found), len(self.found) + 1)
        before, after = self._before, self._errors(quantized())
        kept = before is not None and after is not None and _clearly_less(before, after)
        images = len(before[0]) if before else 0
        decibels = (_sqnr_db(before), _sqnr_db(after))
        self.found.append(
            Trial(name=name, layers=layers, kept=kept, images=images, before_db=decibels[0], after_db=decibels[1])
        )
        self._progress(STEP, len(self.found), len(self.found))
        if kept:
            self._before = after
        return kept

    def _errors(self, quantized: nn.Module) -> tuple[Errors, Errors] | None:
        """Squared error of the logits and of nothing (their square) per image, `(N,)` each; None without judges."""
        if self.judging is None:
            return None
        errors, squares = [], []
        with torch.inference_mode():
            for images, _ in self.judging.batches(BATCH):
                expected, found = (_logits(net, torch.tensor(images)) for net in (self._reference, quantized))
                errors.append((found - expected).square().sum(1))
                squares.append(expected.square().sum(1))
        return torch.cat(errors).numpy(), torch.cat(squares).numpy()


def _logits(network: nn.Module, images: Tensor) -> Tensor:
    outputs: Any = network(images)
    logits: Tensor = outputs if isinstance(outputs, Tensor) else outputs[0]
    return logits.flatten(1).double()


def _sqnr_db(judged: tuple[Errors, Errors] | None) -> float:
    if judged is None:
        return 0.0
    errors, squares = judged
    return 10 * math.log10(max(float(squares.sum()), 1e-300) / max(float(errors.sum()), 1e-300))


def _clearly_less(before: tuple[Errors, Errors], after: tuple[Errors, Errors]) -> bool:
    """Whether the error is less in sum, and so is that of the typical image: by more than chance, in dB per image."""
    tiny = 1e-12 * float(before[1].mean()) + 1e-300
    per_image = 10 * np.log10((before[0] + tiny) / (after[0] + tiny))
    error = float(per_image.std(ddof=1)) / math.sqrt(len(per_image))
    return float(after[0].sum()) < float(before[0].sum()) and float(per_image.mean()) > CLEARLY * error
