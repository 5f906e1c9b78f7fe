"""What a precision can tell of what the images change, and what is asked of an engine in it. numpy only.

What the images change may be tiny beside what they all have in common, such as a large constant in the logits. Then an
engine that is right may miss it, since its rounding is larger; but so may a wrong one. How much of it the network
itself loses in float32 is measured, against float64, when a bundle is built, and kept in its golden set; what an
8-bit graph loses, its simulation tells.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pcn_deploy.tasks.limits import ParityBudget, changes_limit
from pcn_deploy.tasks.metrics import alike, sqnr_db

_NATURAL_DB = {"fp32": 80.0, "fp16": 60.0, "bf16": 42.0, "int8": 60.0, "fp8": 60.0}
"""SQNR that rounding leaves of the logits, less some for deep networks: right engines have 110 dB in FP32, 65 to 74 in
FP16 and 18 dB less in BF16. What images change less than that, a precision cannot tell; 8-bit engines as FP16."""

ORDER_DB = 15.0
"""How much further apart two libraries may be than one of them is from float64: plain sums err more than pairwise ones,
8 dB more in a variance that is taken as E[x^2] - E[x]^2 by both."""

ALIKE_DB = -15.0
"""Images whose pixels change less than this, relative to their power, hardly differ: noise of 3 of 255 on one scene has
-26 dB, photographs -3 to 0 dB."""

ALIKE = (
    "the images hardly differ to the network, less than its precision can tell apart: the accuracy on what they change "
    "was not judged. Give more varied images."
)
"""Note of a report whose SQNR of the changes is low, and no failure."""

CONSTANT = (
    "NOTHING WAS JUDGED BUT A CONSTANT: the network answers the same to every image, as with a head whose weights are "
    "zero, or with a constant so large that float32 loses the rest. Load trained weights, or take the constant off."
)
SAME = (
    "NOTHING WAS JUDGED BUT ONE ANSWER: all images are the same, so nothing tells whether the engine looks at them. "
    "Give images that differ."
)


@dataclass(frozen=True, kw_only=True)
class NoiseFloor:
    """What rounding leaves of what the images change.

    Attributes:
        natural_db: SQNR of the differences that rounding leaves anyway, by experience: an engine with as much, or
            changes smaller than that, is excused where nothing was measured. Minus infinity where the images hardly
            differ themselves.
        power: Of the noise in the logits of an image that a right engine has beside the network, as measured; NaN if
            unknown.
        exact: Whether the execution rounds as the network itself does, so that what is measured is all that is excused.
    """

    natural_db: float = math.inf
    power: float = math.nan
    exact: bool = False

    @property
    def nothing(self) -> str:
        """Note where the images change nothing at all."""
        return SAME if self.natural_db == -math.inf else CONSTANT

    def failures(self, noise: float) -> list[str]:
        """What is wrong with an engine whose images all have one answer, with noise of so much power in each."""
        if not (self.exact and noise > self.power * 10 ** (ORDER_DB / 10)):
            return []
        far = sqnr_db(noise, self.power)
        return [
            f"the network answers the same to every image, and the engine is {far:.0f} dB more off it than rounding"
        ]

    def judges_noise(self) -> bool:
        """Whether even images that are noise tell of an engine what they change."""
        return self.exact and not math.isnan(self.power)

    def kept_db(self, changes: float) -> float:
        """SQNR of what an image changes, of that power on average, in a right engine; NaN if unknown."""
        return math.nan if math.isnan(self.power) else sqnr_db(changes, self.power)

    def least_changes_db(self, metrics: dict[str, float], budget: ParityBudget) -> float:
        """Least SQNR, in dB, of what the images change; minus infinity where that is not judged.

        Args:
            metrics: Of a meter, with `changes_kept_db` where that is known.
            budget: What is still parity.
        """
        least, kept = changes_limit(budget), metrics.get("changes_kept_db", math.nan)
        if self.exact and not math.isnan(kept):
            return min(least, kept - ORDER_DB)
        changes = metrics.get("sqnr_changes_db", math.inf)
        differences = metrics.get("sqnr_differences_db", metrics.get("sqnr_db", math.inf))
        excused = differences >= self.natural_db or changes - differences < -self.natural_db
        return -math.inf if excused and not kept >= least else least

    def notes(self, metrics: dict[str, float], budget: ParityBudget, least: float) -> tuple[str, ...]:
        """What has to be known of a comparison that asked for `least` dB of the changes.

        Args:
            metrics: Of a meter.
            budget: What is still parity.
            least: As `least_changes_db` has it.
        """
        if least == -math.inf:
            return (ALIKE,) if metrics.get("sqnr_changes_db", math.inf) < changes_limit(budget) else ()
        if least < changes_limit(budget):
            return (
                "what the images change is tiny beside what all of them have in common: the network itself keeps "
                f"{metrics['changes_kept_db']:.0f} dB of it in float32, by a run in float64, so no engine was asked "
                f"for more than {least:.0f} dB. Take large constants off the logits, or give more varied images.",
            )
        return ()


UNMEASURED = NoiseFloor()
"""Where nothing excuses an engine."""


def natural_db(images: npt.NDArray[np.float32], precision: str) -> float:
    """The SQNR from which on an engine need not tell images apart: none where they hardly differ themselves.

    Args:
        images: `(N, C, H, W)`, transformed.
        precision: Of the engine.
    """
    return -math.inf if alike(images, ALIKE_DB) else _NATURAL_DB[precision]
