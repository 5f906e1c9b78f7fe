"""`pcn-compile engine`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from pcn_deploy.artefact.bundle import Bundle
from pcn_deploy.cli import display, options, verdict
from pcn_deploy.cli.main import set_verbosity
from pcn_deploy.engines.registry import TARGETS
from pcn_deploy.errors import ParityError
from pcn_deploy.verbs.engine import add_engine


@click.command("engine")
@options.bundle_argument
@click.option("--target", type=click.Choice(TARGETS), required=True, help="Engine to add or replace.")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    metavar="OUT.pcn",
    help="Write here. [default: FILE.pcn]",
)
@options.backend_options
@options.overwrite_option
@options.json_option
@options.verbosity_options
def command(
    file: Path,
    target: str,
    output: Path | None,
    overwrite: bool,
    as_json: bool,
    verbose: int,
    quiet: bool,
    **parameters: Any,
) -> None:
    """Build an engine for this device from the graph in FILE.pcn, prove it, and add it. Needs no torch."""
    set_verbosity(verbose, quiet)
    with display.progress_bars(quiet=quiet or as_json) as progress:
        report = add_engine(
            file, target, output=output, overwrite=overwrite, options=options.backend_of(parameters), progress=progress
        )
    if as_json:
        display.print_json(report.to_json())
    else:
        manifest = Bundle.open(file).manifest
        display.tell(verdict.of_verify(manifest, report, given=False))
        display.print_parity("Parity with the eager network", [report], manifest.precision)
        for text in report.notes:
            display.note(text, quiet=quiet)
    if not report:
        message = f"Parity failed, so {output or file} was left as it is: {display.failures([report])}."
        raise ParityError(message)
    if not as_json:
        written = output or file
        display.tell(f"Wrote {written}, {display.size(written.stat().st_size)}.")
