"""What is still parity: the limits of each precision, justified in docs/parity.md. Standard library only."""

from __future__ import annotations

import math
from dataclasses import astuple, dataclass

from pcn_deploy.errors import OptionError

CHANGES_DB, LESS_DB = 6.0, 20.0
"""Least SQNR of the changes: so much less than that of the logits, since the priors of classes may be larger than what
images change; in every precision half the amplitude of that."""

GUARD_DB = {"fp32": 20.0}
"""How much more SQNR than its budget a golden set must have where a CPU executes the graph: right graphs have 110 dB
there, and few images must tell of a wrong one. A GPU may round FP32 to fewer bits."""

TOLERATED = 1.0
"""Percent of the images of a large set, at most, whose cosine may be below the limit."""


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

    def __post_init__(self) -> None:
        if not all(map(math.isfinite, astuple(self))):
            msg = f"{self}: a limit that is not finite would let everything pass."
            raise OptionError(msg)


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


def changes_limit(budget: ParityBudget) -> float:
    """Least SQNR, in dB, of what the images change: 40 of FP32, 20 of FP16, 6 of BF16 and 8 bits by default."""
    return min(max(CHANGES_DB, budget.sqnr_db - LESS_DB), budget.sqnr_db)
