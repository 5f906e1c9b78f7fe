"""From a network to what is built: the deploy form, the precision of every layer, and the scales of INT8."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from pcn_deploy.artefact.bundle import read_calibration
from pcn_deploy.calibration.calibrators import AUTO, calibrators_of
from pcn_deploy.calibration.plan.rules import make_plan
from pcn_deploy.calibration.recovery import BEFORE, apply_after, apply_before
from pcn_deploy.data.images import ImageSource
from pcn_deploy.errors import DataError, ModelError
from pcn_deploy.progress import Progress
from pcn_deploy.verbs.options import CompileOptions
from pcn_deploy.verbs.steps.opening import Opened, open_network
from pcn_deploy.verbs.steps.prepared import Prepared
from pcn_deploy.verbs.steps.sources import NO_IMAGES, synthetic_images, two_images

if TYPE_CHECKING:
    from torch import nn

    from pcn_deploy.calibration.plan.magnitudes import Magnitudes
    from pcn_deploy.calibration.plan.rules import LayerFacts, PrecisionPlan
    from pcn_deploy.calibration.quantized import Quantization
    from pcn_deploy.calibration.record import Calibration
    from pcn_deploy.calibration.recovery.trial import Trials
    from pcn_deploy.graph.export import Exported

REWRITING = "Rewriting and planning"


def prepare(
    model: nn.Module,
    options: CompileOptions,
    source: ImageSource | None,
    progress: Progress,
    *,
    exporting: bool = False,
) -> Prepared:
    """Open a network, and prepare it; as `open_network` and `prepare_opened`."""
    return prepare_opened(open_network(model, options, source), options, source, progress, exporting=exporting)


def prepare_opened(
    opened: Opened,
    options: CompileOptions,
    source: ImageSource | None,
    progress: Progress,
    *,
    exporting: bool = False,
) -> Prepared:
    """Rewrite a network, plan the precision of its layers and calibrate what becomes INT8.

    Args:
        opened: The network; left as it is.
        options: What to build.
        source: Calibration images; needed for INT8 layers whose range no recipe gives.
        progress: Told how far each step is.
        exporting: Whether a graph will be made of it: then it is exported first, so that a network that cannot be is
            refused before the long steps.

    Raises:
        CheckpointError: If weights are NaN or infinite.
        DataError: If images are unusable.
        ModelError: If the network cannot run at this resolution, is no function of the image, or cannot be exported.
    """
    from pcn_deploy.calibration.quantized import plan_scales

    made = _rewrite(opened, options, two_images(options, source), progress, exporting=exporting)
    plan, magnitudes = _plan(made.network, made.layers, options, source)
    progress(REWRITING, 4, 4)
    deployed, recovered, notes = made.complete, dict[str, int](), (*opened.notes, *made.notes)
    trials = _trials(made.network, source, options.recovery, progress)
    if trials is not None:
        network, recovered = _recover_before(made.network, plan, options, trials, progress)
        if any(recovered.values()):  # other weights, other magnitudes
            plan, magnitudes = _plan(network, made.layers, options, source)
            deployed = _with_outputs(network, options)
    _check_plan(plan, options, calibrates=source is not None)
    plan, seen = _calibrate(deployed, plan, options, source, progress)
    scales = plan_scales(deployed, plan, options.weight_calibrator)
    rounded = deployed
    if trials is not None:
        rounded, after = _recover_after(deployed, scales, options.recovery, trials, progress)
        recovered |= after
        notes += tuple(trial.note for trial in trials.outcomes if not trial.kept)
    return Prepared(
        name=type(opened.model).__name__,
        outputs=opened.outputs,
        deployed=rounded,
        exported=made.exported,
        unrounded=deployed,
        layers=tuple(made.layers),
        plan=plan,
        scales=scales,
        calibration=seen,
        recovered=recovered,
        trials=tuple(trials.outcomes) if trials else (),
        rewrites=made.rewrites,
        magnitudes=magnitudes,
        notes=notes,
    )


@dataclass(frozen=True, kw_only=True)
class _Rewritten:
    """A deploy form before its precision is planned.

    Attributes:
        network: It, with the outputs that the network has of itself.
        complete: It, with all outputs that are built.
        exported: Its float graph, where one was asked for.
        layers: What was seen of its layers.
        rewrites: How many places each rewrite changed.
        notes: What the user should know of the network at this resolution.
    """

    network: nn.Module
    complete: nn.Module
    exported: Exported | None
    layers: list[LayerFacts]
    rewrites: dict[str, int]
    notes: tuple[str, ...]


def _rewrite(
    opened: Opened, options: CompileOptions, images: npt.NDArray[np.float32], progress: Progress, *, exporting: bool
) -> _Rewritten:
    """Check the network, bring it into its deploy form and look at its layers, on two images `(2, C, H, W)`."""
    import torch

    from pcn_deploy.calibration.plan.facts import note_hidden_products, survey
    from pcn_deploy.graph.export import export_network
    from pcn_deploy.models.attention_conv import note_stretched
    from pcn_deploy.models.checkpoint import check_finite
    from pcn_deploy.models.layers import check_resolution
    from pcn_deploy.network.deploy import to_deploy
    from pcn_deploy.network.preconditions import check_behaviour

    model = opened.model
    check_finite(model.state_dict(), "The network")
    check_resolution(model, *options.transform.resolution)
    progress(REWRITING, 0, 4)
    pair = torch.from_numpy(images)
    check_behaviour(model, pair, batched=options.batch.max > 1)
    progress(REWRITING, 1, 4)
    network, rewrites = to_deploy(model, pair[:1])
    progress(REWRITING, 2, 4)
    complete = _with_outputs(network, options)
    exported = None
    if exporting:
        exported = export_network(complete, options.transform.shape, options.batch, outputs=opened.outputs)
    progress(REWRITING, 3, 4)
    layers, hidden = survey(network, pair[:1].clone(), places=options.quantizes)
    notes = note_stretched(network, options.transform.shape)
    if options.quantizes:
        notes += note_hidden_products(hidden, options.graph_type)
    return _Rewritten(
        network=network, complete=complete, exported=exported, layers=layers, rewrites=rewrites, notes=notes
    )


def _with_outputs(network: nn.Module, options: CompileOptions) -> nn.Module:
    """A deploy form with all outputs that are built."""
    from pcn_deploy.network.attention_map import output_attention_map

    return output_attention_map(network, options.transform.shape) if options.with_attention_map else network


def _check_plan(plan: PrecisionPlan, options: CompileOptions, *, calibrates: bool) -> None:
    """Refuse a plan with which there would be nothing in 8 bits, or no range for what is.

    Args:
        plan: The plan.
        options: What was asked for.
        calibrates: Whether there are calibration images.
    """
    if options.quantizes and not plan.quantized_entries:
        codes = options.precision.upper()
        floats = f"--precision {options.graph_type}"
        msg = f"The plan leaves no layer in {codes}. Build it with {floats}, or put layers in it in the recipe."
        raise ModelError(msg)
    missing = plan.without_range
    if missing and not calibrates:
        msg = f"The recipe gives no range for {len(missing)} quantised layers, such as {missing[0]}. {NO_IMAGES}"
        raise DataError(msg)


def _calibrate(
    deployed: nn.Module,
    plan: PrecisionPlan,
    options: CompileOptions,
    source: ImageSource | None,
    progress: Progress,
) -> tuple[PrecisionPlan, Calibration | None]:
    """The plan with a range for every layer that needs one, and what was seen to find them, if anything."""
    from pcn_deploy.calibration.auto import choose_calibrator
    from pcn_deploy.calibration.collect import calibrate

    missing = plan.without_range
    if not missing or source is None:
        return plan, None
    automatic = options.calibrator == AUTO
    seen = calibrate(
        deployed,
        missing,
        source,
        calibrators_of(options.precision)[0] if automatic else options.calibrator,
        progress,
        percentile=options.percentile,
        cache=options.calibration_cache,
        read=read_calibration,
    )
    if automatic:
        seen = choose_calibrator(
            deployed,
            plan,
            seen,
            source,
            percentile=options.percentile,
            weight_calibrator=options.weight_calibrator,
            progress=progress,
        )
    return plan.with_ranges(seen.ranges), seen


def _trials(
    network: nn.Module, source: ImageSource | None, recovery: tuple[str, ...], progress: Progress
) -> Trials | None:
    """What judges the recoveries that are asked for, if any.

    Raises:
        DataError: If there are no images that could.
    """
    if not recovery:
        return None
    if source is None:
        msg = f"Recovery {', '.join(recovery)} needs calibration images, also where a recipe has the ranges."
        raise DataError(msg)
    from pcn_deploy.calibration.recovery.trial import Trials

    return Trials(network, source, progress)


def _recover_before(
    network: nn.Module, plan: PrecisionPlan, options: CompileOptions, trials: Trials, progress: Progress
) -> tuple[nn.Module, dict[str, int]]:
    """The network with the ranges moved that gain by it, and how many layers each recovery changed."""
    if set(options.recovery) & set(BEFORE):
        trials.start(_quantized_roughly(network, plan, options, trials.choosing))
    layers, gains = list(plan.quantized_entries), partial(_gains_before, trials, plan, options)
    return apply_before(network, layers, trials.choosing, options.recovery, progress, gains)


def _recover_after(
    deployed: nn.Module,
    scales: dict[str, Quantization],
    recovery: tuple[str, ...],
    trials: Trials,
    progress: Progress,
) -> tuple[nn.Module, dict[str, int]]:
    """The network with the weights and biases changed that gain by it, and how many layers each recovery changed."""
    from pcn_deploy.calibration.quantized import apply_scales

    trials.start(apply_scales(deployed, scales))
    return apply_after(deployed, scales, trials.choosing, recovery, progress, partial(_gains_after, trials, scales))


def _quantized_roughly(
    network: nn.Module, plan: PrecisionPlan, options: CompileOptions, source: ImageSource
) -> nn.Module:
    """The network in INT8 with ranges from some of the images: enough to compare two forms of it."""
    from pcn_deploy.calibration.collect import calibrate
    from pcn_deploy.calibration.quantized import apply_scales, plan_scales
    from pcn_deploy.calibration.recovery.trial import JUDGES

    missing = plan.without_range
    calibrator = calibrators_of(options.precision)[0] if options.calibrator == AUTO else options.calibrator
    if missing:
        seen = calibrate(network, missing, source.subset(JUDGES), calibrator, percentile=options.percentile)
        plan = plan.with_ranges(seen.ranges)
    return apply_scales(network, plan_scales(network, plan, options.weight_calibrator))


def _gains_before(
    trials: Trials, plan: PrecisionPlan, options: CompileOptions, name: str, layers: int, network: nn.Module
) -> bool:
    return trials.gains(name, layers, lambda: _quantized_roughly(network, plan, options, trials.choosing))


def _gains_after(trials: Trials, scales: dict[str, Quantization], name: str, layers: int, network: nn.Module) -> bool:
    from pcn_deploy.calibration.quantized import apply_scales

    return trials.gains(name, layers, lambda: apply_scales(network, scales))


def _plan(
    deployed: nn.Module, layers: list[LayerFacts], options: CompileOptions, source: ImageSource | None
) -> tuple[PrecisionPlan, dict[str, Magnitudes]]:
    """Precision by the recipe and the rules; in an FP16 graph, what FP16 cannot hold stays FP32, by what was seen."""
    from pcn_deploy.calibration.plan.half import keep_in_range
    from pcn_deploy.calibration.plan.magnitudes import affordable_images, observe_magnitudes

    plan = make_plan(layers, options.precision, options.remainder)
    recipe = options.recipe
    if recipe is not None:
        plan = recipe.apply(plan, layers, [path for path, _ in deployed.named_modules()])
    decided = recipe.layers if recipe else {}
    if options.graph_type != "fp16" or len(decided) == len(layers):
        return plan, {}
    count = affordable_images(layers)
    images = synthetic_images(count, options) if source is None else next(source.subset(count).batches(count))[0]
    magnitudes = observe_magnitudes(deployed, images)
    return keep_in_range(plan, deployed, magnitudes, layers, decided), magnitudes
