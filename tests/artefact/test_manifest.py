"""The manifest: one reader, one writer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers import small_manifest

from pcn_deploy import Bundle
from pcn_deploy.artefact.manifest import Judged, Manifest

FIXTURES = Path(__file__).parents[1] / "fixtures"


@pytest.mark.parametrize("name", ["schema1_fp32_map", "schema1_int8_budget"])
def test_what_is_written_is_what_was_read(name: str) -> None:
    manifest = Bundle.open(FIXTURES / f"{name}.pcn").manifest
    assert Manifest.from_json(json.loads(json.dumps(manifest.to_json()))) == manifest
    assert manifest.judged.edge_images == 7
    assert manifest.engines[0].sha256 == manifest.members["model.onnx"].sha256


def test_what_earlier_builds_did_not_say_has_a_default() -> None:
    manifest = Manifest.from_json(small_manifest())
    assert (manifest.judged, manifest.choice, manifest.golden, manifest.notes) == (Judged(), None, "", [])


@pytest.mark.parametrize("key", sorted(small_manifest()))
def test_what_every_build_says_must_be_there(key: str) -> None:
    data = small_manifest()
    del data[key]
    with pytest.raises(KeyError, match=key):
        Manifest.from_json(data)
