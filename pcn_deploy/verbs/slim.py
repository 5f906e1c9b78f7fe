"""The verb `slim`: a bundle without what the devices that it ships to do not need. No torch."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pcn_deploy.artefact.bundle import Bundle
from pcn_deploy.artefact.manifest import Slimmed
from pcn_deploy.members import BUDGET, CALIBRATION, GRAPH, SCRIPT, parity_member
from pcn_deploy.output_file import check_output

_CHUNK = 2**20


@dataclass(frozen=True, kw_only=True)
class Slim:
    """What became of a bundle.

    Attributes:
        path: The new bundle.
        targets: The targets whose engines it holds.
        bytes_before: Size of the bundle that it was made from.
        bytes_after: Its own size.
        left_out: Size in bytes of each member that it holds no more, by name.
        consequences: What cannot be done with it any more, in sentences.
    """

    path: Path
    targets: tuple[str, ...]
    bytes_before: int
    bytes_after: int
    left_out: dict[str, int]
    consequences: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "path": str(self.path),
            "targets": list(self.targets),
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "left_out": dict(self.left_out),
            "consequences": list(self.consequences),
        }


def slim(
    path: str | Path,
    output: str | Path,
    *,
    targets: Sequence[str] = (),
    keep_graph: bool = False,
    overwrite: bool = False,
) -> Slim:
    """Write a bundle again without what its remaining engines do not need.

    Kept are the engines, the golden set, the plan of the layers, the reports of parity and the proof of the budget:
    what `verify`, `run`, `bench`, `inspect` and `extract` read. The manifest names what was left out, and the SHA-256
    of the bundle that it was left out of.

    Args:
        path: The bundle; every member of it is checked.
        output: Where to write.
        targets: The engines to keep; by default all.
        keep_graph: Keep `model.onnx` where no engine that is kept is executed from it.
        overwrite: Replace `output` if it exists.

    Returns:
        What was left out, and what cannot be done without it.

    Raises:
        BundleError: If the bundle is corrupt, altered or of a newer schema, or holds no engine of a target.
        OptionError: If a target is unknown.
        OutputError: If the output exists and may not be replaced, or cannot be written.
    """
    bundle, destination = Bundle.open(path), Path(output)
    check_output(destination, overwrite=overwrite)
    for target in targets:
        bundle.engine(target)
    bundle.check_members()
    size, digest = Path(path).stat().st_size, _sha256(Path(path))
    gone = [entry.target for entry in bundle.engines if targets and entry.target not in targets]
    left_out = _leave_out(bundle, gone, keep_graph=keep_graph)
    before = bundle.manifest.slimmed
    bundle.manifest.slimmed = Slimmed(
        source_sha256=digest,
        left_out={**(before.left_out if before else {}), **left_out},
        targets=(*(before.targets if before else ()), *gone),
    )
    bundle.save(destination, overwrite=overwrite)
    return Slim(
        path=destination,
        targets=tuple(entry.target for entry in bundle.engines),
        bytes_before=size,
        bytes_after=destination.stat().st_size,
        left_out=left_out,
        consequences=_consequences(bundle.manifest.slimmed, bundle),
    )


def _leave_out(bundle: Bundle, gone: Sequence[str], *, keep_graph: bool) -> dict[str, int]:
    """Take engines out of a bundle, and the members that no other engine needs; sizes of what was taken out."""
    manifest = bundle.manifest
    members = {entry.member for entry in bundle.engines if entry.target in gone}
    manifest.engines = [entry for entry in bundle.engines if entry.target not in gone]
    members |= {GRAPH, SCRIPT, CALIBRATION, *map(parity_member, gone)}
    members -= {entry.member for entry in bundle.engines}
    members -= {GRAPH} if keep_graph else set()
    left_out = {name: manifest.members.pop(name).bytes for name in sorted(members) if name in bundle}
    if gone and BUDGET in bundle:
        budget = bundle.read_json(BUDGET)
        kept = [proof for proof in budget["proofs"] if proof["target"] not in gone]
        bundle.add_json(BUDGET, {**budget, "proofs": kept})
    return left_out


def _consequences(slimmed: Slimmed, bundle: Bundle) -> tuple[str, ...]:
    """What cannot be done with a bundle any more, in sentences."""
    sentences = {
        GRAPH: "Without model.onnx no other engine can be built from it (`pcn-compile engine`), and `verify` works "
        "only where one of its engines runs. --keep-graph keeps it.",
        SCRIPT: "Without model.ts no engine of target torchscript can be made from it.",
        CALIBRATION: "Without calibration.json no build can take its calibration (`--calibration-cache`).",
    }
    return tuple(text for name, text in sentences.items() if name in slimmed.left_out and name not in bundle)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
