"""The calibrator that costs this network least: every one is tried on calibration images, from the same histograms.

The default stays unless another gains clearly: these images are few, and the ranges were made of them. On the drawn
shapes the best of four by 64 calibration images was 1.1 dB behind the default on unseen ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from torch import nn

from pcn_deploy.calibration.calibrators import calibrators_of
from pcn_deploy.calibration.collect import recalibrate
from pcn_deploy.calibration.paired import Errors
from pcn_deploy.calibration.plan.rules import PrecisionPlan
from pcn_deploy.calibration.quantized import apply_scales, plan_scales
from pcn_deploy.calibration.record import Calibration
from pcn_deploy.data.images import ImageSource
from pcn_deploy.data.processes import current
from pcn_deploy.progress import Progress, silent

IMAGES = 64
"""Images that judge, at most, taken from all over the calibration images (`ImageSource.spread`)."""
GAIN_DB = 1.0
"""Least gain of SQNR over the default calibrator for which another is taken."""
STEP = "Choosing the calibrator"


def choose_calibrator(
    deployed: nn.Module,
    plan: PrecisionPlan,
    seen: Calibration,
    source: ImageSource,
    *,
    percentile: float,
    weight_calibrator: str,
    progress: Progress = silent,
) -> Calibration:
    """Take the ranges with the largest SQNR of the first output; the default's unless others clearly gain `GAIN_DB`.

    Args:
        deployed: The deploy form.
        plan: A plan whose ranges are still to be filled in.
        seen: A calibration with histograms.
        source: Calibration images.
        percentile: That of the percentile calibrator.
        weight_calibrator: One of `WEIGHT_CALIBRATORS`.
        progress: Told the number of calibrators tried.

    Returns:
        The calibration by the calibrator chosen, with a note that holds the SQNR of each.

    Raises:
        DataError: If no histograms were kept.
    """

    def quantized(candidate: Calibration) -> nn.Module:
        planned = plan.with_ranges(candidate.ranges)
        return apply_scales(deployed, plan_scales(deployed, planned, weight_calibrator))

    return take_best(deployed, quantized, seen, source, percentile=percentile, progress=progress)


def take_best(
    reference: nn.Module,
    quantized: Callable[[Calibration], nn.Module],
    seen: Calibration,
    source: ImageSource,
    *,
    percentile: float,
    names: Sequence[str] = calibrators_of("int8"),
    progress: Progress = silent,
) -> Calibration:
    """As `choose_calibrator`, for whatever network is made from the ranges.

    Args:
        reference: The float network.
        quantized: Makes the quantised network.
        seen: A calibration with histograms.
        source: Images that judge.
        percentile: That of the percentile calibrator.
        names: Calibrators to try, the default first.
        progress: Told the number of calibrators tried.
    """
    tried: dict[str, tuple[Errors, Calibration]] = {}
    for done, name in enumerate(names):
        progress(STEP, done, len(names))
        candidate = recalibrate(seen, name, percentile)
        tried[name] = (Errors.of(reference, quantized(candidate), source.subset(IMAGES)), candidate)
    progress(STEP, len(names), len(names))
    default = tried[names[0]][0]
    better = {
        name: errors.sqnr_db
        for name, (errors, _) in tried.items()
        if errors.sqnr_db >= default.sqnr_db + GAIN_DB and errors.clearly_less_than(default)
    }
    chosen = max(better, key=better.__getitem__, default=names[0])
    chosen = current().gather(chosen.encode())[0].decode()  # on another host the last digits may differ
    figures = ", ".join(f"{name} {errors.sqnr_db:.1f}" for name, (errors, _) in tried.items())
    note = f"calibrator {chosen} was chosen by the SQNR of the logits, in dB: {figures}"
    note += "." if better else f"; another must gain {GAIN_DB:g} dB, clearly."
    return replace(tried[chosen][1], notes=(*seen.notes, note))
