"""`pcn-compile slim`."""

from __future__ import annotations

from pathlib import Path

import click

from pcn_deploy.cli import display, options
from pcn_deploy.engines.registry import TARGETS
from pcn_deploy.verbs.slim import slim


@click.command("slim")
@options.bundle_argument
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    required=True,
    metavar="SMALL.pcn",
    help="Bundle to write.",
)
@click.option(
    "--target",
    "targets",
    type=click.Choice(TARGETS),
    multiple=True,
    help="Engine to keep; may be given several times. [default: all]",
)
@click.option(
    "--keep-graph",
    is_flag=True,
    help="Keep model.onnx, so that other engines can be built from it and any machine can verify it.",
)
@options.overwrite_option
@options.json_option
def command(
    file: Path, output: Path, targets: tuple[str, ...], keep_graph: bool, overwrite: bool, as_json: bool
) -> None:
    """Write FILE.pcn again without what the devices that it ships to do not need.

    Kept are the engines, the golden set and the reports, so that `verify`, `run`, `bench`, `inspect` and `extract`
    work on the device. The manifest says what was left out, and of which bundle.
    """
    result = slim(file, output, targets=targets, keep_graph=keep_graph, overwrite=overwrite)
    if as_json:
        display.print_json(result.to_json())
        return
    sizes = f"{display.size(result.bytes_after)} instead of {display.size(result.bytes_before)}"
    display.tell(f"Wrote {result.path}: {sizes}. Engines: {', '.join(result.targets)}.")
    left_out = ", ".join(f"{name} ({display.size(size)})" for name, size in result.left_out.items())
    display.tell(f"Left out: {left_out}." if left_out else "Nothing was left out: its engines need every member.")
    for sentence in result.consequences:
        display.tell(sentence)
