"""Run calibration images through the deploy form and turn what the observers saw into ranges."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from pcn_deploy.calibration.cache import check_images, digest_weights, open_cache, write_cache
from pcn_deploy.calibration.calibrators import PERCENTILE, get_calibrator
from pcn_deploy.calibration.kept import read_cache
from pcn_deploy.calibration.observers import AmaxObserver, HistogramObserver
from pcn_deploy.calibration.record import Calibration, find_ranges
from pcn_deploy.calibration.statistics import Statistics
from pcn_deploy.data.images import ImageSource
from pcn_deploy.data.passes import each_batch
from pcn_deploy.data.processes import Processes, current
from pcn_deploy.errors import DataError
from pcn_deploy.models.layers import ResidualAdd
from pcn_deploy.network.hooks import hooked
from pcn_deploy.progress import Progress, silent

BATCH = 8
"""Images per forward pass, whatever the arrays they come in; of several processes, each takes whole batches."""

FEW_IMAGES = 32
"""Below this a note says that the ranges may miss what other images hold; NVIDIA's TensorRT documentation calls about
500 images enough for ImageNet networks."""


def calibrate(
    model: nn.Module,
    layers: list[str],
    source: ImageSource,
    calibrator: str,
    progress: Progress = silent,
    *,
    percentile: float = PERCENTILE,
    cache: str | Path | None = None,
    read: Callable[[Path], bytes] = read_cache,
) -> Calibration:
    """Observe the inputs of `layers` on every image of `source`, in one pass and constant memory.

    Within `distributed.join` the processes share the images, and all return what one process alone would.

    Args:
        model: The deploy form, in evaluation mode.
        layers: Names of the modules whose inputs will be quantised; of a residual addition, the identity.
        source: Calibration images.
        calibrator: One of `calibrators.CALIBRATORS`.
        progress: Told the number of images done.
        percentile: For the percentile calibrator, in percent, above 50 and at most 100.
        cache: A `.json` that keeps what is seen: written if absent; if there, its histograms are used and the images
            only read to see that they are the same.
        read: Returns the text of the cache, empty where there is none yet; `artefact.bundle.read_calibration` opens
            bundles too.

    Returns:
        The ranges and what they are bound to.

    Raises:
        DataError: If images are unusable, an activation is NaN or infinite, every input is zero, or the cache is
            damaged or was made with something else.
        OptionError: If the calibrator is unknown or its percentile out of range.
        OutputError: If the cache cannot be written.
        ProcessError: If processes disagree about what is calibrated, or one of them is lost.
    """
    get_calibrator(calibrator, percentile)
    processes, weights, path = current(), digest_weights(model), Path(cache or "")
    processes.check_equal(weights=weights, layers=layers)
    text = processes.gather(read(path) if cache and processes.first else b"")[0]
    if text:
        kept = open_cache(text, str(path), layers, weights, source)
        statistics, notes = {layer: kept.statistics[layer] for layer in layers}, kept.notes
        find_ranges(statistics, calibrator, percentile)  # before the images are read
        _check_images(kept, path, source, progress)
    else:
        observe = AmaxObserver if calibrator == "max" and not cache else HistogramObserver
        statistics, notes = _run(model, {layer: observe(layer) for layer in layers}, source, progress)
    _check_seen(statistics)
    calibration = recalibrate(_of(source, weights, statistics, notes), calibrator, percentile)
    if cache and not text and processes.first:
        write_cache(path, calibration)
    return calibration


def _of(source: ImageSource, weights: str, statistics: dict[str, Statistics], notes: tuple[str, ...]) -> Calibration:
    """What was seen of the images, without ranges yet."""
    return Calibration(
        calibrator="",
        percentile=None,
        images=len(source) - len(source.unreadable),
        unreadable=len(source.unreadable),
        source=source.name,
        weights_sha256=weights,
        dataset_sha256=source.digest,
        transform=source.transform,
        statistics=statistics,
        ranges={},
        notes=notes,
    )


def _check_images(kept: Calibration, path: Path, source: ImageSource, progress: Progress) -> None:
    """Read the images to see that they are those of the cache."""
    for _ in each_batch(source, BATCH, "Reading images", progress, shared=True):
        pass
    check_images(kept, str(path), source)


def _check_seen(statistics: dict[str, Statistics]) -> None:
    if statistics and not any(seen.amax for seen in statistics.values()):
        msg = (
            f"The inputs of all {len(statistics)} layers are zero on every image: there is nothing to calibrate. "
            "Check the images and the weights, or build without 8 bits."
        )
        raise DataError(msg)


def recalibrate(seen: Calibration, calibrator: str, percentile: float = PERCENTILE) -> Calibration:
    """Ranges of another calibrator from the same histograms, without a new pass.

    Raises:
        DataError: If no histograms were kept.
        OptionError: If the calibrator is unknown or its percentile out of range.
    """
    return replace(
        seen,
        calibrator=calibrator,
        percentile=percentile if calibrator == "percentile" else None,
        ranges=find_ranges(seen.statistics, calibrator, percentile),
    )


def _run(
    model: nn.Module, observers: dict[str, AmaxObserver], source: ImageSource, progress: Progress
) -> tuple[dict[str, Statistics], tuple[str, ...]]:
    """What all processes saw, and what the user should know of the images."""
    varied = _observe(model, observers, source, progress)
    statistics = _merge({layer: each.statistics() for layer, each in observers.items()}, current())
    return statistics, _notes(source, varied=bool(current().max(np.array([float(varied)]))[0]))


def _observe(model: nn.Module, observers: dict[str, AmaxObserver], source: ImageSource, progress: Progress) -> bool:
    """Run this process's share of the images; returns whether any of them was more than a plain colour."""

    def hook(observer: AmaxObserver) -> Any:
        def observe(module: nn.Module, inputs: tuple[torch.Tensor, ...], named: dict[str, torch.Tensor]) -> None:
            if isinstance(module, ResidualAdd):
                observer.observe(inputs[1])
            else:
                observer.observe(inputs[0] if inputs else named["input"])

        return observe

    handles = (
        model.get_submodule(path).register_forward_pre_hook(hook(observer), with_kwargs=True)
        for path, observer in observers.items()
    )
    varied = False

    with hooked(handles), torch.inference_mode():
        for images, _ in each_batch(source, BATCH, "Calibrating", progress, shared=True):
            varied = varied or bool((images.max((2, 3)) != images.min((2, 3))).any())
            model(torch.tensor(images))
    return varied


def _merge(statistics: dict[str, Statistics], processes: Processes) -> dict[str, Statistics]:
    """Statistics of all processes, equal to the bit to those of one."""
    if processes.count == 1 or not statistics:
        return statistics
    amax = processes.max(np.array([seen.amax for seen in statistics.values()]))
    own = [seen.widened(float(largest)) for seen, largest in zip(statistics.values(), amax, strict=True)]
    counts = processes.sum(np.stack([seen.counts for seen in own]))
    return {
        path: Statistics(seen.amax, total, seen.width)
        for path, seen, total in zip(statistics, own, counts, strict=True)
    }


def _notes(source: ImageSource, *, varied: bool) -> tuple[str, ...]:
    """What the user should know of the images."""
    read = source.fingerprints[source.fingerprints.any(axis=1)]
    count = len(read)
    notes = []
    if count < FEW_IMAGES:
        images = "1 image" if count == 1 else f"{count} images"
        notes.append(f"only {images}: the ranges are guesses about all others; give a few hundred.")
    if not varied:
        notes.append("every calibration image is of one plain colour: the ranges say nothing about real images.")
    elif count > 1 and len(np.unique(read, axis=0)) == 1:
        notes.append(f"all {count} calibration images are equal: they tell no more than one.")
    return tuple(notes)
