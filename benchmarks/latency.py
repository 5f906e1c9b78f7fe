"""S60 in fp32 at batch 1 on the CPU: our `cpu` engine against eager PyTorch, in turns, in one run.

Usage: python benchmarks/latency.py [--rounds 60]. OpenVINO takes part where it is installed.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from measure import interleaved, medians, print_rows, verdict
from official_layout import patchconvnet_s60

import pcn_deploy

LIMIT = 1.3


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=60)
    options = parser.parse_args()
    model = pcn_deploy.create_model("patchconvnet_s60", random_weights=True)
    official = patchconvnet_s60().eval()
    image = np.random.default_rng(0).standard_normal((1, 3, 224, 224), dtype=np.float32)
    tensor = torch.from_numpy(image)
    result = pcn_deploy.compile(model, pcn_deploy.CompileOptions(precision="fp32"))
    functions: dict[str, Callable[[], object]] = {
        "eager, official token layout": lambda: official(tensor),
        "eager, plain form": lambda: model(tensor),
    }
    with tempfile.TemporaryDirectory() as name, torch.inference_mode():
        path = result.bundle.save(Path(name) / "s60.pcn")
        functions |= _openvino(result.bundle.read("model.onnx"), image)
        with pcn_deploy.load(path, "cpu") as engine:
            functions["ours, target cpu"] = lambda: engine.predict(image)
            found = medians(interleaved(functions, options.rounds))
    ratio = found["eager, plain form"] / found["ours, target cpu"]
    rows = [(name, f"{value:.1f} ms", "", "") for name, value in found.items()]
    rows.append(("ours over eager plain form", f"{ratio:.2f} x faster", f">= {LIMIT}", verdict(ratio >= LIMIT)))
    print_rows(f"PatchConvNet-S60, fp32, batch 1, {torch.get_num_threads()} threads, median of {options.rounds}", rows)


def _openvino(graph: bytes, image: np.ndarray) -> dict[str, Callable[[], object]]:
    try:
        import openvino
    except ModuleNotFoundError:
        return {}
    core = openvino.Core()
    compiled = core.compile_model(core.read_model(model=graph), "CPU", {"PERFORMANCE_HINT": "LATENCY"})
    request = compiled.create_infer_request()
    return {f"OpenVINO {openvino.__version__[:6]}, our graph": lambda: request.infer([image])}


if __name__ == "__main__":
    main()
