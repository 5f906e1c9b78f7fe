from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from helpers import small_manifest

from pcn_deploy.artefact.manifest import Manifest
from pcn_deploy.artefact.provenance import ModelSource, file_sha256
from pcn_deploy.errors import CheckpointError, DataError

torch = pytest.importorskip("torch")

SHAPE: dict[str, Any] = {"width": 16, "depth": 1, "patch": 4}


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.pth"
    torch.save(ModelSource(model="patchconvnet", architecture=SHAPE, num_classes=3).create().state_dict(), path)
    return path


def manifest_of(source: ModelSource) -> Manifest:
    """What comes back from a bundle: JSON."""
    return with_provenance(json.loads(json.dumps(source.describe())))


def with_provenance(provenance: dict[str, Any]) -> Manifest:
    return Manifest.from_json({**small_manifest(), "provenance": provenance})


def same(one: Any, other: Any) -> bool:
    first, second = one.state_dict(), other.state_dict()
    return list(first) == list(second) and all(torch.equal(first[key], second[key]) for key in first)


def test_the_same_weights_make_the_same_network(weights: Path) -> None:
    source = ModelSource(model="patchconvnet", weights=weights)
    again = ModelSource.from_manifest(manifest_of(source))
    assert again.weights == weights
    assert same(again.create(), source.create())


def test_weights_that_moved(weights: Path, tmp_path: Path) -> None:
    manifest = manifest_of(ModelSource(model="patchconvnet", weights=weights))
    moved = weights.rename(tmp_path / "elsewhere.pth")
    with pytest.raises(CheckpointError, match=r"are not at .*tiny\.pth. Say where they are: --weights FILE"):
        ModelSource.from_manifest(manifest)
    assert ModelSource.from_manifest(manifest, moved).weights == moved


def test_other_weights_are_refused(weights: Path) -> None:
    manifest = manifest_of(ModelSource(model="patchconvnet", weights=weights))
    torch.save(ModelSource(model="patchconvnet", architecture=SHAPE, seed=1).create().state_dict(), weights)
    with pytest.raises(CheckpointError, match=r"Give the same checkpoint"):
        ModelSource.from_manifest(manifest)


def test_weights_for_a_bundle_of_random_ones_are_refused(weights: Path) -> None:
    manifest = manifest_of(ModelSource(model="patchconvnet", architecture=SHAPE))
    with pytest.raises(CheckpointError, match=r"the bundle was built from"):
        ModelSource.from_manifest(manifest, weights)


def test_random_weights_come_back_by_their_seed() -> None:
    source = ModelSource(model="patchconvnet", architecture=SHAPE, num_classes=4, seed=7)
    again = ModelSource.from_manifest(manifest_of(source))
    assert again == source
    assert same(again.create(), source.create())
    assert not same(
        ModelSource(model="patchconvnet", architecture=SHAPE, num_classes=4, seed=8).create(), again.create()
    )


@pytest.mark.parametrize("provenance", [{}, {"model": "Net", "built_by": {}}])
def test_a_network_from_memory_cannot_be_made_again(provenance: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=r"from a network in memory.*verify\(reference=\.\.\.\)"):
        ModelSource.from_manifest(with_provenance(provenance))


def test_the_hash_is_that_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "large.bin"
    path.write_bytes(bytes(3 * 2**20 + 1))
    assert file_sha256(path) == hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(CheckpointError, match=r"cannot be read: No such file.*--weights"):
        file_sha256(tmp_path / "missing.pth")
