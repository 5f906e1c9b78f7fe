"""What the tests of the command line and of the verbs behind it share."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from click.testing import CliRunner, Result

from pcn_deploy import Bundle
from pcn_deploy.artefact.manifest import Manifest
from pcn_deploy.cli.main import main


def invoke(*words: Any) -> Result:
    """Run `pcn-compile` in this process."""
    return CliRunner().invoke(main, [str(word) for word in words])


def refused(result: Result, code: int, *words: str) -> None:
    """One clear error on stderr, the right code, no traceback, nothing on stdout."""
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    for word in ("Error: ", *words):
        assert word in " ".join(result.stderr.split()), result.stderr
    assert result.stdout == ""


def with_engines_of(bundle: Bundle, *targets: str) -> Bundle:
    """The bundle, its engines of other targets gone; their members stay."""
    bundle.manifest.engines = [bundle.engine(target) for target in targets]
    return bundle


def small_manifest() -> dict[str, Any]:
    """What a bundle must say of itself, and no more."""
    tensor = {"dtype": "float32", "shape": ["batch", 3, 8, 8]}
    return {
        "model": "tiny",
        "precision": "fp32",
        "remainder": "fp32",
        "transform": {
            "resolution": [8, 8],
            "crop_pct": 1.0,
            "mean": [0.5] * 3,
            "std": [0.5] * 3,
            "interpolation": "bilinear",
        },
        "interface": {
            "inputs": [{"name": "images", **tensor}],
            "outputs": [{"name": "logits", **tensor}],
            "batch": {"min": 1, "opt": 1, "max": 4},
        },
        "calibration": None,
        "parity_budget": {"cosine_min": 0.9, "sqnr_db": 20.0, "top1_drop": 1.0},
        "provenance": {},
    }


def small_bundle(members: dict[str, bytes] | None = None) -> Bundle:
    """A bundle that says no more than it must."""
    return Bundle(Manifest.from_json(small_manifest()), members)


def copied(bundle: Bundle, *without: str) -> Bundle:
    """The bundle in memory, some of its members left out, with its engines."""
    kept = {name: bundle.read(name) for name in bundle.manifest.members if name not in without}
    return Bundle(replace(bundle.manifest, members={}), kept)
