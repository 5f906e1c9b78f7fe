"""Run calibration images through the deploy form and turn what the observers saw into ranges."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from pcn_deploy.calibration.calibrators import get_calibrator
from pcn_deploy.calibration.images import ImageSource
from pcn_deploy.calibration.observers import AmaxObserver, HistogramObserver
from pcn_deploy.models.layers import ResidualAdd
from pcn_deploy.progress import Progress, silent

BATCH = 8
"""Images per forward pass; the ranges do not depend on it."""


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """The outcome of a calibration, as `calibration.json` holds it.

    Attributes:
        calibrator: Name of the calibrator.
        images: Number of images seen.
        unreadable: Number of image files that could not be read.
        source: Where the images came from.
        dataset_sha256: Digest over the transformed images, in order.
        ranges: Calibrated amax of the input of each observed layer.
        amax: Largest magnitude seen there.
        recovery: How many INT8 layers each recovery changed, by its name; empty without recovery.
    """

    calibrator: str
    images: int
    unreadable: int
    source: str
    dataset_sha256: str
    ranges: dict[str, float]
    amax: dict[str, float]
    recovery: dict[str, int] = field(default_factory=dict)


def calibrate(
    model: nn.Module,
    layers: list[str],
    source: ImageSource,
    calibrator: str,
    progress: Progress = silent,
) -> Calibration:
    """Observe the inputs of `layers` on every image of `source`, in one pass and constant memory.

    Args:
        model: The deploy form, in evaluation mode.
        layers: Names of the modules whose inputs will be quantised; of a residual addition, the identity.
        source: Calibration images.
        calibrator: One of `calibrators.CALIBRATORS`.
        progress: Told the number of images done.

    Returns:
        The ranges and where they come from.

    Raises:
        DataError: If images are unusable, or an activation is NaN or infinite.
        OptionError: If the calibrator is unknown.
    """
    to_range = get_calibrator(calibrator)
    kind = AmaxObserver if calibrator == "max" else HistogramObserver
    observers = {path: kind(path) for path in layers}
    images = _observe(model, observers, source, progress)
    statistics = {path: observer.statistics() for path, observer in observers.items()}
    return Calibration(
        calibrator=calibrator,
        images=images,
        unreadable=len(source.unreadable),
        source=source.name,
        dataset_sha256=source.digest,
        ranges={path: to_range(seen) if seen.amax > 0 else 0.0 for path, seen in statistics.items()},
        amax={path: seen.amax for path, seen in statistics.items()},
    )


def _observe(model: nn.Module, observers: dict[str, AmaxObserver], source: ImageSource, progress: Progress) -> int:
    def hook(observer: AmaxObserver) -> Any:
        def observe(module: nn.Module, inputs: tuple[torch.Tensor, ...], named: dict[str, torch.Tensor]) -> None:
            if isinstance(module, ResidualAdd):
                observer.observe(inputs[1])
            else:
                observer.observe(inputs[0] if inputs else named["input"])

        return observe

    handles = [
        model.get_submodule(path).register_forward_pre_hook(hook(observer), with_kwargs=True)
        for path, observer in observers.items()
    ]
    done = 0
    progress("Calibrating", 0, len(source), "images")
    try:
        with torch.inference_mode():
            for images, _ in source.batches(BATCH):
                model(torch.from_numpy(images))
                done += len(images)
                progress("Calibrating", done, len(source), "images")
    finally:
        for handle in handles:
            handle.remove()
    progress("Calibrating", len(source), len(source), "images")
    return done
