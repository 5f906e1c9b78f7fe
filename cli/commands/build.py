"""`pcn-compile build`."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from pcn_deploy.artefact.provenance import ModelSource
from pcn_deploy.calibration.plan.recipe import read_recipe
from pcn_deploy.calibration.plan.rules import CODES, PRECISIONS, REMAINDERS
from pcn_deploy.cli import display, options, transforms, verdict
from pcn_deploy.cli.main import set_verbosity
from pcn_deploy.data.processes import Processes, join
from pcn_deploy.data.transform import Transform
from pcn_deploy.engines.registry import TARGETS
from pcn_deploy.errors import OptionError, ParityError
from pcn_deploy.members import BUDGET
from pcn_deploy.output_file import check_output, write_text
from pcn_deploy.specs import BatchRange
from pcn_deploy.tasks.changed import confusions, to_csv
from pcn_deploy.tasks.roles import ROLES
from pcn_deploy.verbs.build import CompileResult, compile_made, take_part
from pcn_deploy.verbs.options import CompileOptions
from pcn_deploy.verbs.steps.fastest import IMPOSSIBLE, both_precisions, compile_fastest
from pcn_deploy.verbs.steps.sources import synthetic_source

AUTO = "auto"

if TYPE_CHECKING:
    from torch import nn

    from pcn_deploy.progress import Progress


@click.command("build")
@click.argument("model")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, metavar="OUT.pcn", help="The bundle.")
@options.network_options
@click.option(
    "--precision",
    type=click.Choice((*PRECISIONS, AUTO)),
    default="fp16",
    show_default=True,
    help="Precision; auto builds INT8 and FP16, times both where the target can run, and keeps the faster that passes.",
)
@click.option(
    "--remainder",
    type=click.Choice(REMAINDERS),
    default="fp16",
    show_default=True,
    help="Type of the layers that int8 and fp8 do not quantise.",
)
@click.option(
    "--recipe",
    type=click.Path(path_type=Path),
    metavar="FILE.toml",
    help="Precision and ranges of the layers it names, as `inspect --recipe` prints them.",
)
@options.calibration_options
@transforms.transform_options
@click.option("--batch", type=options.Batch(), default="1:1:16", show_default=True, help="Batch sizes to take.")
@click.option(
    "--target",
    "targets",
    type=click.Choice(TARGETS),
    multiple=True,
    default=("cpu",),
    show_default=True,
    help="Engine to build; repeat for several.",
)
@options.backend_options
@options.data_option
@options.classes_option
@options.changed_option
@click.option(
    "--max-drop",
    type=float,
    metavar="PCT",
    help="Largest loss of top-1, in percentage points. Proven with 95 % confidence on the images of --data; for int8 "
    "and fp8 (there without --data on the calibration images) as many layers as needed are left unquantised.",
)
@click.option(
    "--output-name",
    "output_names",
    multiple=True,
    metavar="NAME[:ROLE]",
    help="Build this output of a network that returns several, such as a dict; give it again for more. The first one "
    f"judges the network. ROLE is what it means: {', '.join(ROLES)}. [default: every output; a tensor (N, K) alone is "
    "logits]",
)
@click.option(
    "--with-attention-map",
    is_flag=True,
    help="Add a second output: where the network looks, as the attention weight of each patch; one map for each class "
    "if each class has its own token. `run --heatmap` draws it.",
)
@options.overwrite_option
@click.option("--explain", is_flag=True, help="Print the precision of every layer, and why.")
@options.json_option
@options.verbosity_options
def command(**parameters: Any) -> None:
    """Compile MODEL into a bundle of engines with a parity report for each.

    MODEL is a name from `pcn-compile models`, timm:NAME, torchvision:NAME, package.module:factory, or file.py:factory.

    \b
    Example:
      pcn-compile build patchconvnet_s60 --weights s60_224_1k.pth \\
          --precision int8 --calibration imagenet/val \\
          --target cpu --target tensorrt-rtx -o s60.pcn
    """  # noqa: D301 - click reads the backspace character
    with join() as processes:
        _build(parameters, processes)


def _build(parameters: dict[str, Any], processes: Processes) -> None:
    quiet = parameters["quiet"] or parameters["as_json"] or not processes.first
    set_verbosity(parameters["verbose"], parameters["quiet"])
    if processes.first:
        check_output(parameters["output"], overwrite=parameters["overwrite"])
        if parameters["changed"]:
            check_output(parameters["changed"], overwrite=parameters["overwrite"], option="--changed")
    source, transform = transforms.network_of(parameters)
    compile_options = _options(_with_recipe(parameters), transform)
    calibration = parameters["calibration"]
    if calibration is None and compile_options.quantizes and parameters["random_weights"] and not parameters["recipe"]:
        display.note("the weights are random, so synthetic images calibrate them.", quiet=quiet)
        calibration = synthetic_source(compile_options)
    if not processes.first:
        each = both_precisions(compile_options) if parameters["precision"] == AUTO else (compile_options,)
        for chosen in each:
            with suppress(*IMPOSSIBLE if chosen is not each[-1] else ()), display.user_code():
                take_part(source.create, chosen, calibration, parameters["data"])
        return
    searched = []
    wrote_cache = bool(parameters["calibration_cache"]) and not parameters["calibration_cache"].exists()
    record = parameters["output"].with_name(f"{parameters['output'].name}.search")
    with display.user_code(), display.progress_bars(quiet=quiet) as progress:

        def build(chosen: CompileOptions) -> CompileResult:
            origin: dict[str, Any] = {}
            built = compile_made(
                partial(_create, source, origin, progress),
                chosen,
                calibration=calibration,
                evaluation=parameters["data"],
                search_record=record,
                provenance=origin,
                progress=progress,
            )
            searched.append(built.search is not None)
            return built

        if parameters["precision"] == AUTO:
            result, _ = compile_fastest(build, compile_options, progress)
        else:
            result = build(compile_options)
    for text in result.notes:
        display.note(text, quiet=quiet)
    if result:
        result.bundle.save(parameters["output"], overwrite=parameters["overwrite"])
    if any(searched):  # the record is that of this build, and the build is over
        record.unlink(missing_ok=True)
    _write_changed(result, parameters["changed"])
    reasons = display.failures((*result.reports, *result.proofs))
    if parameters["as_json"]:
        _print_json(result, parameters["output"], explain=parameters["explain"])
    else:
        _show(result, reasons, parameters, wrote_cache=wrote_cache)
    if not result:
        tried = display.tried(result.advice, explain=parameters["explain"])
        advice = f" Tried on the golden images: {tried}." if tried else ""
        message = f"Parity failed, so {parameters['output']} was not written: {reasons}.{advice}"
        raise ParityError(message)


def _write_changed(result: CompileResult, path: Path | None) -> None:
    """Write which images are answered otherwise, of a build that fails too."""
    if path is not None and result.proofs:
        write_text(path, to_csv(result.changed, result.bundle.manifest.class_names), option="--changed")


def _create(source: ModelSource, origin: dict[str, Any], progress: Progress) -> nn.Module:
    """The network; where it comes from is put into `origin`."""
    progress("Making the network", 0, 1)
    made = source.make()
    origin.update(source.describe(made))
    progress("Making the network", 1, 1)
    return made.network


def _with_recipe(parameters: dict[str, Any]) -> dict[str, Any]:
    """Read the recipe; it decides precision and remainder where they were not given."""
    if parameters["recipe"] is None:
        return parameters
    recipe = read_recipe(parameters["recipe"])
    context = click.get_current_context()
    decided = {"precision": recipe.precision}
    if recipe.precision in CODES:
        decided["remainder"] = recipe.remainder
    left = {key for key in decided if context.get_parameter_source(key) is ParameterSource.DEFAULT}
    if parameters["precision"] == AUTO:
        msg = "A recipe has one precision: leave --precision auto out."
        raise OptionError(msg)
    return {**parameters, **{key: decided[key] for key in left}, "recipe": recipe}


def _options(parameters: dict[str, Any], transform: Transform) -> CompileOptions:
    batch = parameters["batch"]
    return CompileOptions(
        precision="int8" if parameters["precision"] == AUTO else parameters["precision"],
        remainder=parameters["remainder"],
        targets=parameters["targets"],
        **options.calibration_of(parameters),
        transform=transform,
        batch=batch if isinstance(batch, BatchRange) else BatchRange.parse(batch),
        max_drop=parameters["max_drop"],
        output_names=parameters["output_names"],
        with_attention_map=parameters["with_attention_map"],
        seed=parameters["seed"],
        backend=options.backend_of(parameters),
        recipe=parameters["recipe"],
        classes=parameters["classes"],
    )


def _print_json(result: CompileResult, output: Path, *, explain: bool) -> None:
    bundle = result.bundle
    display.print_json(
        {
            "passed": bool(result),
            "bundle": str(output),
            "bytes": output.stat().st_size if result else None,
            "precision": bundle.manifest.precision,
            "choice": bundle.manifest.choice,
            "engines": [asdict(entry) for entry in bundle.engines],
            "parity": [report.to_json() for report in result.reports],
            "notes": list(result.notes),
            "advice": [asdict(attempt) for attempt in result.advice],
            "judged": asdict(bundle.manifest.judged),
            "changed": confusions(result.changed, bundle.manifest.class_names),
            "budget": bundle.read_json(BUDGET) if result.proofs else None,
            "layers": result.plan.to_json()["entries"] if explain else None,
        }
    )


def _show(result: CompileResult, failed: str, parameters: dict[str, Any], *, wrote_cache: bool) -> None:
    """The verdict, the tables it rests on, and the files that were written."""
    output, bundle = parameters["output"], result.bundle
    display.tell(verdict.of_build(bundle.manifest, result.reports, result.proofs, failed))
    if choice := bundle.manifest.choice:
        display.tell(f"Kept {bundle.manifest.precision}: {choice['reason']}.")
    layers = [[entry.op, entry.kind, entry.precision, entry.reason] for entry in result.plan.entries]
    display.print_plan(layers, explain=parameters["explain"])
    engines = [[entry.target, entry.member, display.size(entry.bytes)] for entry in bundle.engines]
    display.print_table("Engines", ["target", "member", "size"], engines)
    display.print_parity("Parity with the eager network", result.reports, bundle.manifest.precision)
    if result.search:
        display.tell(display.search_summary(result.search, len(result.plan.quantized_entries)))
    if result.proofs:
        rows = [display.proof_row(proof) for proof in result.proofs]
        display.print_table("Drop of top-1, in percentage points", display.PROOF_COLUMNS, rows)
    if changed := parameters["changed"]:
        answers = display.counted(len(result.changed), "answer")
        written, none = f"Wrote {changed}: {answers} of the engines differ.", f"{changed} was not written: the accuracy"
        display.tell(written if result.proofs else f"{none} was not judged.")
    seen = bundle.manifest.calibration
    for line in display.basis(bundle.manifest, result.proofs):
        display.tell(line)
    if seen:
        images = display.counted(seen["images"], "image")
        display.tell(f"Ranges: {seen['calibrator']} on {images}; {seen['unreadable']} could not be read.")
        if "recovery" in seen:
            display.tell(display.recovery_summary(seen["recovery"]))
    elif bundle.manifest.precision in CODES:
        display.tell("Ranges: all from the recipe; no image was calibrated on.")
    for report in result.reports:
        if report.executed_by != report.target:
            display.tell(
                f"The {report.target} engine was built, not executed: this machine cannot run it; "
                f"{report.executed_by} executed its graph. On the device:\n"
                f"  pcn-compile verify {output} --target {report.target}"
            )
    if wrote_cache and parameters["calibration_cache"].exists():
        display.tell(f"Wrote {parameters['calibration_cache']}: what calibration saw, for builds to come.")
    if result:
        display.tell(f"Wrote {output}, {display.size(output.stat().st_size)}.")
