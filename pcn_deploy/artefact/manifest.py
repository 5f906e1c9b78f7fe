"""What the manifest of a bundle must say before anything in it is used. No torch.

Hashes in the manifest guard the members; nothing guards the manifest itself, so its form is checked when it is read.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pcn_deploy.data.transform import Transform
from pcn_deploy.engines.registry import TARGETS
from pcn_deploy.errors import BundleError, OptionError
from pcn_deploy.specs import ATTENTION_MAP, LOGITS, EngineSpec
from pcn_deploy.tasks.limits import ParityBudget

_KINDS: dict[str, tuple[type, ...]] = {
    "model": (str,),
    "precision": (str,),
    "remainder": (str,),
    "transform": (dict,),
    "interface": (dict,),
    "calibration": (dict, type(None)),
    "engines": (list,),
    "parity_budget": (dict,),
    "provenance": (dict,),
}


def check_contents(manifest: dict[str, Any], path: Path) -> None:
    """Check that every entry a reader relies on is there and of its kind.

    Args:
        manifest: A manifest whose `schema` and `members` are known to be good.
        path: The bundle, for the message.

    Raises:
        BundleError: If an entry is missing or malformed, or an engine is not a member of the bundle.
    """
    wrong = [key for key, kinds in _KINDS.items() if key not in manifest or not isinstance(manifest[key], kinds)]
    if wrong:
        msg = f"The manifest of {path} lacks or garbles {', '.join(wrong)}: it was altered. Copy or build it again."
        raise BundleError(msg)
    try:
        _check_values(manifest)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OptionError) as error:
        msg = f"The manifest of {path} is malformed ({error!r}): it was altered. Copy or build it again."
        raise BundleError(msg) from error
    for entry in manifest["engines"]:
        if manifest["members"].get(entry["member"], {}).get("sha256") != entry["sha256"]:
            msg = f"The manifest of {path} contradicts itself about the engine {entry['target']!r}: it was altered."
            raise BundleError(msg)


def _check_values(manifest: dict[str, Any]) -> None:
    """Read every value as its reader will; raises whatever that raises."""
    spec = EngineSpec.from_json(manifest["interface"])
    outputs = tuple(tensor.name for tensor in spec.outputs)
    if len(spec.inputs) != 1 or outputs not in ((LOGITS,), (LOGITS, ATTENTION_MAP)):
        msg = f"{len(spec.inputs)} inputs and outputs {outputs} instead of images to logits, perhaps an attention map"
        raise ValueError(msg)
    Transform.from_json(manifest["transform"])
    ParityBudget(**manifest["parity_budget"])  # refuses limits that are no finite numbers
    for entry in manifest["engines"]:
        int(entry["bytes"])
        dict(entry["built_with"])
        if entry["target"] not in TARGETS:
            msg = f"unknown engine {entry['target']!r}"
            raise ValueError(msg)
