"""The verb `load`: open a bundle and the fastest of its engines. numpy and the engine's own library, no torch."""

from __future__ import annotations

from pathlib import Path

from pcn_deploy.artefact.bundle import Bundle
from pcn_deploy.artefact.engine import Engine
from pcn_deploy.engines.base import OPEN, OpenOptions
from pcn_deploy.engines.registry import fastest_first, get_backend
from pcn_deploy.errors import DependencyError, OptionError
from pcn_deploy.members import GRAPH
from pcn_deploy.proof.executions import open_to_judge


def load_to_verify(path: str | Path, target: str | None = None, *, judging: bool = False) -> Engine:
    """Open an engine as `load` does; where it cannot run here, the graph that it was built from, by ONNX Runtime.

    So a bundle can be verified where it was built, as the build did.

    Args:
        path: The bundle.
        target: The engine; by default the fastest that can run, else the fastest.
        judging: Whether other images than the golden set will judge it: then as `proof.executions.judged_by`.

    Returns:
        The engine; `executed_by` is another than `target` where only its graph can run.

    Raises:
        PcnDeployError: As `load`; a `DependencyError` only where ONNX Runtime or the graph is missing too.
    """
    bundle = Bundle.open(path)
    targets = [target] if target else fastest_first(entry.target for entry in bundle.engines)
    can_run = {name: get_backend(name).availability().can_run for name in (*targets, "cpu")}
    if targets and can_run["cpu"] and not any(can_run[name] for name in targets):
        if GRAPH not in bundle:
            raise _nothing_to_verify(bundle, targets)
        return open_to_judge(bundle, targets[0]) if judging else Engine.open(bundle, targets[0], executed_by="cpu")
    return _opened(bundle, path, target, OPEN)


def _nothing_to_verify(bundle: Bundle, targets: list[str]) -> DependencyError:
    """The error for engines that cannot run here, in a bundle without the graph that could be executed instead."""
    reasons = "; ".join(f"{name}: {get_backend(name).availability().detail}" for name in targets)
    return DependencyError(
        f"No engine of {bundle.path} can run here ({reasons}). ONNX Runtime could run the graph that they were built "
        f"from, but {bundle.lacking(GRAPH)} Verify it where an engine runs, or verify that bundle here."
    )


def load(path: str | Path, target: str | None = None, *, device: str = "", stream: int = 0) -> Engine:
    """Open a bundle and the fastest of its engines that this machine can run.

    Args:
        path: The bundle.
        target: Take this engine instead.
        device: What it must run on, as PyTorch names it: `cpu`, `cuda`, `cuda:1`; by default what is fastest.
        stream: Handle of the CUDA stream that its work is queued on; 0 for one of its own.

    Returns:
        The opened engine.

    Raises:
        OptionError: If the engine does not run on such a device, or there is none.
        BundleError: If the bundle is corrupt, altered, of a newer schema, or holds no such engine.
        DependencyError: If none of its engines can run here, on this device; every reason is in the message.
        IncompatibleError: If the chosen engine does not fit this device or library version.
    """
    return _opened(Bundle.open(path), path, target, OpenOptions(device=device, stream=stream))


def _opened(bundle: Bundle, path: str | Path, target: str | None, options: OpenOptions) -> Engine:
    """The engine of a target, or the fastest that can run."""
    if target is not None:
        return Engine.open(bundle, target, options=options)
    reasons = []
    for candidate in fastest_first(entry.target for entry in bundle.engines):
        backend = get_backend(candidate)
        state = backend.availability()
        try:
            backend.check_device(options)
        except OptionError as error:
            reasons.append(f"{candidate}: {error}")
            continue
        if state.can_run:
            return Engine.open(bundle, candidate, options=options)
        reasons.append(f"{candidate}: {state.detail}. {state.remedy}".rstrip())
    msg = f"None of the engines in {path} can run here:\n  " + "\n  ".join(reasons or ["it holds no engine"])
    raise DependencyError(msg)
