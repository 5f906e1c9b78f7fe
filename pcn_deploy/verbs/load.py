"""The verb `load`: open a bundle and the fastest of its engines. numpy and the engine's own library, no torch."""

from __future__ import annotations

from pathlib import Path

from pcn_deploy.artefact.bundle import Bundle
from pcn_deploy.artefact.engine import Engine
from pcn_deploy.engines.registry import fastest_first, get_backend
from pcn_deploy.errors import DependencyError


def load(path: str | Path, target: str | None = None) -> Engine:
    """Open a bundle and the fastest of its engines that this machine can run.

    Args:
        path: The bundle.
        target: Take this engine instead.

    Returns:
        The opened engine.

    Raises:
        BundleError: If the bundle is corrupt, altered, of a newer schema, or holds no such engine.
        DependencyError: If none of its engines can run here; every reason is in the message.
        IncompatibleError: If the chosen engine does not fit this device or library version.
    """
    bundle = Bundle.open(path)
    if target is not None:
        return Engine.open(bundle, target)
    reasons = []
    for candidate in fastest_first(entry.target for entry in bundle.engines):
        state = get_backend(candidate).availability()
        if state.can_run:
            return Engine.open(bundle, candidate)
        reasons.append(f"{candidate}: {state.detail}. {state.remedy}".rstrip())
    msg = f"None of the engines in {path} can run here:\n  " + "\n  ".join(reasons or ["it holds no engine"])
    raise DependencyError(msg)
