"""`pcn-compile slim`, and what other commands say of the bundle it writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers import invoke, refused

from pcn_deploy import Bundle

pytest.importorskip("torch")


def test_sizes_what_is_left_out_and_what_that_means(path: Path, tmp_path: Path) -> None:
    small = tmp_path / "small.pcn"
    result = invoke("slim", path, "-o", small, "--target", "torchscript")
    assert (result.exit_code, result.stderr) == (0, ""), result.output
    first, second, third = result.stdout.splitlines()
    assert first.startswith(f"Wrote {small}: ") and first.endswith(" KiB. Engines: torchscript.")
    assert " instead of " in first
    assert second.startswith("Left out: model.onnx (") and "parity/cpu.json" in second
    assert third.startswith("Without model.onnx no other engine can be built from it")


def test_other_commands_tell_what_is_missing(path: Path, tmp_path: Path) -> None:
    small = tmp_path / "small.pcn"
    assert invoke("slim", path, "-o", small, "--target", "torchscript").exit_code == 0
    result = invoke("inspect", small)
    assert result.exit_code == 0
    assert "slimmed" in result.stdout and "model.onnx, parity/cpu.json left out" in " ".join(result.stdout.split())
    assert json.loads(invoke("inspect", small, "--json").stdout)["slimmed"]["targets"] == ["cpu"]
    assert json.loads(invoke("inspect", path, "--json").stdout)["slimmed"] is None
    assert invoke("verify", small, "-q").exit_code == 0
    refused(invoke("engine", small, "--target", "cpu", "-q"), 5, "holds no model.onnx.", "slim` left it out")
    refused(invoke("verify", small, "--target", "cpu", "-q"), 5, "no engine for 'cpu'", "slim` left it out")


def test_json(path: Path, tmp_path: Path) -> None:
    small = tmp_path / "small.pcn"
    result = invoke("slim", path, "-o", small, "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    told = json.loads(result.stdout)
    assert told["path"] == str(small)
    assert told["bytes_after"] == small.stat().st_size
    assert (told["targets"], told["left_out"], told["consequences"]) == (["cpu", "torchscript"], {}, [])


def test_where_every_member_is_needed(path: Path, tmp_path: Path) -> None:
    result = invoke("slim", path, "-o", tmp_path / "small.pcn")
    assert result.stdout.splitlines()[1] == "Nothing was left out: its engines need every member."


def test_bad_inputs(path: Path, tmp_path: Path) -> None:
    refused(invoke("slim", path, "-o", tmp_path), 1, "is a folder")
    refused(invoke("slim", path, "-o", path), 1, "exists. Give --overwrite")
    out = tmp_path / "small.pcn"
    refused(invoke("slim", path, "-o", out, "--target", "tensorrt"), 5, "it holds: cpu, torchscript")
    refused(invoke("slim", tmp_path / "none.pcn", "-o", out), 5, "does not exist")
    assert invoke("slim", path).exit_code == 2
    assert not out.exists()
    assert [entry.target for entry in Bundle.open(path).engines] == ["cpu", "torchscript"]
