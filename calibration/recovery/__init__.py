"""Accuracy recovery without training: what is done to a network around calibration so that INT8 costs less.

The order is that of `RECOVERIES`, whatever the order they are asked for in. Those before calibration leave the float
network's function as it is; those after it know the scales and change weights and biases of INT8 layers only.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from pcn_deploy.errors import OptionError
from pcn_deploy.progress import Progress, silent

if TYPE_CHECKING:
    from torch import nn

    from pcn_deploy.calibration.images import ImageSource
    from pcn_deploy.calibration.quantized import Quantization

BEFORE = ("equalisation", "smoothquant")
AFTER = ("weight-rounding", "bias-correction")
RECOVERIES = BEFORE + AFTER


def check_recovery(names: Collection[str]) -> None:
    """Refuse names that are not in `RECOVERIES`.

    Raises:
        OptionError: If a name is unknown.
    """
    unknown = [name for name in names if name not in RECOVERIES]
    if unknown:
        msg = f"Unknown recovery {', '.join(map(repr, unknown))}; known are {', '.join(RECOVERIES)}."
        raise OptionError(msg)


def apply_before(
    deployed: nn.Module,
    layers: Collection[str],
    source: ImageSource,
    names: Collection[str],
    progress: Progress = silent,
) -> tuple[nn.Module, dict[str, int]]:
    """Apply what comes before calibration.

    Args:
        deployed: The deploy form, in evaluation mode; left as it is.
        layers: Names of the layers that will be INT8.
        source: Calibration images.
        names: Which of `RECOVERIES`; those of `AFTER` are passed over.
        progress: Told how far each step is.

    Returns:
        A network of the same function, which shares the weights that did not change, and by name how many INT8
        layers each recovery changed.
    """
    from pcn_deploy.calibration.recovery.equalisation import equalise
    from pcn_deploy.calibration.recovery.smoothquant import smooth
    from pcn_deploy.models.sharing import share_weights

    steps = {"equalisation": equalise, "smoothquant": smooth}
    chosen = [name for name in BEFORE if name in names]
    changed = share_weights(deployed) if chosen else deployed
    return changed, {name: steps[name](changed, layers, source, progress) for name in chosen}


def apply_after(
    deployed: nn.Module,
    scales: dict[str, Quantization],
    source: ImageSource,
    names: Collection[str],
    progress: Progress = silent,
) -> tuple[nn.Module, dict[str, int]]:
    """Apply what comes after calibration.

    Args:
        deployed: The deploy form, in evaluation mode; left as it is.
        scales: Scales of the INT8 layers, from `plan_scales`; they hold for the result too, where the weights already
            lie on their grid.
        source: Calibration images.
        names: Which of `RECOVERIES`; those of `BEFORE` are passed over.
        progress: Told how far each step is.

    Returns:
        The network to be quantised, which shares the weights that did not change, and by name how many INT8 layers
        each recovery changed.
    """
    from pcn_deploy.calibration.recovery.bias_correction import correct_bias
    from pcn_deploy.calibration.recovery.weight_rounding import round_weights
    from pcn_deploy.models.sharing import share_weights

    chosen = [name for name in AFTER if name in names]
    changed = share_weights(deployed) if chosen else deployed
    counts: dict[str, int] = {}
    if "weight-rounding" in chosen:
        counts["weight-rounding"] = round_weights(changed, scales, source, progress)
    if "bias-correction" in chosen:
        counts["bias-correction"] = correct_bias(changed, scales, source, deployed, progress)
    return changed, counts
