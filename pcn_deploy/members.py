"""Names of the members of a bundle."""

from __future__ import annotations

MANIFEST = "manifest.json"
GRAPH = "model.onnx"
SCRIPT = "model.ts"
GOLDEN = "golden.npz"
PLAN = "plan.json"
CALIBRATION = "calibration.json"
BUDGET = "budget.json"
SIGNATURE = "signature.json"
"""Beside the manifest, which it signs, so the one member that a manifest does not list."""


def engine_member(target: str) -> str:
    """Where a serialised engine lies, of a target that does not execute the graph itself."""
    return f"engines/{target}.engine"


def parity_member(target: str) -> str:
    """Where the report of parity of an engine lies."""
    return f"parity/{target}.json"
