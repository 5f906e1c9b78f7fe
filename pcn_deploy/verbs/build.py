"""The verb `compile`: network to bundle. The steps, in order, are the functions of this module."""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pcn_deploy.artefact.bundle import Bundle
from pcn_deploy.artefact.engine import executor
from pcn_deploy.artefact.golden import NOISE, GoldenSet
from pcn_deploy.artefact.manifest import Judged, Manifest
from pcn_deploy.data.classes import Classes
from pcn_deploy.data.images import ImageSource
from pcn_deploy.engines.base import Array, Backend, GraphSource
from pcn_deploy.engines.registry import get_backend
from pcn_deploy.errors import DependencyError, ModelError
from pcn_deploy.members import BUDGET, CALIBRATION, GOLDEN, GRAPH, SCRIPT, parity_member
from pcn_deploy.memory import release_unused
from pcn_deploy.progress import Progress, silent
from pcn_deploy.proof.agreement import Forms, check_agreement
from pcn_deploy.proof.budget import BudgetProof, prove_budget
from pcn_deploy.proof.executions import judged_by, open_to_judge, prove
from pcn_deploy.proof.reference import Network, eager_outputs, golden_set, with_simulation
from pcn_deploy.specs import LOGITS, EngineSpec, OutputSpec
from pcn_deploy.tasks.changed import ChangedAnswer
from pcn_deploy.tasks.limits import ParityBudget
from pcn_deploy.tasks.report import ParityReport
from pcn_deploy.verbs.options import CompileOptions
from pcn_deploy.verbs.steps.advice import Attempt, advise, judge, remainder_in_fp32
from pcn_deploy.verbs.steps.engine_builds import EngineBuilds, engine_builds
from pcn_deploy.verbs.steps.graphs import add_graphs
from pcn_deploy.verbs.steps.judging import JudgedBy, judge_by
from pcn_deploy.verbs.steps.opening import Opened, open_network
from pcn_deploy.verbs.steps.preparation import prepare_opened
from pcn_deploy.verbs.steps.prepared import Prepared
from pcn_deploy.verbs.steps.sources import BuildImages, CalibrationImages, check_classes, open_images, real_images

if TYPE_CHECKING:
    from torch import nn

    from pcn_deploy.calibration.plan.rules import PrecisionPlan
    from pcn_deploy.calibration.search.search import SearchResult


@dataclass(frozen=True, kw_only=True)
class CompileResult:
    """What a build produced; true if every engine passed its parity budget.

    Attributes:
        bundle: The artefact, in memory until `bundle.save(path)`.
        plan: Precision per layer, with reasons.
        reports: One parity report per target.
        search: What the search for the plan found, if there was one.
        proofs: Whether each engine keeps the budget on the evaluation images, one per target if there were any.
        changed: The images that judged the accuracy and that an engine answers otherwise than the trained network.
        advice: What would help an 8-bit build whose engines differ too much, best first.
    """

    bundle: Bundle
    plan: PrecisionPlan
    reports: tuple[ParityReport, ...]
    search: SearchResult | None = None
    proofs: tuple[BudgetProof, ...] = ()
    changed: tuple[ChangedAnswer, ...] = ()
    advice: tuple[Attempt, ...] = ()

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know of the network, the images and the verdict, one sentence each."""
        calibration = self.bundle.manifest.calibration or {}
        return (*self.bundle.manifest.notes, *calibration.get("notes", ()))

    def __bool__(self) -> bool:
        return all(self.reports) and all(self.proofs)


def compile(  # noqa: A001 - the verb's public name, as in torch.compile
    model: nn.Module,
    options: CompileOptions | None = None,
    *,
    calibration: CalibrationImages | None = None,
    evaluation: CalibrationImages | None = None,
    search_record: Path | None = None,
    provenance: dict[str, Any] | None = None,
    progress: Progress = silent,
) -> CompileResult:
    """Turn a network into a bundle of engines with the proof of parity.

    Args:
        model: Network of one float input `(N, C, H, W)`, with outputs as `network/outputs.py` takes them; left alone.
        options: What to build.
        calibration: Images for INT8 ranges and for the golden set; INT8 needs them unless a recipe gives every range.
        evaluation: Images that judge the accuracy, labelled or not: with `options.max_drop` every engine must keep the
            drop of top-1 within it with 95 % confidence, for which the plan of INT8 is searched; else none may be shown
            to drop by more than its precision allows. By default all calibration images with `options.max_drop`, else
            labelled ones that are held out of the calibration.
        search_record: Keeps what a search measured for when it is killed; remove it when the bundle is on disk. Of
            several processes (`processes.join`) the first keeps it.
        provenance: Where the network comes from, kept in the manifest as it is, but for `notes`, which go to the notes.
        progress: Told how far each step is.

    Returns:
        The bundle, the plan and the parity reports. Look at `bool(result)` before you ship it.

    Raises:
        DataError: If INT8 has no calibration images, or images are unusable.
        OptionError: If a target cannot have an engine of this precision.
        ModelError: If the network cannot be exported or run at this resolution.
        DependencyError: If a library is missing.
        BuildError: If a backend refuses the graph.
        ParityError: If the images are too few to prove the budget, or no layer can be INT8 within it.
    """
    given = [model]
    del model  # taken out of the list it is held by the caller alone, and may be freed before engines are built
    return compile_made(
        given.pop,
        options or CompileOptions(),
        calibration=calibration,
        evaluation=evaluation,
        search_record=search_record,
        provenance=provenance,
        progress=progress,
    )


def compile_made(
    make: Callable[[], nn.Module],
    options: CompileOptions,
    *,
    calibration: CalibrationImages | None = None,
    evaluation: CalibrationImages | None = None,
    search_record: Path | None = None,
    provenance: dict[str, Any] | None = None,
    progress: Progress = silent,
) -> CompileResult:
    """As `compile`, of a network that is made only once the images are known to be there.

    `make` makes it, and may fill `provenance`, which is read after that; all else is as for `compile`.

    Raises:
        PcnDeployError: As `compile`, and what `make` raises.
    """
    provenance = {} if provenance is None else provenance
    images, backends = open_images(calibration, evaluation, options), _backends(options)
    opened, network, judging = _planned(make(), options, images, provenance, search_record, progress)
    model = opened.model
    forward = eager_outputs(model, attention_map=options.with_attention_map)
    golden, broken = _golden_set(forward, images.shown, network.outputs, options, progress)
    spec = _interface(network, options)
    bundle = _new_bundle(network, options, spec, images, judging, _origin(model, provenance), broken)
    plan, float_graph = add_graphs(bundle, network, golden, options, progress)
    forms = Forms.of(forward, network.deployed, network.unrounded, network.scales, plan)
    golden, widened = check_agreement(
        bundle, golden, spec, forms, scripted=options.scripts, rounded=options.rounds, float_graph=float_graph
    )
    simulated, bundle.manifest.judged = forms.simulated, _judged(golden, network, images, judging)
    bundle.manifest.input_range = float(golden.images.min()), float(golden.images.max())
    del forms, forward, model, opened, float_graph
    release_unused()  # engines take memory of their own
    with engine_builds(bundle, backends, _graphs(bundle, spec, options), progress) as builds:
        golden, advice = _simulate(golden, simulated, spec, network, options, progress)
        del simulated, network  # its folded weights are in the graphs now
        bundle.add(GOLDEN, golden.to_npz())
        release_unused()
        reports, proofs, changed = _prove(bundle, backends, builds, options.budget, judging, widened, progress)
    if golden.simulated and not all(reports) and not advice:
        advice = remainder_in_fp32(golden, options)
    return CompileResult(
        bundle=bundle,
        plan=plan,
        reports=reports,
        search=judging.search,
        proofs=proofs,
        changed=changed,
        advice=advice,
    )


def take_part(
    make: Callable[[], nn.Module],
    options: CompileOptions,
    calibration: CalibrationImages | None,
    evaluation: CalibrationImages | None = None,
) -> None:
    """What a process does in a build that another one writes: its share of the images that calibrate and judge.

    Raises:
        PcnDeployError: As `compile_made` up to the plan, in all processes alike.
    """
    images = open_images(calibration, evaluation, options)
    _planned(make(), options, images, {}, None, silent)


def _planned(
    model: nn.Module,
    options: CompileOptions,
    images: BuildImages,
    provenance: dict[str, Any],
    record: Path | None,
    progress: Progress,
) -> tuple[Opened, Prepared, JudgedBy]:
    """The network, prepared; with a budget of INT8, the plan that keeps it. Several processes share the images."""
    opened = open_network(model, options, images.calibrating)
    if images.judging is not None or options.classes is not None:
        told = provenance.get("class_names", ())
        check_classes(images.calibrating, images.judging, options, opened.count_classes(options), told)
    network = prepare_opened(opened, options, images.calibrating, progress, exporting=True)
    return opened, *judge_by(opened.model, network, images, options, record, progress)


def _judged(golden: GoldenSet, network: Prepared, images: BuildImages, by: JudgedBy) -> Judged:
    """What the verdict rests on, for the manifest."""
    return Judged(
        golden_images=int((~golden.edge).sum()),
        edge_images=int(golden.edge.sum()),
        golden_calibrated=network.calibration is not None and images.unseen is None,
        accuracy="" if by.judges else by.why_not,
        widened_images=len(golden.widened_db),
    )


def _backends(options: CompileOptions) -> list[Backend]:
    """What builds the engines; found out before the long work is what would stop it after."""
    try:
        for package in ("torch", "onnx_ir", "onnxruntime", "onnxscript"):
            import_module(package)
    except ModuleNotFoundError as error:
        raise DependencyError.for_extra(error.name or "torch", "compile", "building a bundle") from error
    backends = [get_backend(target, options.backend) for target in options.targets]
    for backend in backends:
        backend.check_can_build()
        backend.check_precision(options.precision)
    return backends


def _golden_set(
    forward: Network,
    source: ImageSource | None,
    outputs: tuple[OutputSpec, ...],
    options: CompileOptions,
    progress: Progress,
) -> tuple[GoldenSet, list[str]]:
    real = real_images(options, source)
    return golden_set(forward, real, options.transform, outputs, options.batch, progress)


def _interface(network: Prepared, options: CompileOptions) -> EngineSpec:
    """That of both graphs."""
    from pcn_deploy.graph.export import engine_spec

    if network.exported is None:
        msg = "The network was prepared without its float graph."
        raise ModelError(msg)
    return engine_spec(network.exported.graph, options.batch, network.outputs)


def _new_bundle(
    network: Prepared,
    options: CompileOptions,
    spec: EngineSpec,
    images: BuildImages,
    judging: JudgedBy,
    provenance: dict[str, Any],
    broken: list[str],
) -> Bundle:
    """A bundle that holds the decisions: manifest and calibration."""
    calibration = network.calibration
    notes = [*provenance.pop("notes", ()), *network.notes, *broken, *images.notes]
    manifest = Manifest(
        model=provenance.get("model", network.name),
        precision=options.precision,
        remainder=options.graph_type,
        transform=options.transform,
        interface=spec,
        calibration={**calibration.summary(), **_recovery(network)} if calibration else None,
        golden=images.shown.name if images.shown else NOISE,
        rewrites=network.rewrites,
        class_names=_class_names(options, spec, provenance.pop("class_names", ()), judging),
        notes=list(dict.fromkeys(notes)),
        parity_budget=options.budget,
        provenance={**provenance, "built_by": _versions(), "host": platform.platform()},
    )
    bundle = Bundle(manifest)
    if calibration:
        bundle.add_json(CALIBRATION, calibration.to_json(network.scales))
    return bundle


def _class_names(options: CompileOptions, spec: EngineSpec, told: Sequence[str], judging: JudgedBy) -> list[str]:
    """What the classes are called: as was asked, as the checkpoint has told, or as the folders that judge are."""
    logits = spec.output_of(LOGITS)
    if logits is None:
        return []
    outputs = int(logits.shape[-1])
    if isinstance(options.classes, Classes):
        return list(options.classes.names(outputs))
    folders = judging.judges.proof.source.folders if judging.judges else ()
    return next((list(names) for names in (told, folders) if len(names) == outputs), [])


def _origin(model: nn.Module, provenance: dict[str, Any]) -> dict[str, Any]:
    """Where the network comes from, and the digest of its weights as they are."""
    from pcn_deploy.calibration.cache import digest_weights

    return {"weights_from": "memory", **provenance, "network_sha256": digest_weights(model)}


def _recovery(network: Prepared) -> dict[str, Any]:
    if not network.recovered:
        return {}
    return {"recovery": network.recovered, "recovery_trials": {one.name: one.to_json() for one in network.trials}}


def _simulate(
    golden: GoldenSet,
    simulated: nn.Module,
    spec: EngineSpec,
    network: Prepared,
    options: CompileOptions,
    progress: Progress,
) -> tuple[GoldenSet, tuple[Attempt, ...]]:
    """The golden set with what the simulation of an 8-bit graph answers, and what would help where that is too far."""
    if not options.quantizes:
        return golden, ()
    golden = with_simulation(golden, simulated, spec, progress)
    if judge("", golden, golden.simulated[golden.first], options.budget).passed:
        return golden, ()
    return golden, advise(network, golden, options, progress)


def _graphs(bundle: Bundle, spec: EngineSpec, options: CompileOptions) -> GraphSource:
    return GraphSource(
        onnx=partial(bundle.read, GRAPH),
        torchscript=bundle.read(SCRIPT) if options.scripts else b"",
        spec=spec,
    )


def _prove(
    bundle: Bundle,
    backends: list[Backend],
    builds: EngineBuilds,
    budget: ParityBudget,
    judging: JudgedBy,
    widened: dict[str, Array],
    progress: Progress,
) -> tuple[tuple[ParityReport, ...], tuple[BudgetProof, ...], tuple[ChangedAnswer, ...]]:
    """Add every engine, and run it on the golden set and on the images that judge the accuracy, if there are any.

    Where an engine cannot run here, ONNX Runtime runs the graph it was built from, for labelled images with every
    tensor rounded to its type; the others are judged before it, so that the time until it is built is used.
    """
    reports: dict[str, ParityReport] = {}
    proofs: dict[str, BudgetProof] = {}
    changed: dict[str, list[ChangedAnswer]] = {}
    by = {backend.target: executor(backend) for backend in backends}
    judges = {target: judged_by(bundle, target) for target in by}
    for backend in sorted(backends, key=lambda backend: by[backend.target] != backend.target):
        target, executed_by = backend.target, by[backend.target]
        if executed_by not in reports:
            builds.add(backend)
            # the peak of an engine's build and that of a session in another process are not for the same moment
            reports[executed_by] = prove(bundle, target, budget, progress, widened, builds.add_built_aside)
        if judging.judges is not None and judges[target] not in proofs:
            with open_to_judge(bundle, target) as engine:
                proofs[judges[target]], changed[judges[target]] = prove_budget(engine, judging.judges, progress)
    builds.add_all()
    parity_reports = tuple(replace(reports[executed_by], target=target) for target, executed_by in by.items())
    for report in parity_reports:
        bundle.add_json(parity_member(report.target), report.to_json())
        bundle.manifest.notes += [note for note in report.notes if note not in bundle.manifest.notes]
    shared = tuple(replace(proofs[judges[target]], target=target) for target in by if proofs)
    if shared:
        search = judging.search.to_json() if judging.search else None
        bundle.add_json(BUDGET, {"search": search, "proofs": [proof.to_json() for proof in shared]})
    otherwise = [replace(one, target=target) for target in by if proofs for one in changed[judges[target]]]
    return parity_reports, shared, tuple(otherwise)


def _versions() -> dict[str, str]:
    """Versions of the packages that decide the outcome."""
    versions = {"python": platform.python_version()}
    for package in ("pcn-deploy", "torch", "onnx", "onnxscript", "onnx-ir", "onnxruntime", "numpy"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions
