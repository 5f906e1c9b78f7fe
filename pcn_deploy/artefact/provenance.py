"""Where a network comes from, so that it can be named in a bundle and made again from what the bundle says."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pcn_deploy.artefact.manifest import Manifest
from pcn_deploy.errors import CheckpointError, DataError, ModelError
from pcn_deploy.models.registry import MadeModel, is_own_factory, make_model
from pcn_deploy.network.evaluation_mode import in_evaluation_mode

if TYPE_CHECKING:
    from torch import nn

RAW_FIRST = "raw-first"
"""`models.containers.RAW_FIRST`, which needs torch."""


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """Everything `create_model` needs, and the hash of the weights.

    Attributes:
        model: A registry name, `timm:NAME`, `torchvision:NAME`, `package.module:factory` or `file.py:factory`.
        weights: Checkpoint, or None for random weights.
        num_classes: Number of logits, if the user gave it.
        seed: Seed of random weights.
        architecture: Further arguments of the network.
        random_weights: Whether the user asked for random weights; without them and without a checkpoint the user's own
            factory brings the weights.
        checkpoint_weights: Which weights of the checkpoint to take, one of `containers.CHOICES`.
        notes: What was decided about it before it is made, for the notes of the network.
    """

    model: str
    weights: Path | None = None
    num_classes: int | None = None
    seed: int = 0
    architecture: dict[str, Any] = field(default_factory=dict)
    random_weights: bool = False
    checkpoint_weights: str = "auto"
    notes: tuple[str, ...] = ()

    def check_files(self) -> None:
        """Refuse files that are not there, before anything is made or torch is imported.

        Raises:
            CheckpointError: If the checkpoint is missing, a folder, or may not be read.
            ModelError: If the factory's file is not there.
        """
        if self.weights is not None:
            check_readable(self.weights)
        where, _, name = self.model.rpartition(":")
        if where.endswith(".py") and name and not Path(where).is_file():
            msg = f"{self.model!r}: there is no file {where}. Check the path before the colon."
            raise ModelError(msg)

    def make(self) -> MadeModel:
        """Make the network; raises what `create_model` raises."""
        factory_brings_them = is_own_factory(self.model) and not self.random_weights
        made = make_model(
            self.model,
            weights=self.weights,
            random_weights=self.weights is None and not factory_brings_them,
            num_classes=self.num_classes,
            seed=self.seed,
            checkpoint_weights=self.checkpoint_weights,
            **self.architecture,
        )
        return replace(made, notes=(*self.notes, *made.notes))

    def create(self) -> nn.Module:
        """Make the network alone."""
        return self.make().network

    def describe(self, made: MadeModel | None = None) -> dict[str, Any]:
        """What the manifest keeps, and `notes` for the user.

        Args:
            made: The network as it was made; it tells which weights were taken.
        """
        taken: dict[str, Any] = {}
        if made is not None:
            taken = {
                "weights_from": made.weights_from,
                "checkpoint_weights": made.checkpoint_weights or None,
                "checkpoint_key": made.checkpoint_key or None,
                "class_names": list(made.class_names),
                "notes": list(made.notes),
            }
        return {
            "model": self.model,
            "weights": str(self.weights) if self.weights else None,
            "weights_sha256": file_sha256(self.weights) if self.weights else None,
            "num_classes": self.num_classes,
            "seed": self.seed,
            "architecture": self.architecture,
            **taken,
        }

    @classmethod
    def from_manifest(cls, manifest: Manifest, weights: Path | None = None) -> ModelSource:
        """The source of the network a bundle was built from.

        Args:
            manifest: The manifest of the bundle.
            weights: Where its checkpoint is now; by default where it was at build time.

        Raises:
            DataError: If the bundle does not say how the network was made.
            CheckpointError: If the checkpoint is not there, or is not the one the bundle was built from.
        """
        kept = manifest.provenance
        if "seed" not in kept:
            msg = "The bundle was built from a network in memory; compare it through pcn_deploy.verify(reference=...)."
            raise DataError(msg)
        expected = kept["weights_sha256"]
        path = weights or (Path(kept["weights"]) if kept["weights"] else None)
        if expected is not None and (path is None or not path.is_file()):
            msg = f"The weights the bundle was built from are not at {path}. Say where they are: --weights FILE"
            raise CheckpointError(msg)
        sha256 = file_sha256(path) if path else None
        if sha256 != expected:
            msg = f"{path} has SHA-256 {sha256}; the bundle was built from {expected}. Give the same checkpoint."
            raise CheckpointError(msg)
        return cls(
            model=kept["model"],
            weights=path,
            num_classes=kept["num_classes"],
            seed=kept["seed"],
            architecture=kept["architecture"],
            random_weights=kept.get("weights_from") == "random",
            checkpoint_weights=(kept.get("checkpoint_weights") or RAW_FIRST) if path else "auto",
        )


def make_again(manifest: Manifest, weights: Path | None = None) -> nn.Module:
    """The network that a bundle was built from, with the weights it had then.

    Args:
        manifest: The manifest of the bundle.
        weights: Where its checkpoint is now; by default where it was at build time.

    Raises:
        DataError: If the bundle does not say how the network was made.
        CheckpointError: If the checkpoint is not there or is another, or the network comes out with other weights.
    """
    from pcn_deploy.calibration.cache import digest_weights

    source = ModelSource.from_manifest(manifest, weights)
    network = source.create()
    expected = manifest.provenance.get("network_sha256")
    if expected is not None and (sha256 := digest_weights(in_evaluation_mode(network))) != expected:
        msg = (
            f"{source.model} is made with other weights now (SHA-256 {sha256[:16]}…) than at the build "
            f"({expected[:16]}…), so there is nothing to compare the engine with. Did its code, or what it loads, "
            "change, or does it draw weights at random? Use pcn_deploy.verify(reference=...), or build again."
        )
        raise CheckpointError(msg)
    return network


def check_readable(path: Path) -> None:
    """Refuse a checkpoint that cannot be opened.

    Raises:
        CheckpointError: If it cannot.
    """
    try:
        path.open("rb").close()
    except OSError as error:
        msg = f"Weights file {str(path)!r} cannot be read: {error.strerror}. Check the path given to --weights."
        raise CheckpointError(msg) from error


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, as hexadecimal text.

    Raises:
        CheckpointError: If it cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _sha(file)
    except OSError as error:
        msg = f"Weights file {str(path)!r} cannot be read: {error.strerror}. Check the path given to --weights."
        raise CheckpointError(msg) from error


def _sha(file: Any) -> str:
    """`hashlib.file_digest` for Python 3.10."""
    sha = hashlib.sha256()
    while block := file.read(2**20):
        sha.update(block)
    return sha.hexdigest()
