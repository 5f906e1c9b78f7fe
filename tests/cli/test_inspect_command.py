"""`pcn-compile inspect`, and the ways a bundle can be bad."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
from helpers import invoke, refused

from pcn_deploy import Bundle
from pcn_deploy.calibration.plan.recipe import parse_recipe

pytest.importorskip("torch")


def test_a_person_reads_tables(path: Path) -> None:
    result = invoke("inspect", path)
    assert result.exit_code == 0
    assert result.stderr == ""
    for words in ("PatchConvNet", "images float32 (batch, 3, 32, 32)", "logits", "1:1:4", "torchscript", "passed"):
        assert words in result.stdout
    layer = "blocks.0.attn"
    assert layer not in result.stdout
    assert layer in invoke("inspect", path, "--explain").stdout


def test_json_keeps_its_keys(path: Path) -> None:
    result = invoke("inspect", path, "--json")
    assert result.exit_code == 0
    assert result.stderr == ""
    found = json.loads(result.stdout)
    assert {"model", "precision", "inputs", "outputs", "calibration", "engines", "provenance"} <= set(found)
    assert (found["model"], found["precision"], found["calibration"]) == ("PatchConvNet", "fp32", None)
    assert [entry["target"] for entry in found["engines"]] == ["cpu", "torchscript"]
    for entry in found["engines"]:
        assert {"target", "sha256", "bytes", "built_with"} <= set(entry)
        assert found["members"][entry["member"]]["sha256"] == entry["sha256"]
    assert found["parity"]["torchscript"]["passed"] is True
    assert found["layers"]
    assert found["provenance"]["built_by"]["torch"]


def test_the_recipe_is_all_there_is_on_stdout(path: Path) -> None:
    result = invoke("inspect", path, "--recipe")
    assert (result.exit_code, result.stderr) == (0, "")
    recipe = parse_recipe(result.stdout)
    assert (recipe.precision, {entry.precision for entry in recipe.entries}) == ("fp32", {"fp32"})
    assert invoke("inspect", path, "--recipe", "--json").exit_code == 2


def rewrite(path: Path, change: Any) -> None:
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    manifest = json.loads(members.pop("manifest.json"))
    change(manifest, members)
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in {"manifest.json": json.dumps(manifest).encode(), **members}.items():
            archive.writestr(name, data)


COMMANDS = [["inspect"], ["verify"], ["bench", "--seconds", "0.01"], ["engine", "--target", "cpu"], ["run", "a.png"]]
commands = pytest.mark.parametrize("words", COMMANDS, ids=lambda words: words[0])


def bad(path: Path, words: list[str], *parts: str) -> None:
    before = path.read_bytes() if path.exists() else None
    refused(invoke(words[0], path, *words[1:]), 5, *parts)
    assert (path.read_bytes() if path.exists() else None) == before


@commands
def test_a_bundle_that_is_missing(tmp_path: Path, words: list[str]) -> None:
    bad(tmp_path / "missing.pcn", words, "does not exist. Build one with: pcn-compile build")


@commands
def test_a_truncated_bundle(path: Path, words: list[str]) -> None:
    path.write_bytes(path.read_bytes()[:-500])
    bad(path, words, "truncated", "Copy or build it again")


@commands
def test_a_file_that_is_no_bundle(path: Path, words: list[str]) -> None:
    path.write_text("no bundle")
    bad(path, words, "is not a bundle")


@commands
def test_a_newer_schema(path: Path, words: list[str]) -> None:
    def newer(manifest: Any, members: Any) -> None:
        manifest["schema"] = 99

    rewrite(path, newer)
    bad(path, words, "schema 99; this version reads schema 2 and older. Upgrade pcn-deploy.")


@commands
def test_an_altered_member(path: Path, words: list[str]) -> None:
    def alter(manifest: Any, members: Any) -> None:
        for name, data in members.items():
            members[name] = data[:-1] + bytes([data[-1] ^ 1])

    rewrite(path, alter)
    bad(path, words, "is not what was packed", "do not use it")


@commands
def test_a_member_too_many(path: Path, words: list[str]) -> None:
    def add(manifest: Any, members: Any) -> None:
        members["../evil.sh"] = b"evil"

    rewrite(path, add)
    bad(path, words, "does not hold what its manifest declares: ../evil.sh")


@commands
def test_an_altered_manifest(path: Path, words: list[str]) -> None:
    def garble(manifest: Any, members: Any) -> None:
        del manifest["interface"]["inputs"]

    rewrite(path, garble)
    bad(path, words, "was altered")


def test_the_engine_on_disk_is_the_one_described(path: Path) -> None:
    found = json.loads(invoke("inspect", path, "--json").stdout)
    bundle = Bundle.open(path)
    assert {entry["target"]: entry["bytes"] for entry in found["engines"]} == {
        "cpu": len(bundle.read("model.onnx")),
        "torchscript": len(bundle.read("model.ts")),
    }
