"""Accuracy recovery without training: what is done to a network around calibration so that INT8 costs less.

The order is that of `RECOVERIES`, whatever the order they are asked for in; a build keeps each only if it gains on
images that did not choose it (`trial.py`). Those before calibration leave the float network's function as it is; those
after it know the scales and change weights and biases of INT8 layers only.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import TYPE_CHECKING

from pcn_deploy.errors import OptionError
from pcn_deploy.progress import Progress, silent

if TYPE_CHECKING:
    from torch import nn

    from pcn_deploy.calibration.quantized import Quantization
    from pcn_deploy.data.images import ImageSource

BEFORE = ("equalisation", "smoothquant")
AFTER = ("weight-rounding", "bias-correction")
RECOVERIES = BEFORE + AFTER

Gains = Callable[[str, int, "nn.Module"], bool]
"""Whether a recovery is kept, by its name, the layers it changed and the network with it."""


def always(_name: str, _layers: int, _changed: nn.Module) -> bool:
    """Keep every recovery."""
    return True


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
    gains: Gains = always,
) -> tuple[nn.Module, dict[str, int]]:
    """Apply what comes before calibration.

    Args:
        deployed: The deploy form, in evaluation mode; left as it is.
        layers: Names of the layers that will be INT8.
        source: Calibration images.
        names: Which of `RECOVERIES`; those of `AFTER` are passed over.
        progress: Told how far each step is.
        gains: Asked about each recovery that changed something whether it is kept.

    Returns:
        A network of the same function, which shares the weights that did not change, and by name how many INT8
        layers each recovery changed; 0 for one that was not kept.
    """
    from pcn_deploy.calibration.recovery.equalisation import equalise
    from pcn_deploy.calibration.recovery.smoothquant import smooth

    steps = {
        "equalisation": lambda network: equalise(network, layers, source, progress),
        "smoothquant": lambda network: smooth(network, layers, source, progress),
    }
    return _apply(deployed, {name: steps[name] for name in BEFORE if name in names}, gains)


def apply_after(
    deployed: nn.Module,
    scales: dict[str, Quantization],
    source: ImageSource,
    names: Collection[str],
    progress: Progress = silent,
    gains: Gains = always,
) -> tuple[nn.Module, dict[str, int]]:
    """Apply what comes after calibration.

    Args:
        deployed: The deploy form, in evaluation mode; left as it is.
        scales: Scales of the INT8 layers, from `plan_scales`; they hold for the result too, where the weights already
            lie on their grid.
        source: Calibration images.
        names: Which of `RECOVERIES`; those of `BEFORE` are passed over.
        progress: Told how far each step is.
        gains: Asked about each recovery that changed something whether it is kept.

    Returns:
        The network to be quantised, which shares the weights that did not change, and by name how many INT8 layers
        each recovery changed; 0 for one that was not kept.
    """
    from pcn_deploy.calibration.recovery.bias_correction import correct_bias
    from pcn_deploy.calibration.recovery.weight_rounding import round_weights

    steps = {
        "weight-rounding": lambda network: round_weights(network, scales, source, progress),
        "bias-correction": lambda network: correct_bias(network, scales, source, deployed, progress),
    }
    return _apply(deployed, {name: steps[name] for name in AFTER if name in names}, gains)


def _apply(
    network: nn.Module, steps: dict[str, Callable[[nn.Module], int]], gains: Gains
) -> tuple[nn.Module, dict[str, int]]:
    """One step after the other, each on a copy of what the steps before it left, which is kept if it gains."""
    from pcn_deploy.network.sharing import share_weights

    counts: dict[str, int] = {}
    for name, step in steps.items():
        candidate = share_weights(network)
        counts[name] = step(candidate)
        if counts[name] and gains(name, counts[name], candidate):
            network = candidate
        else:
            counts[name] = 0
    return network, counts
