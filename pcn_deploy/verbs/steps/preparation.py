"""From a network to what is built: the deploy form, the precision of every layer, and the scales of INT8."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from pcn_deploy.artefact.bundle import read_calibration
from pcn_deploy.data.images import ImageSource
from pcn_deploy.errors import DataError, ModelError
from pcn_deploy.network.evaluation_mode import in_evaluation_mode
from pcn_deploy.progress import Progress, silent
from pcn_deploy.verbs.options import CompileOptions
from pcn_deploy.verbs.steps.prepared import Prepared
from pcn_deploy.verbs.steps.sources import NO_IMAGES, CalibrationImages, open_sources, synthetic_images, two_images

if TYPE_CHECKING:
    from torch import nn

    from pcn_deploy.calibration.plan.magnitudes import Magnitudes
    from pcn_deploy.calibration.plan.rules import LayerFacts, PrecisionPlan
    from pcn_deploy.calibration.quantized import Quantization
    from pcn_deploy.calibration.recovery.trial import Trials


def take_part(
    model: nn.Module,
    options: CompileOptions,
    calibration: CalibrationImages | None,
    evaluation: CalibrationImages | None = None,
) -> None:
    """What a process does in a build that another one writes: its share of the calibration images.

    Raises:
        PcnDeployError: As `prepare`, in all processes alike.
    """
    source, _ = open_sources(calibration, evaluation, options)
    prepare(in_evaluation_mode(model), options, source, silent, exporting=True)


def prepare(
    model: nn.Module,
    options: CompileOptions,
    source: ImageSource | None,
    progress: Progress,
    *,
    exporting: bool = False,
) -> Prepared:
    """Rewrite a network, plan the precision of its layers and calibrate what becomes INT8.

    Args:
        model: Network in evaluation mode; left as it is.
        options: What to build.
        source: Calibration images; needed for INT8 layers whose range no recipe gives.
        progress: Told how far each step is.
        exporting: Whether a graph will be made of it: then it is exported first, so that a network that cannot be is
            refused before the long steps.

    Raises:
        CheckpointError: If weights are NaN or infinite.
        DataError: If images are unusable.
        ModelError: If the network cannot run at this resolution, returns no logits, is no function of the image, or
            cannot be exported.
    """
    import torch

    from pcn_deploy.calibration.auto import choose_calibrator
    from pcn_deploy.calibration.calibrators import AUTO, CALIBRATORS
    from pcn_deploy.calibration.collect import calibrate
    from pcn_deploy.calibration.plan.facts import note_hidden_products, survey
    from pcn_deploy.calibration.quantized import apply_scales, plan_scales
    from pcn_deploy.calibration.recovery import BEFORE, apply_after, apply_before
    from pcn_deploy.calibration.recovery.trial import Trials
    from pcn_deploy.graph.export import export_network
    from pcn_deploy.models.attention_conv import note_stretched
    from pcn_deploy.models.checkpoint import check_finite
    from pcn_deploy.models.patchconvnet import PatchConvNet
    from pcn_deploy.network.attention_map import output_attention_map
    from pcn_deploy.network.deploy import to_deploy
    from pcn_deploy.network.preconditions import check_behaviour

    name = type(model).__name__
    check_finite(model.state_dict(), "The network")
    if isinstance(model, PatchConvNet):
        model.check_resolution(*options.transform.resolution)
    progress("Rewriting and planning", 0, 4)
    pair = torch.from_numpy(two_images(options, source))
    check_behaviour(model, pair, batched=options.batch.max > 1)
    progress("Rewriting and planning", 1, 4)
    deployed, rewrites = to_deploy(model, pair[:1])
    progress("Rewriting and planning", 2, 4)

    def with_outputs(network: nn.Module) -> nn.Module:
        return output_attention_map(network, options.transform.shape) if options.with_attention_map else network

    complete = with_outputs(deployed)
    exported = None
    if exporting:
        exported = export_network(complete, options.transform.shape, options.batch, outputs=options.outputs)
    progress("Rewriting and planning", 3, 4)
    layers, hidden = survey(deployed, pair[:1].clone(), places=options.quantizes)
    notes = note_stretched(deployed, options.transform.shape)
    if options.quantizes:
        notes += note_hidden_products(hidden, options.graph_type)
    plan, magnitudes = _plan(deployed, layers, options, source)
    progress("Rewriting and planning", 4, 4)
    recovered: dict[str, int] = {}
    trials = None
    if source is not None and options.recovery:
        trials = Trials(deployed, source, progress)
        if set(options.recovery) & set(BEFORE):
            trials.start(_quantized_roughly(deployed, plan, options, trials.choosing))
        deployed, recovered = apply_before(
            deployed,
            list(plan.quantized_entries),
            trials.choosing,
            options.recovery,
            progress,
            partial(_gains_before, trials, plan, options),
        )
    elif options.recovery:
        msg = f"Recovery {', '.join(options.recovery)} needs calibration images, also where a recipe has the ranges."
        raise DataError(msg)
    if any(recovered.values()):  # other weights, other magnitudes
        plan, magnitudes = _plan(deployed, layers, options, source)
        complete = with_outputs(deployed)
    deployed = complete
    if options.quantizes and not plan.quantized_entries:
        codes = options.precision.upper()
        floats = f"--precision {options.graph_type}"
        msg = f"The plan leaves no layer in {codes}. Build it with {floats}, or put layers in it in the recipe."
        raise ModelError(msg)
    missing = [path for path, entry in plan.quantized_entries.items() if entry.input_amax is None]
    if missing and source is None:
        msg = f"The recipe gives no range for {len(missing)} quantised layers, such as {missing[0]}. {NO_IMAGES}"
        raise DataError(msg)
    seen = None
    if missing and source is not None:
        automatic = options.calibrator == AUTO
        seen = calibrate(
            deployed,
            missing,
            source,
            CALIBRATORS[-1] if automatic else options.calibrator,
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
        plan = plan.with_ranges(seen.ranges)
    scales = plan_scales(deployed, plan, options.weight_calibrator)
    rounded = deployed
    if trials is not None:
        trials.start(apply_scales(deployed, scales))
        rounded, after = apply_after(
            deployed,
            scales,
            trials.choosing,
            options.recovery,
            progress,
            partial(_gains_after, trials, scales),
        )
        recovered |= after
        notes += tuple(trial.note for trial in trials.found if not trial.kept)
    return Prepared(
        name=name,
        deployed=rounded,
        exported=exported,
        unrounded=deployed,
        layers=tuple(layers),
        plan=plan,
        scales=scales,
        calibration=seen,
        recovered=recovered,
        trials=tuple(trials.found) if trials else (),
        rewrites=rewrites,
        magnitudes=magnitudes,
        notes=notes,
    )


def _quantized_roughly(
    network: nn.Module, plan: PrecisionPlan, options: CompileOptions, source: ImageSource
) -> nn.Module:
    """The network in INT8 with ranges from some of the images: enough to compare two forms of it."""
    from pcn_deploy.calibration.calibrators import AUTO
    from pcn_deploy.calibration.collect import calibrate
    from pcn_deploy.calibration.quantized import apply_scales, plan_scales
    from pcn_deploy.calibration.recovery.trial import JUDGES

    missing = [path for path, entry in plan.quantized_entries.items() if entry.input_amax is None]
    calibrator = "mse" if options.calibrator == AUTO else options.calibrator
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
    from pcn_deploy.calibration.plan.rules import make_plan

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
