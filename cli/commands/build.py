"""`pcn-compile build`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pcn_deploy.bundle import check_output
from pcn_deploy.calibration.calibrators import CALIBRATORS, PERCENTILE, WEIGHT_CALIBRATORS
from pcn_deploy.calibration.distributed import Processes, join
from pcn_deploy.calibration.images import MAX_UNREADABLE_SHARE
from pcn_deploy.calibration.plan import PRECISIONS, REMAINDERS
from pcn_deploy.calibration.transform import Transform
from pcn_deploy.cli import display, options
from pcn_deploy.cli.main import set_verbosity
from pcn_deploy.compiler import CompileResult, compile, synthetic_images  # noqa: A004 - our verb
from pcn_deploy.engines.registry import TARGETS
from pcn_deploy.errors import ParityError
from pcn_deploy.models.registry import check_weights_choice, find_model
from pcn_deploy.options import CompileOptions
from pcn_deploy.preparation import take_part
from pcn_deploy.provenance import ModelSource
from pcn_deploy.specs import BatchRange

if TYPE_CHECKING:
    from torch import nn

    from pcn_deploy.progress import Progress


@click.command("build")
@click.argument("model")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, metavar="OUT.pcn", help="The bundle.")
@options.weights_option
@click.option("--random-weights", is_flag=True, help="Use freshly initialised weights instead of --weights.")
@click.option("--num-classes", type=click.IntRange(min=1), metavar="N", help="Logits. [default: as the checkpoint]")
@click.option("--precision", type=click.Choice(PRECISIONS), default="fp16", show_default=True, help="Precision.")
@click.option(
    "--remainder",
    type=click.Choice(REMAINDERS),
    default="fp16",
    show_default=True,
    help="With int8: the type of what is not quantised.",
)
@click.option(
    "--calibration",
    type=click.Path(path_type=Path),
    metavar="DIR|FILE.npz",
    help="Images to calibrate with (sub-folders are classes); required for int8.",
)
@click.option(
    "--images",
    type=click.IntRange(min=1),
    default=512,
    show_default=True,
    metavar="N",
    help="Use at most so many calibration images, spread evenly.",
)
@click.option("--calibrator", type=click.Choice(CALIBRATORS), default="entropy", show_default=True, help="Ranges.")
@click.option(
    "--percentile",
    type=float,
    metavar="P",
    help=f"With --calibrator percentile: share of magnitudes inside the range. [default: {PERCENTILE}]",
)
@click.option(
    "--weight-calibrator",
    type=click.Choice(WEIGHT_CALIBRATORS),
    default="max",
    show_default=True,
    help="Range of each output channel of the weights.",
)
@click.option(
    "--calibration-cache",
    type=click.Path(path_type=Path),
    metavar="FILE.json",
    help="Keep what calibration sees in this file; if it is there, use it and run nothing. A bundle can be read too.",
)
@click.option(
    "--max-unreadable",
    type=click.FloatRange(0, 1),
    default=MAX_UNREADABLE_SHARE,
    show_default=True,
    metavar="SHARE",
    help="Stop if more than this share of the images cannot be read.",
)
@options.transform_options
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
@options.max_drop_option
@click.option(
    "--with-attention-map",
    is_flag=True,
    help="Add a second output: where the network looks, as the attention weight of each patch; one map for each class "
    "if each class has its own token. `run --heatmap` draws it.",
)
@click.option(
    "--seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True, help="Seed of random weights and images."
)
@options.overwrite_option
@click.option("--explain", is_flag=True, help="Print the precision of every layer, and why.")
@options.json_option
@options.verbosity_options
def command(**given: Any) -> None:
    """Compile MODEL into a bundle of engines with a parity report for each.

    MODEL is a name from `pcn-compile models`, package.module:factory, or file.py:factory.

    \b
    Example:
      pcn-compile build patchconvnet_s60 --weights s60_224_1k.pth --precision int8 \\
          --calibration imagenet/val --target cpu --target tensorrt-rtx -o s60.pcn
    """  # noqa: D301 - click reads the backspace character
    if given["percentile"] is not None and given["calibrator"] != "percentile":
        message = "--percentile goes with --calibrator percentile."
        raise click.UsageError(message)
    with join() as processes:
        _build(given, processes)


def _build(given: dict[str, Any], processes: Processes) -> None:
    quiet = given["quiet"] or given["as_json"] or not processes.first
    set_verbosity(given["verbose"], given["quiet"])
    if processes.first:
        check_output(given["output"], overwrite=given["overwrite"])
    check_weights_choice(find_model(given["model"]), given["weights"], random_weights=given["random_weights"])
    source = ModelSource(
        model=given["model"], weights=given["weights"], num_classes=given["num_classes"], seed=given["seed"]
    )
    compile_options = _options(given)
    calibration = given["calibration"]
    if calibration is None and compile_options.precision == "int8" and given["random_weights"]:
        display.note("the weights are random, so synthetic images calibrate them.", quiet=quiet)
        calibration = [synthetic_images(compile_options.calibration_images, compile_options)]
    if not processes.first:
        take_part(source.create(), compile_options, calibration)
        return
    with display.progress_bars(quiet=quiet) as progress:
        result = compile(
            _create(source, progress),  # without a name here, so that it is freed before the engines are built
            compile_options,
            calibration=calibration,
            provenance=source.describe(),
            progress=progress,
        )
    for text in _notes(result):
        display.note(text, quiet=quiet)
    if result:
        result.bundle.save(given["output"], overwrite=given["overwrite"])
    _report(result, given["output"], explain=given["explain"], as_json=given["as_json"])
    if not result:
        reasons = "; ".join(f"{r.target}: {', '.join(r.failures)}" for r in result.reports if not r)
        message = f"Parity failed, so {given['output']} was not written: {reasons}."
        raise ParityError(message)


def _create(source: ModelSource, progress: Progress) -> nn.Module:
    progress("Making the network", 0, 1)
    network = source.create()
    progress("Making the network", 1, 1)
    return network


def _options(given: dict[str, Any]) -> CompileOptions:
    info = find_model(given["model"])
    default_resolution = info.resolution if info else (224, 224)
    return CompileOptions(
        precision=given["precision"],
        remainder=given["remainder"],
        targets=given["targets"],
        calibrator=given["calibrator"],
        percentile=PERCENTILE if given["percentile"] is None else given["percentile"],
        weight_calibrator=given["weight_calibrator"],
        calibration_cache=given["calibration_cache"],
        calibration_images=given["images"],
        max_unreadable=given["max_unreadable"],
        transform=Transform(
            resolution=given["resolution"] or default_resolution,
            crop_pct=given["crop_pct"],
            mean=given["mean"],
            std=given["std"],
            interpolation=given["interpolation"],
        ),
        batch=given["batch"] if isinstance(given["batch"], BatchRange) else BatchRange.parse(given["batch"]),
        max_drop=given["max_drop"],
        with_attention_map=given["with_attention_map"],
        seed=given["seed"],
    )


def _notes(result: CompileResult) -> list[str]:
    """What the user should know of the calibration images."""
    notes: list[str] = (result.bundle.manifest["calibration"] or {}).get("notes", [])
    return notes


def _report(result: CompileResult, output: Path, *, explain: bool, as_json: bool) -> None:
    bundle, reports = result.bundle, [report.to_json() for report in result.reports]
    if as_json:
        display.print_json(
            {
                "passed": bool(result),
                "bundle": str(output),
                "bytes": output.stat().st_size if result else None,
                "engines": bundle.engines,
                "parity": reports,
                "notes": _notes(result),
                "layers": result.plan.to_json()["entries"] if explain else None,
            }
        )
        return
    if explain:
        rows = [[entry.op, entry.kind, entry.precision, entry.reason] for entry in result.plan.entries]
        display.print_table("Precision per layer", ["layer", "kind", "precision", "reason"], rows)
    summary = [[str(count), kind, precision, reason] for precision, kind, reason, count in result.plan.summary()]
    display.print_table("Precision", ["layers", "kind", "precision", "reason"], summary)
    engines = [[entry["target"], entry["member"], display.size(entry["bytes"])] for entry in bundle.engines]
    display.print_table("Engines", ["target", "member", "size"], engines)
    display.print_table("Parity with the eager network", display.PARITY_COLUMNS, display.parity_rows(reports))
    seen = bundle.manifest["calibration"]
    click.echo(f"Golden set: {reports[0]['images']} images, from {bundle.manifest['golden']}.")
    if seen:
        click.echo(f"Ranges: {seen['calibrator']} on {seen['images']} images; {seen['unreadable']} could not be read.")
    for report in result.reports:
        if report.executed_by != report.target:
            click.echo(
                f"The {report.target} engine was built, not executed: this machine cannot run it; "
                f"{report.executed_by} executed its graph. "
                f"On the device: pcn-compile verify {output} --target {report.target}"
            )
    if result:
        click.echo(f"Wrote {output}, {display.size(output.stat().st_size)}.")
