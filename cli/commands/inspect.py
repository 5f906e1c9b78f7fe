"""`pcn-compile inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from pcn_deploy.calibration.plan.recipe import write_recipe
from pcn_deploy.calibration.plan.rules import CODES
from pcn_deploy.cli import display, options
from pcn_deploy.data.classes import first_of
from pcn_deploy.proof.budget import proof_from_json
from pcn_deploy.tasks.report import report_from_json
from pcn_deploy.verbs.inspect import describe, plan_of

_WEIGHTS = {
    "file": "the checkpoint",
    "random": "random numbers (--random-weights)",
    "factory": "what the factory made or loaded (no --weights)",
    "memory": "a network in memory",
}


@click.command("inspect")
@options.bundle_argument
@click.option("--explain", is_flag=True, help="Print the precision of every layer, and why.")
@click.option("--recipe", is_flag=True, help="Print the plan as TOML, nothing else: edit it, build --recipe takes it.")
@options.json_option
def command(file: Path, explain: bool, recipe: bool, as_json: bool) -> None:
    """Show what is inside FILE.pcn: interface, precision per layer, engines, parity, calibration, provenance."""
    if recipe and as_json:
        msg = "--recipe prints TOML and --json prints JSON: take one of them."
        raise click.UsageError(msg)
    description = describe(file)
    if recipe:
        click.echo(write_recipe(plan_of(description)), nl=False)
        return
    if as_json:
        display.print_json(description)
        return
    display.print_table(str(file), ["what", "value"], _overview(description))
    layers = [[layer["op"], layer["kind"], layer["precision"], layer["reason"]] for layer in description["layers"]]
    display.print_plan(layers, explain=explain)
    engines = [
        [entry["target"], display.size(entry["bytes"]), entry["sha256"][:16], _pairs(entry["built_with"])]
        for entry in description["engines"]
    ]
    display.print_table("Engines", ["target", "size", "sha256", "built with"], engines)
    display.print_parity(
        "Parity with the eager network",
        [report_from_json(one) for one in description["parity"].values()],
        description["precision"],
    )
    if description["budget"]:
        rows = [display.proof_row(proof_from_json(proof)) for proof in description["budget"]["proofs"]]
        display.print_table("Drop of top-1, in percentage points", display.PROOF_COLUMNS, rows)
    for note in description["notes"]:
        display.tell(f"Note: {note}")


def _overview(description: dict[str, Any]) -> list[list[str]]:
    batch, calibration = description["batch"], description["calibration"]
    rows = [
        ["model", description["model"]],
        [
            "precision",
            description["precision"]
            + (f", rest {description['remainder']}" if description["precision"] in CODES else ""),
        ],
        *[["input", _tensor(tensor)] for tensor in description["inputs"]],
        *[["output", _tensor(tensor)] for tensor in description["outputs"]],
        *[["classes", f"{len(names)}: {first_of(names)}"] for names in [description["class_names"]] if names],
        ["batch", f"{batch['min']}:{batch['opt']}:{batch['max']}"],
        ["transform", _pairs(description["transform"])],
        ["calibration", _pairs(calibration) if calibration else "none"],
        ["golden set", _golden(description)],
        ["rewrites", _pairs({name: places for name, places in description["rewrites"].items() if places}) or "none"],
    ]
    if description["slimmed"]:
        left_out = ", ".join(description["slimmed"]["left_out"]) or "nothing"
        source = description["slimmed"]["source_sha256"][:16]
        rows.append(["slimmed", f"{left_out} left out of the bundle with SHA-256 {source}"])
    if description["choice"]:
        rows.append(["chosen by", description["choice"]["reason"]])
    description["provenance"].update(weights_from=_WEIGHTS.get(description["provenance"].get("weights_from", "")))
    provenance = {
        key: value for key, value in description["provenance"].items() if key != "model" and value not in (None, {})
    }
    return rows + [[key, _pairs(value) if isinstance(value, dict) else str(value)] for key, value in provenance.items()]


def _golden(description: dict[str, Any]) -> str:
    judged = description["judged"] or {}
    images = f"{judged['golden_images']} images and {judged['edge_images']} edge images, " if judged else ""
    return f"{images}from {description['golden']}"


def _tensor(tensor: dict[str, Any]) -> str:
    dims = ", ".join(str(dim) for dim in tensor["shape"])
    return f"{tensor['name']} {tensor['dtype']} ({dims}), role {tensor['role']}"


def _pairs(values: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items())
