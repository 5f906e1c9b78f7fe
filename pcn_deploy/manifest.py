"""What the manifest of a bundle must say before anything in it is used. No torch.

Hashes in the manifest guard the members; nothing guards the manifest itself, so its form is checked when it is read.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pcn_deploy.calibration.transform import Transform
from pcn_deploy.errors import BundleError, OptionError
from pcn_deploy.parity import ParityBudget
from pcn_deploy.specs import EngineSpec

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
        EngineSpec.from_json(manifest["interface"])
        Transform.from_json(manifest["transform"])
        ParityBudget(**manifest["parity_budget"])
        engines = [(str(entry["target"]), entry["member"], entry["sha256"]) for entry in manifest["engines"]]
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OptionError) as error:
        msg = f"The manifest of {path} is malformed ({error!r}): it was altered. Copy or build it again."
        raise BundleError(msg) from error
    for target, member, sha256 in engines:
        if manifest["members"].get(member, {}).get("sha256") != sha256:
            msg = f"The manifest of {path} contradicts itself about the engine {target!r}: it was altered."
            raise BundleError(msg)
