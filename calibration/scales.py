"""From a range to the scale that a graph holds. numpy only."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from pcn_deploy.calibration.plan.rules import CODES, PrecisionPlan
from pcn_deploy.errors import DataError

Floats = npt.NDArray[np.float32]


def stored_scales(scales: Floats, path: str, remainder: str) -> Floats:
    """Scales as the graph holds them: above 0, finite, and in FP16 where the rest of the graph is.

    Args:
        scales: float32, any shape.
        path: The layer, for messages.
        remainder: Type of the graph outside Q/DQ.

    Raises:
        DataError: If a scale is beyond the type it is stored in.
    """
    scales = np.maximum(scales, np.finfo(np.float32).tiny)
    if remainder != "fp16":
        return scales
    if scales.max() > np.finfo(np.float16).max:
        msg = (
            f"{path} needs a scale of {scales.max():.3g}, beyond FP16: its values are too large. "
            "Build with --remainder fp32, or mend the weights."
        )
        raise DataError(msg)
    return round_up_to_fp16(scales)


def round_up_to_fp16(scales: Floats) -> Floats:
    """The smallest FP16 value above 0 that is not below each scale, so that nothing is clipped by the rounding."""
    rounded = scales.astype(np.float16)
    rounded = np.where(rounded < scales, np.nextafter(rounded, np.float16(np.inf)), rounded)
    return rounded.astype(np.float32)


def input_scale(amax: float, codes: str, path: str, remainder: str) -> float:
    """Scale of the activation codes of a layer.

    Args:
        amax: Magnitude that the largest code stands for.
        codes: One of `plan.CODES`.
        path: The layer, for messages.
        remainder: Type of the graph outside Q/DQ.

    Raises:
        DataError: If it is beyond the type it is stored in.
    """
    return float(stored_scales(np.array([np.float32(amax) / np.float32(CODES[codes])]), path, remainder)[0])


def input_scales(plan: PrecisionPlan) -> dict[str, float]:
    """Scale of the activation codes of every quantised layer of a plan with ranges, by the name of the layer."""
    return {
        path: input_scale(entry.input_amax, entry.precision, path, plan.remainder)
        for path, entry in plan.quantized_entries.items()
        if entry.input_amax is not None
    }
