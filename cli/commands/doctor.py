"""`pcn-compile doctor`."""

from __future__ import annotations

from dataclasses import asdict

import click

from pcn_deploy.cli import display
from pcn_deploy.cli.options import json_option
from pcn_deploy.verbs.doctor import PACKAGES, diagnose


@click.command("doctor")
@json_option
def command(as_json: bool) -> None:
    """Show what this machine can build and run, and how to fix the rest."""
    diagnosis = diagnose()
    if as_json:
        display.print_json({**asdict(diagnosis), "can_compile": diagnosis.can_compile})
        return
    display.tell(diagnosis.system)
    packages = [[name, version or "missing", PACKAGES[name]] for name, version in diagnosis.packages.items()]
    display.print_table("Packages", ["package", "version", "needed for"], packages)
    targets = [
        [name, _yes(state.can_build), _yes(state.can_run), state.detail, state.remedy]
        for name, state in diagnosis.targets.items()
    ]
    display.print_table("Targets", ["target", "builds", "runs", "found", "to mend it"], targets)
    if not diagnosis.can_compile:
        display.tell(f"This machine cannot build bundles from checkpoints. {diagnosis.to_compile}.")


def _yes(value: bool) -> str:
    return "yes" if value else "no"
