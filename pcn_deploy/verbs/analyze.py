"""The verb `analyze`: what does each layer cost when it becomes INT8?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from pcn_deploy.calibration.search.analysis import Analysis
from pcn_deploy.calibration.search.evaluation import Answers
from pcn_deploy.calibration.search.ledger import Ledger
from pcn_deploy.data.images import ImageSource
from pcn_deploy.errors import DataError
from pcn_deploy.progress import Progress, silent
from pcn_deploy.verbs.options import CompileOptions
from pcn_deploy.verbs.steps.opening import open_network
from pcn_deploy.verbs.steps.preparation import prepare_opened
from pcn_deploy.verbs.steps.sources import CalibrationImages, as_source, check_cache, check_classes, hold_out

if TYPE_CHECKING:
    from torch import nn

    from pcn_deploy.calibration.search.simulate import Simulation


SAMPLE = 128
"""Images of an analysis by default."""


def analyze(
    model: nn.Module,
    options: CompileOptions,
    calibration: CalibrationImages,
    *,
    evaluation: CalibrationImages | None = None,
    images: int = SAMPLE,
    record: Path | None = None,
    progress: Progress = silent,
) -> Analysis:
    """Measure what each layer costs when it becomes INT8: alone, with all the others, by its weights, by its input.

    Args:
        model: Network of one input `(N, C, H, W)` and one output `(N, K)`; left as it is.
        options: As for `compile`; the precision is INT8 whatever it says.
        calibration: Images for the ranges.
        evaluation: Images to measure on; the calibration images if None.
        images: Use at most so many of them, taken as the calibration images are.
        record: File in which measurements are kept while it runs, so that a killed run goes on with them; of several
            processes (`processes.join`), which share the measurements, the first keeps it.
        progress: Told the number of measurements done.

    Returns:
        The effects, ranked.

    Raises:
        DataError: If images are unusable, or `record` belongs to another run.
        ModelError: If the network cannot run, or no layer gains from INT8.
    """
    return analyze_made(
        lambda: model, options, calibration, evaluation=evaluation, images=images, record=record, progress=progress
    )


def analyze_made(
    make: Callable[[], nn.Module],
    options: CompileOptions,
    calibration: CalibrationImages,
    *,
    evaluation: CalibrationImages | None = None,
    images: int = SAMPLE,
    record: Path | None = None,
    progress: Progress = silent,
) -> Analysis:
    """As `analyze`, of a network that is made only once the images are known to be there; raises the same."""
    options = replace(options, precision="int8")
    if options.calibration_cache:
        check_cache(options.calibration_cache)
    source, _ = hold_out(calibration, options, judged=True)  # nothing is proven here
    asked = None if evaluation is None else as_source(evaluation, options)
    if asked is not None:
        asked.check_folders()
    return _measure(make(), options, source, asked, images, record, progress)


def _measure(
    model: nn.Module,
    options: CompileOptions,
    source: ImageSource,
    asked: ImageSource | None,
    images: int,
    record: Path | None,
    progress: Progress,
) -> Analysis:
    """The analysis on `images` of those that were asked to judge, or of those that calibrate."""
    from pcn_deploy.calibration.quantized import apply_scales
    from pcn_deploy.calibration.search.digests import run_digests
    from pcn_deploy.calibration.search.sensitivity import measure_sensitivity
    from pcn_deploy.calibration.search.simulate import Simulation

    opened = open_network(model, options, source)
    opened.check_labelled("analyze")
    check_classes(source, asked, options, opened.count_classes(options))
    network = prepare_opened(opened, options, source, progress)
    simulation = Simulation(network.unrounded, apply_scales(network.deployed, network.scales), network.scales)
    judged_by = source if asked is None else asked
    sample, notes = judged_by.subset(images), [*source.notes, *judged_by.notes]
    answers = _answers(simulation, sample, notes, progress, asked=asked is not None)
    notes += judged_by.notes  # what showed when they were judged
    ledger = Ledger.of_all(record, run_digests(network.deployed, network.scales, [answers]))
    kinds = {entry.op: entry.kind for entry in network.plan.entries}
    sensitivity = measure_sensitivity(simulation, kinds, answers, ledger, progress)
    ledger.remove()
    return Analysis(
        sensitivity=sensitivity,
        order=simulation.layers,
        unquantized={entry.op: entry.reason for entry in network.plan.entries if entry.precision != "int8"},
        data=judged_by.name,
        resumed=ledger.resumed,
        notes=tuple(dict.fromkeys(notes)),
    )


def _answers(
    simulation: Simulation, sample: ImageSource, notes: list[str], progress: Progress, *, asked: bool
) -> Answers:
    """What the network answers; labels that cannot be right are left out, with a note, if nobody asked for them."""
    try:
        return Answers.of(simulation.logits, sample, progress)
    except DataError as error:
        if asked or not sample.has_labels:
            raise
        notes.append(f"the labels of the calibration images are not used. {error}")
        return Answers.of(simulation.logits, sample.without_labels(), progress)
