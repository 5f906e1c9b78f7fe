"""The verb `inspect`: what is inside a bundle, from its manifest and plan. Standard library only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pcn_deploy.artefact.bundle import Bundle
from pcn_deploy.calibration.plan.rules import PrecisionPlan
from pcn_deploy.errors import BundleError
from pcn_deploy.members import BUDGET, PLAN, parity_member
from pcn_deploy.proof.budget import proof_from_json
from pcn_deploy.tasks.report import report_from_json


def describe(path: str | Path) -> dict[str, Any]:
    """Describe a bundle.

    Args:
        path: The bundle.

    Returns:
        `model`, `precision`, `remainder`, `inputs`, `outputs`, `batch`, `transform`, `calibration`, `golden` (where its
        real images come from), `class_names`, `judged` (what the verdict rests on), `rewrites` (places that each
        changed), `engines`, `parity` per target, `budget` (the search for the plan and the proof of the drop, or None),
        `choice` (of `--precision auto`, or None), `slimmed` (what `slim` left out, or None), `layers` (the plan, layer
        by layer), `notes`, `members` and `provenance`, all plain values.

    Raises:
        BundleError: If the bundle is corrupt, altered or of a newer schema; every member is checked.
    """
    bundle = Bundle.open(path)
    bundle.check_members()
    manifest = bundle.manifest.to_json()
    targets = [entry.target for entry in bundle.engines]
    try:
        plan = PrecisionPlan.from_json(bundle.read_json(PLAN))
        budget = bundle.read_json(BUDGET) if BUDGET in bundle else None
        for proof in budget["proofs"] if budget else ():
            proof_from_json(proof)
        parity = {target: report_from_json(bundle.read_json(parity_member(target))) for target in targets}
    except (KeyError, TypeError, AttributeError) as error:
        what = "The plan, the proof of the budget or a parity report"
        msg = f"{what} in {path} is malformed ({error!r}): it was altered. Build it again."
        raise BundleError(msg) from error
    return {
        **{key: manifest[key] for key in ("model", "precision", "remainder")},
        **manifest["interface"],
        **{key: manifest[key] for key in ("transform", "calibration", "golden", "class_names")},
        **{key: manifest[key] for key in ("judged", "rewrites", "engines")},
        "parity": {target: report.to_json() for target, report in parity.items()},
        "budget": budget,
        **{key: manifest[key] for key in ("choice", "slimmed")},
        "layers": plan.to_json()["entries"],
        **{key: manifest[key] for key in ("notes", "members", "provenance")},
    }


def plan_of(description: dict[str, Any]) -> PrecisionPlan:
    """The plan inside what `describe` returned."""
    return PrecisionPlan.from_json({**description, "entries": description["layers"]})
