"""The verb behind `pcn-compile engine`: add an engine for this device to a bundle. No torch needed."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from pcn_deploy.artefact.bundle import Bundle
from pcn_deploy.engines.base import BackendOptions, GraphSource
from pcn_deploy.engines.registry import check_options, get_backend
from pcn_deploy.members import GRAPH, SCRIPT, parity_member
from pcn_deploy.output_file import check_output
from pcn_deploy.progress import Progress, silent
from pcn_deploy.proof.executions import prove
from pcn_deploy.tasks.report import ParityReport


def add_engine(
    path: str | Path,
    target: str,
    *,
    output: str | Path | None = None,
    overwrite: bool = False,
    options: BackendOptions | None = None,
    progress: Progress = silent,
) -> ParityReport:
    """Build an engine from the graph in a bundle, prove it as a build does, and write the bundle again.

    Nothing is written if the engine, or another execution of its graph, fails its parity budget. What cannot be
    executed here for want of a library is noted in the report.

    Args:
        path: The bundle.
        target: The engine to add or to replace.
        output: Where to write; the same file by default.
        overwrite: Replace `output` if it exists.
        options: How it is built, where the target leaves a choice.
        progress: Told how far each step is.

    Returns:
        The parity report; its truth value is the verdict.

    Raises:
        BundleError: If the bundle is corrupt, altered or of a newer schema, or lacks what the engine is made from.
        DependencyError: If the backend's library is missing.
        OptionError: If the target has no engine of this precision, or none of the settings asked for.
        BuildError: If the backend refuses the graph.
        OutputError: If the output exists and may not be replaced, or cannot be written.
    """
    options = options or BackendOptions()
    bundle, backend = Bundle.open(path), get_backend(target, options)
    check_options([target], options)
    destination = Path(path if output is None else output)
    overwrite = overwrite or output is None
    check_output(destination, overwrite=overwrite)
    backend.check_type(bundle.manifest.precision)
    if backend.graph not in bundle:
        raise bundle.lacking(backend.graph, f"Build it again from the network with --target {target}.")
    source = GraphSource(
        onnx=partial(bundle.read, GRAPH),
        torchscript=bundle.read(SCRIPT) if backend.graph == SCRIPT else b"",
        spec=bundle.manifest.interface,
    )
    artifact = backend.build(source, progress)
    bundle.add_engine(target, backend.member, artifact.data, artifact.built_with)
    report = prove(bundle, target, progress=progress)
    if report:
        bundle.add_json(parity_member(target), report.to_json())
        bundle.save(destination, overwrite=overwrite)
    return report
