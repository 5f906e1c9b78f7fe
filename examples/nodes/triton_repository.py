"""Lay an extracted engine out as a model of Triton: config.pbtxt, the engine, and labels. Standard library only.

    pcn-compile extract s60.pcn --target tensorrt -o model.plan
    python triton_repository.py model.plan.json repository s60
    tritonserver --model-repository=repository                     # has not been executed, for want of a GPU

Source of the layout and of the keys: docs/user_guide/model_repository.md and model_configuration.md of
https://github.com/triton-inference-server/server.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any

PLATFORMS = {"tensorrt": ("tensorrt_plan", "model.plan"), "cpu": ("onnxruntime_onnx", "model.onnx")}
"""By target: what Triton calls the kind of model, and the name of its file."""

TYPES = {
    "float32": "TYPE_FP32",
    "float16": "TYPE_FP16",
    "bool": "TYPE_BOOL",
    "uint8": "TYPE_UINT8",
    "int8": "TYPE_INT8",
    "int32": "TYPE_INT32",
    "int64": "TYPE_INT64",
}


def config(about: dict[str, Any], name: str) -> str:
    """The text of config.pbtxt.

    Args:
        about: What `extract` says of the engine.
        name: Of the model, which is that of its folder.
    """
    batch = about["batch"]
    varies = batch["min"] != batch["max"]  # Triton counts the batch apart from the dimensions, if it may vary
    lines = [
        f'name: "{name}"',
        f'platform: "{PLATFORMS[about["target"]][0]}"',
        f"max_batch_size: {batch['max'] if varies else 0}",
    ]
    for key in ("inputs", "outputs"):
        for tensor in about[key]:
            dims = ", ".join(map(str, tensor["shape"][1:] if varies else tensor["shape"]))
            labels = ['  label_filename: "labels.txt"'] if tensor["role"] == "logits" and about["class_names"] else []
            lines += [
                f"{key.removesuffix('s')} [ {{",
                f'  name: "{tensor["name"]}"',
                f"  data_type: {TYPES[tensor['dtype']]}",
                f"  dims: [ {dims} ]",
                *labels,
                "} ]",
            ]
    if varies:
        lines.append(f"dynamic_batching {{ preferred_batch_size: [ {batch['opt']} ] }}")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Write the folder of the model into the repository."""
    parser = argparse.ArgumentParser(description="Lay an engine that `pcn-compile extract` wrote out for Triton.")
    parser.add_argument("description", type=Path, help="the JSON file beside the engine")
    parser.add_argument("repository", type=Path, help="folder of Triton's models")
    parser.add_argument("name", help="what the model is called")
    asked = parser.parse_args()
    about = json.loads(asked.description.read_text(encoding="utf-8"))
    if about["target"] not in PLATFORMS:
        sys.exit(f"Triton's backends for {' and '.join(PLATFORMS)} take no engine of {about['target']}.")
    engine = asked.description.parent / about["file"]
    if hashlib.sha256(engine.read_bytes()).hexdigest() != about["sha256"]:
        sys.exit(f"{engine} is not the engine that {asked.description} describes. Do not use it.")
    folder = asked.repository / asked.name
    if folder.exists():
        sys.exit(f"{folder} exists. Remove it, or give the model another name.")
    (folder / "1").mkdir(parents=True)
    shutil.copyfile(engine, folder / "1" / PLATFORMS[about["target"]][1])
    (folder / "config.pbtxt").write_text(config(about, asked.name), encoding="utf-8")
    if about["class_names"]:
        (folder / "labels.txt").write_text("".join(f"{name}\n" for name in about["class_names"]), encoding="utf-8")
    print(f"Wrote {folder}: {', '.join(sorted(str(path.relative_to(folder)) for path in folder.rglob('*.*')))}")


if __name__ == "__main__":
    main()
