"""`pcn-compile extract`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers import invoke, refused

pytest.importorskip("torch")


def test_what_was_written_is_named(path: Path, tmp_path: Path) -> None:
    plan = tmp_path / "model.onnx"
    result = invoke("extract", path, "--target", "cpu", "-o", plan)
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    first, second, third = result.stdout.splitlines()
    assert first.startswith(f"Wrote {plan}: the cpu engine, fp32, ")
    assert second.startswith(f"Wrote {plan}.json: ")
    assert third.startswith("ONNX Runtime and Triton's onnxruntime backend run it")
    assert plan.is_file() and Path(f"{plan}.json").is_file()


def test_json_is_the_file_and_where_it_is(path: Path, tmp_path: Path) -> None:
    plan = tmp_path / "module.ts"
    result = invoke("extract", path, "--target", "torchscript", "-o", plan, "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    told = json.loads(result.stdout)
    assert told.pop("written") == [str(plan), f"{plan}.json"]
    assert told == json.loads(Path(f"{plan}.json").read_text())
    assert told["library"]["name"] == "torch"


def test_bad_inputs(path: Path, tmp_path: Path) -> None:
    asked = ["extract", path, "--target", "cpu", "-o"]
    refused(invoke(*asked, tmp_path), 1, "is a folder; -o takes a file name such as", "model.plan")
    refused(invoke(*asked, tmp_path / "no" / "plan"), 1, "does not exist. Create it")
    plan = tmp_path / "plan"
    plan.write_bytes(b"precious")
    refused(invoke(*asked, plan), 1, "exists. Give --overwrite")
    assert plan.read_bytes() == b"precious"
    assert invoke(*asked, plan, "--overwrite").exit_code == 0
    other = tmp_path / "other"
    refused(
        invoke("extract", path, "--target", "tensorrt", "-o", other),
        *(5, "no engine for 'tensorrt'; it holds: cpu, torchscript"),
    )
    refused(invoke("extract", tmp_path / "none.pcn", "--target", "cpu", "-o", other), 5, "does not exist")
    path.write_bytes(path.read_bytes()[:-100])
    refused(invoke("extract", path, "--target", "cpu", "-o", other), 5, "truncated")
    assert not other.exists()
    assert invoke("extract", path, "--target", "gpu", "-o", other).exit_code == 2
    assert invoke("extract", path, "--target", "cpu").exit_code == 2
