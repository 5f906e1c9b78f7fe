"""`pcn-compile extract`."""

from __future__ import annotations

from pathlib import Path

import click

from pcn_deploy.cli import display, options
from pcn_deploy.engines.registry import TARGETS
from pcn_deploy.verbs.extract import extract


@click.command("extract")
@options.bundle_argument
@click.option("--target", type=click.Choice(TARGETS), required=True, help="Engine of the bundle to write.")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    required=True,
    metavar="PLAN",
    help="File of the engine; PLAN.json is written beside it.",
)
@options.overwrite_option
@options.json_option
def command(file: Path, target: str, output: Path, overwrite: bool, as_json: bool) -> None:
    """Write an engine of FILE.pcn as a plain file, with what its user must know beside it as JSON.

    The file is what trtexec, Triton, C++ or ONNX Runtime take. PLAN.json holds inputs and outputs, the preprocessing
    step by step, class names, versions and the SHA-256.
    """
    written = extract(file, target, output, overwrite=overwrite)
    if as_json:
        display.print_json(written.to_json())
        return
    content = written.content
    display.tell(
        f"Wrote {written.plan}: the {target} engine, {content['precision']}, {display.size(content['bytes'])}, "
        f"SHA-256 {content['sha256'][:16]}."
    )
    display.tell(f"Wrote {written.description}: inputs and outputs, preprocessing, class names, versions.")
    display.tell(content["runs_with"])
