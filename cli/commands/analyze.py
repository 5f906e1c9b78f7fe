"""`pcn-compile analyze`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pcn_deploy.calibration.search.analysis import Analysis
from pcn_deploy.cli import display, options, transforms
from pcn_deploy.cli.main import set_verbosity
from pcn_deploy.cli.verdict import error_share
from pcn_deploy.data.processes import Processes, join
from pcn_deploy.errors import DataError, OutputError
from pcn_deploy.models.registry import MadeModel
from pcn_deploy.output_file import check_output, write_text
from pcn_deploy.show.analysis import check_picture, draw
from pcn_deploy.tasks.limits import BUDGETS
from pcn_deploy.verbs.analyze import SAMPLE, analyze_made
from pcn_deploy.verbs.options import CompileOptions
from pcn_deploy.verbs.steps.sources import synthetic_source

if TYPE_CHECKING:
    from torch import nn

SHOWN = 15
"""Layers in the printed table; the file holds all of them."""


@click.command("analyze")
@click.argument("model")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), required=True, metavar="OUT.json", help="All measurements."
)
@click.option(
    "--picture",
    type=click.Path(path_type=Path),
    metavar="OUT.png",
    help="Draw them (needs matplotlib); also .svg, .pdf.",
)
@options.network_options
@options.calibration_options
@options.data_option
@options.classes_option
@click.option(
    "--sample",
    type=click.IntRange(min=1),
    default=SAMPLE,
    show_default=True,
    metavar="N",
    help="Measure on at most N images, spread over all of them.",
)
@transforms.transform_options
@options.overwrite_option
@options.json_option
@options.verbosity_options
def command(**parameters: Any) -> None:
    """Measure what each layer of MODEL costs when it becomes INT8.

    Each layer is quantised alone; kept out of INT8 alone; quantised in its weights alone and in its input alone. The
    ranking is by the SQNR of the logits. Measured on the images of --data, else on the calibration images.

    A run that was killed goes on where it stopped when it is started again: OUT.json.partial holds what it measured.

    \b
    Example:
      pcn-compile analyze patchconvnet_s60 --weights s60_224_1k.pth \\
          --calibration imagenet/val -o s60.json --picture s60.png
    """  # noqa: D301 - click reads the backspace character
    with join() as processes:
        _analyze(parameters, processes)


def _analyze(parameters: dict[str, Any], processes: Processes) -> None:
    quiet = parameters["quiet"] or parameters["as_json"] or not processes.first
    set_verbosity(parameters["verbose"], parameters["quiet"])
    for path in (parameters["output"], parameters["picture"]) if processes.first else ():
        if path is not None:
            check_output(path, overwrite=parameters["overwrite"])
    if parameters["picture"] is not None:
        check_picture(parameters["picture"])
        if parameters["picture"] == parameters["output"]:
            message = f"--picture and -o name the same file, {parameters['output']}. Name two."
            raise OutputError(message)
    source, transform = transforms.network_of(parameters)
    compile_options = CompileOptions(
        precision="int8",
        **options.calibration_of(parameters),
        transform=transform,
        seed=parameters["seed"],
        classes=parameters["classes"],
    )
    calibration = parameters["calibration"]
    if calibration is None and parameters["random_weights"]:
        display.note("the weights are random, so synthetic images calibrate them.", quiet=quiet)
        calibration = synthetic_source(compile_options)
    if calibration is None:
        message = "Give images to calibrate with: --calibration DIR or FILE.npz."
        raise DataError(message)
    made: list[MadeModel] = []

    def make() -> nn.Module:
        made.append(source.make())
        return made[0].network

    with display.user_code(), display.progress_bars(quiet=quiet) as progress:
        analysis = analyze_made(
            make,
            compile_options,
            calibration,
            evaluation=parameters["data"],
            images=parameters["sample"],
            record=parameters["output"].with_name(f"{parameters['output'].name}.partial"),
            progress=progress,
        )
    if not processes.first:
        return
    for text in (*made[0].notes, *analysis.notes):
        display.note(text, quiet=quiet)
    measurements = {"model": parameters["model"], "calibrator": compile_options.calibrator, **analysis.to_json()}
    write_text(parameters["output"], json.dumps(measurements, indent=1, allow_nan=False) + "\n")
    if parameters["picture"] is not None:
        images = display.counted(analysis.sensitivity.images, "image")
        draw(analysis, parameters["picture"], f"{parameters['model']}: cost of INT8 per layer, {images}")
    if parameters["as_json"]:
        display.print_json(measurements)
    else:
        _print(analysis, parameters["output"], parameters["picture"])


def _print(analysis: Analysis, output: Path, picture: Path | None) -> None:
    sensitivity = analysis.sensitivity
    every = sensitivity.all_quantized
    columns = ["layer", "kind", "alone", "weights", "input", "all but it", "same top-1 %"]
    rows = [
        [
            one.op,
            one.kind,
            f"{one.only_quantized.sqnr_db:.1f}",
            f"{one.weight_only.sqnr_db:.1f}" if one.weight_only else "-",
            f"{one.input_only.sqnr_db:.1f}",
            f"{one.only_kept.sqnr_db:.1f}",
            f"{one.only_quantized.top1_agreement:.2f}",
        ]
        for one in sensitivity.layers[:SHOWN]
    ]
    title = f"SQNR of the logits in dB: the {len(rows)} layers that cost most, of {len(sensitivity.layers)}"
    display.print_table(title, columns, rows)
    least = BUDGETS["int8"].sqnr_db
    display.tell(
        f"The fewer dB a layer leaves, the more it costs. At {least:g} dB, the least an INT8 engine must keep, the "
        f"error is {error_share(least)} of the answer; 20 dB more make it a tenth of that."
    )
    drop = "" if every.top1_drop is None else f", top-1 drops by {every.top1_drop:.2f} points"
    display.tell(
        f"All in INT8: {every.sqnr_db:.1f} dB, same answer on {every.top1_agreement:.2f} %{drop} "
        f"({display.counted(sensitivity.images, 'image')} of {analysis.data})."
    )
    if analysis.resumed:
        display.tell(f"{analysis.resumed} measurements were taken over from the run before.")
    display.tell(f"Wrote {output}: the measurements of all layers.")
    if picture is not None:
        display.tell(f"Wrote {picture}.")
