"""The verb `inspect`: what is inside a bundle, from its manifest and plan. Standard library only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pcn_deploy.artefact.bundle import Bundle
from pcn_deploy.calibration.plan.rules import PrecisionPlan
from pcn_deploy.errors import BundleError
from pcn_deploy.tasks.report import report_from_json


def describe(path: str | Path) -> dict[str, Any]:
    """Describe a bundle.

    Args:
        path: The bundle.

    Returns:
        `model`, `precision`, `remainder`, `inputs`, `outputs`, `batch`, `transform`, `calibration`, `engines`, `parity`
        per target, `layers` (the plan, layer by layer), `members` and `provenance`, all plain values.

    Raises:
        BundleError: If the bundle is corrupt, altered or of a newer schema; every member is checked.
    """
    bundle = Bundle.open(path)
    bundle.check_members()
    manifest = bundle.manifest
    targets = [entry["target"] for entry in bundle.engines]
    try:
        plan = PrecisionPlan.from_json(bundle.read_json("plan.json"))
        parity = {target: report_from_json(bundle.read_json(f"parity/{target}.json")) for target in targets}
    except (KeyError, TypeError, AttributeError) as error:
        msg = f"The plan or a parity report in {path} is malformed ({error!r}): it was altered. Build it again."
        raise BundleError(msg) from error
    return {
        "model": manifest["model"],
        "precision": manifest["precision"],
        "remainder": manifest["remainder"],
        "inputs": manifest["interface"]["inputs"],
        "outputs": manifest["interface"]["outputs"],
        "batch": manifest["interface"]["batch"],
        "transform": manifest["transform"],
        "calibration": manifest["calibration"],
        "engines": bundle.engines,
        "parity": {target: report.to_json() for target, report in parity.items()},
        "layers": plan.to_json()["entries"],
        "members": manifest["members"],
        "provenance": manifest["provenance"],
    }


def plan_of(found: dict[str, Any]) -> PrecisionPlan:
    """The plan inside what `describe` returned."""
    return PrecisionPlan.from_json({**found, "entries": found["layers"]})
