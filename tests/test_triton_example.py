"""The example that lays an extracted engine out for Triton. No Triton is started."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pcn_deploy.verbs.extract import extract

pytest.importorskip("onnxruntime")

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "examples" / "nodes" / "triton_repository.py"
BUNDLE = Path(__file__).parent / "fixtures" / "schema1_fp32_map.pcn"


def start(*words: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


def fields(config: str) -> dict[str, Any]:
    """A config.pbtxt of this shape as plain values: a reader of its own."""
    tensors = {}
    for kind, body in re.findall(r"^(input|output) \[ \{\n(.*?)^\} \]$", config, re.MULTILINE | re.DOTALL):
        found = dict(re.findall(r"^  (\w+): (.+)$", body, re.MULTILINE))
        tensors[found["name"].strip('"')] = {"kind": kind, **found}
    return {**dict(re.findall(r"^(\w+): (.+)$", config, re.MULTILINE)), "tensors": tensors}


def test_the_graph_of_a_bundle(tmp_path: Path) -> None:
    import onnxruntime

    written = extract(BUNDLE, "cpu", tmp_path / "model.onnx")
    done = start(written.description, tmp_path / "repository", "small")
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "repository" / "small"
    again = start(written.description, tmp_path / "repository", "small")
    assert (again.returncode, again.stdout) == (1, "")
    assert again.stderr == f"{folder} exists. Remove it, or give the model another name.\n"
    served = folder / "1" / "model.onnx"
    assert served.read_bytes() == written.plan.read_bytes()
    assert str(folder) in done.stdout
    found = fields((folder / "config.pbtxt").read_text())
    assert (found["name"], found["platform"]) == ('"small"', '"onnxruntime_onnx"')
    assert int(found["max_batch_size"]) == written.content["batch"]["max"] > 1
    session = onnxruntime.InferenceSession(served, providers=["CPUExecutionProvider"])
    for kind, tensors in (("input", session.get_inputs()), ("output", session.get_outputs())):
        for tensor in tensors:
            told = found["tensors"][tensor.name]
            assert told["kind"] == kind
            assert told["data_type"] == "TYPE_FP32"
            assert told["dims"] == f"[ {', '.join(map(str, tensor.shape[1:]))} ]"
    assert len(found["tensors"]) == len(session.get_inputs()) + len(session.get_outputs())


def test_names_of_classes_a_fixed_batch_and_a_plan(tmp_path: Path) -> None:
    written = extract(BUNDLE, "cpu", tmp_path / "model.onnx")
    about = json.loads(written.description.read_text())
    about |= {"target": "tensorrt", "batch": {"min": 4, "opt": 4, "max": 4}, "class_names": ["ant", "bee"]}
    for tensor in (*about["inputs"], *about["outputs"]):
        tensor["shape"][0] = 4
    written.description.write_text(json.dumps(about))
    assert start(written.description, tmp_path, "fixed").returncode == 0
    config = (tmp_path / "fixed" / "config.pbtxt").read_text()
    found = fields(config)
    assert (found["platform"], found["max_batch_size"]) == ('"tensorrt_plan"', "0")
    assert "dynamic_batching" not in config
    assert found["tensors"]["images"]["dims"].startswith("[ 4, 3, ")
    assert found["tensors"]["logits"]["label_filename"] == '"labels.txt"'
    assert "label_filename" not in found["tensors"]["attention_map"]
    assert (tmp_path / "fixed" / "labels.txt").read_text() == "ant\nbee\n"
    assert (tmp_path / "fixed" / "1" / "model.plan").is_file()


def test_what_triton_cannot_serve_is_refused(tmp_path: Path) -> None:
    written = extract(BUNDLE, "cpu", tmp_path / "model.onnx")
    about = json.loads(written.description.read_text())
    written.description.write_text(json.dumps({**about, "target": "tensorrt-rtx"}))
    done = start(written.description, tmp_path / "repository", "small")
    assert (done.returncode, done.stdout) == (1, "")
    assert "take no engine of tensorrt-rtx" in done.stderr
    written.description.write_text(json.dumps({**about, "sha256": "0" * 64}))
    done = start(written.description, tmp_path / "repository", "small")
    assert done.returncode == 1
    assert "Do not use it" in done.stderr
    assert not (tmp_path / "repository").exists()


def test_the_page_shows_what_the_example_writes(tmp_path: Path) -> None:
    from importlib.util import module_from_spec, spec_from_file_location

    spec = spec_from_file_location("triton_repository", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    tensor = {"dtype": "float32"}
    about = {
        "target": "tensorrt",
        "batch": {"min": 1, "opt": 8, "max": 32},
        "inputs": [{**tensor, "name": "images", "shape": [-1, 3, 224, 224], "role": "image"}],
        "outputs": [{**tensor, "name": "logits", "shape": [-1, 1000], "role": "logits"}],
        "class_names": ["tench"],
    }
    assert f"```\n{module.config(about, 's60')}```" in (ROOT / "docs" / "devices" / "datacentre.md").read_text()
