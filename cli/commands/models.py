"""`pcn-compile models`."""

from __future__ import annotations

from dataclasses import asdict

import click

from pcn_deploy.cli import display
from pcn_deploy.cli.options import json_option
from pcn_deploy.models.libraries import LIBRARIES
from pcn_deploy.models.registry import list_models


@click.command("models")
@json_option
def command(as_json: bool) -> None:
    """List architectures: parameters, multiply-accumulates, and the official checkpoints each loads unchanged.

    GMACs are 10^9 multiply-accumulates of one image at the resolution shown.
    """
    models = list_models()
    if as_json:
        display.print_json({"models": [asdict(info) for info in models], "libraries": list(LIBRARIES)})
        return
    rows = [
        [
            info.name,
            f"{info.parameters / 1e6:.2f}" if info.parameters else "-",
            f"{info.gmacs:.2f}" if info.gmacs else "-",
            "x".join(str(side) for side in info.resolution),
            info.checkpoints,
        ]
        for info in models
    ]
    display.print_table("Architectures", ["model", "M parameters", "GMACs", "resolution", "checkpoints"], rows)
    display.tell("Classifiers of other libraries, which must be installed: timm:NAME, torchvision:NAME.")
    display.tell("Your own network: package.module:factory or file.py:factory.")
