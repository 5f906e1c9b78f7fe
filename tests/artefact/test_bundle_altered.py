"""Bundles that were damaged or altered: each is refused, in words that help."""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import small_bundle, small_manifest

from pcn_deploy.artefact import bundle as module
from pcn_deploy.artefact.bundle import Bundle
from pcn_deploy.artefact.manifest import SCHEMA
from pcn_deploy.errors import BundleError
from pcn_deploy.members import SIGNATURE

GOLDEN = bytes(range(256)) * 4
TENSOR = {"dtype": "float32", "shape": ["batch", 3, 8, 8]}


@pytest.fixture
def good(tmp_path: Path) -> Path:
    bundle = small_bundle({"golden.npz": GOLDEN})
    bundle.add_engine("cpu", "engines/cpu.engine", b"engine", {})
    return bundle.save(tmp_path / "good.pcn")


def contents(path: Path) -> tuple[dict[str, Any], dict[str, bytes]]:
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    return json.loads(members.pop("manifest.json")), members


def write(
    path: Path,
    manifest: Any,
    members: list[tuple[str, bytes]],
    compression: int = zipfile.ZIP_STORED,
    manifests: int = 1,
) -> Path:
    """A ZIP as someone else would write it, without the checks of `Bundle`."""
    altered = path.with_name("altered.pcn")
    text = manifest if isinstance(manifest, str) else json.dumps(manifest)
    with zipfile.ZipFile(altered, "w") as archive:
        for _ in range(manifests):
            archive.writestr(zipfile.ZipInfo("manifest.json"), text)
        for name, data in members:
            archive.writestr(zipfile.ZipInfo(name), data, compress_type=compression)
    return altered


def entry(data: bytes) -> dict[str, Any]:
    return {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}


def refused(path: Path, words: str) -> None:
    with pytest.raises(BundleError, match=words):
        Bundle.open(path)


def test_the_tool_of_these_tests_writes_a_good_bundle(good: Path) -> None:
    manifest, members = contents(good)
    assert Bundle.open(write(good, manifest, list(members.items()))).read("golden.npz") == GOLDEN


def test_no_zip(tmp_path: Path) -> None:
    path = tmp_path / "a.pcn"
    path.write_bytes(b"GIF89a" * 100)
    refused(path, "is not a bundle, or is truncated.*Copy or build it again")
    path.write_bytes(b"")
    refused(path, "is not a bundle, or is truncated")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "a ZIP of something else")
    refused(path, "no valid manifest.json")
    refused(tmp_path, "does not exist")


@pytest.mark.parametrize("kept", [0.2, 0.6, 0.95, 0.999])
def test_truncated(good: Path, kept: float) -> None:
    data = good.read_bytes()
    good.write_bytes(data[: int(len(data) * kept)])
    refused(good, "truncated")


def test_a_flipped_byte_in_a_member_is_found_when_it_is_read(good: Path) -> None:
    data = bytearray(good.read_bytes())
    data[data.index(GOLDEN) + 100] ^= 1
    good.write_bytes(data)
    with pytest.raises(BundleError, match=r"golden\.npz.*truncated or altered"):
        Bundle.open(good).read("golden.npz")


def test_no_flipped_byte_anywhere_gives_other_contents(good: Path) -> None:
    """Either the very same members come out, or a BundleError does, wherever the damage is."""
    data, (_, members) = good.read_bytes(), contents(good)
    random = np.random.default_rng(0)
    verdicts = set()
    for position in random.choice(len(data), 300, replace=False):
        damaged = bytearray(data)
        damaged[position] ^= int(random.choice([1, 0x80, 0xFF]))
        good.write_bytes(damaged)
        try:
            opened = Bundle.open(good)
            found = {name: opened.read(name) for name in opened.manifest.members}
        except BundleError:
            verdicts.add("refused")
        else:
            assert found == members, position
            verdicts.add("same")
    assert verdicts == {"refused", "same"}


def test_a_member_replaced_by_one_of_the_same_size(good: Path) -> None:
    manifest, members = contents(good)
    path = write(good, manifest, [*({**members, "golden.npz": GOLDEN[::-1]}).items()])
    with pytest.raises(BundleError, match=r"not what was packed: SHA-256 .*do not use it"):
        Bundle.open(path).read("golden.npz")


def test_members_swapped(good: Path) -> None:
    manifest, members = contents(good)
    names, data = list(members), list(members.values())
    refused(write(good, manifest, list(zip(names, data[::-1], strict=True))), "bytes instead of")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda items: [*items, ("extra.bin", b"x")], r"does not hold what its manifest declares: extra\.bin"),
        (lambda items: items[1:], r"does not hold what its manifest declares: golden\.npz"),
        (lambda items: [("golden.npz", GOLDEN + b"x"), *items[1:]], r"1025 bytes instead of 1024"),
    ],
    ids=["added", "removed", "longer"],
)
def test_members_that_do_not_agree(good: Path, change: Callable[[Any], Any], words: str) -> None:
    manifest, members = contents(good)
    refused(write(good, manifest, change(list(members.items()))), words)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_stored_twice(good: Path) -> None:
    manifest, members = contents(good)
    items = list(members.items())
    refused(write(good, manifest, [*items, items[0]]), "stored twice")
    refused(write(good, manifest, items, manifests=2), "stored twice")


def test_a_compressed_member(good: Path) -> None:
    manifest, members = contents(good)
    refused(write(good, manifest, list(members.items()), zipfile.ZIP_DEFLATED), "compressed or encrypted")


@pytest.mark.parametrize("name", ["../evil", "/etc/evil", "a/../../evil", "c:evil", "a\\evil", ""])
def test_names_that_leave_the_bundle(good: Path, name: str) -> None:
    manifest, members = contents(good)
    manifest["members"][name] = entry(b"evil")
    refused(write(good, manifest, [*members.items(), (name, b"evil")]), "outside the bundle. Do not use it")


def test_a_huge_manifest_is_not_read(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MAX_MANIFEST_BYTES", 100)
    monkeypatch.setattr(zipfile.ZipFile, "read", lambda *_: pytest.fail("it was read"))
    refused(good, r"manifest of \d+ bytes; at most 100 are read")


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        (SCHEMA + 1, "Upgrade pcn-deploy"),
        (0, "Build it again"),
        ("x", "Build it again"),
    ],
)
def test_another_schema(good: Path, schema: Any, words: str) -> None:
    manifest, members = contents(good)
    manifest["schema"] = schema
    refused(write(good, manifest, list(members.items())), f"schema {schema}; this version reads schema.*{words}")


def test_a_newer_schema_may_look_entirely_different(good: Path) -> None:
    refused(write(good, {"schema": SCHEMA + 1, "members": {}}, []), "Upgrade pcn-deploy")


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "3", "{}", '{"schema": 1}', '{"schema": 1, "members": [1]}', "[" * 9999]
)
def test_a_manifest_that_is_none(good: Path, text: str) -> None:
    refused(write(good, text, []), r"no valid manifest\.json|is not a bundle")


@pytest.mark.parametrize(
    ("key", "value"),
    [(key, value) for key in small_manifest() for value in ("absent", 3, [1])]
    + [(key, {"x": 1}) for key in ("transform", "interface", "parity_budget", "engines")],
    ids=str,
)
def test_a_manifest_with_a_garbled_entry(good: Path, key: str, value: Any) -> None:
    manifest, members = contents(good)
    if value == "absent":
        del manifest[key]
    else:
        manifest[key] = value
    refused(write(good, manifest, list(members.items())), "manifest of .*altered")


OUTPUTS = [{"name": name, **TENSOR, "role": name, "axes": []} for name in ("logits", "attention_map")]
PLAIN = [{"name": name, **TENSOR} for name in ("logits", "attention_map")]


@pytest.mark.parametrize(
    "outputs",
    [[], PLAIN[1:], PLAIN[::-1], [PLAIN[0]] * 2, [*PLAIN, PLAIN[0]], [{"name": "Logits", **TENSOR}]],
    ids=lambda outputs: "-".join(output["name"] for output in outputs),
)
def test_a_manifest_of_schema_1_with_other_outputs(good: Path, outputs: list[dict[str, Any]]) -> None:
    manifest, members = contents(good)
    manifest["schema"] = 1
    manifest["interface"]["outputs"] = PLAIN
    opened = Bundle.open(write(good, manifest, list(members.items())))
    assert [(output.name, output.role) for output in opened.manifest.interface.outputs] == [
        ("logits", "logits"),
        ("attention_map", "attention_map"),
    ]
    manifest["interface"]["outputs"] = outputs
    refused(write(good, manifest, list(members.items())), "inputs and outputs .*altered")


@pytest.mark.parametrize(
    "outputs",
    [[], [OUTPUTS[0]] * 2, [*OUTPUTS, OUTPUTS[0]], [{**OUTPUTS[0], "role": "classes"}]],
    ids=lambda outputs: "-".join(output["role"] for output in outputs),
)
def test_a_manifest_with_other_outputs(good: Path, outputs: list[dict[str, Any]]) -> None:
    manifest, members = contents(good)
    manifest["interface"]["outputs"] = OUTPUTS
    opened = Bundle.open(write(good, manifest, list(members.items())))
    assert json.loads(json.dumps(opened.manifest.to_json()["interface"]["outputs"])) == OUTPUTS
    manifest["interface"]["outputs"] = outputs
    refused(write(good, manifest, list(members.items())), "(inputs and outputs|Unknown role) .*altered")


def test_a_signature_beside_the_manifest(good: Path) -> None:
    manifest, members = contents(good)
    signed = write(good, manifest, [*members.items(), (SIGNATURE, b"signed")])
    assert Bundle.open(signed).manifest.model
    refused(write(good, manifest, [*members.items(), ("signature", b"signed")]), "signature")


def test_an_engine_whose_hash_the_manifest_contradicts(good: Path) -> None:
    manifest, members = contents(good)
    manifest["engines"][0]["sha256"] = "0" * 64
    refused(write(good, manifest, list(members.items())), "contradicts itself about the engine 'cpu'")
    manifest["engines"][0]["member"] = "engines/other.engine"
    refused(write(good, manifest, list(members.items())), "contradicts itself about the engine 'cpu'")


def test_no_byte_reaches_a_reader_before_its_hash_is_checked(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest, members = contents(good)
    path = write(good, manifest, [*({**members, "golden.npz": GOLDEN[::-1]}).items()])

    def deserialise(*_: Any, **__: Any) -> None:
        pytest.fail("altered bytes were deserialised")

    opened = Bundle.open(path)
    monkeypatch.setattr(np, "load", deserialise)
    monkeypatch.setattr(json, "loads", deserialise)
    with pytest.raises(BundleError, match=r"not what was packed"):
        opened.read_arrays("golden.npz")
    with pytest.raises(BundleError, match=r"not what was packed"):
        opened.read_json("golden.npz")
