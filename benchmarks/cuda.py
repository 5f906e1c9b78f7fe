"""Whether a GPU bears out what the proof on a CPU said: `model.onnx` in ONNX Runtime's CUDA provider, its defaults.

Usage: python benchmarks/cuda.py FILE.pcn... [--rounds 100] [--eager MODEL]

Needs a GPU and onnxruntime-gpu beside torch (which brings CUDA and cuDNN). For each bundle: the SQNR and the verdict of
its golden set, as the bundle holds them of the CPU and as the GPU answers, by the same judgement; FP32 graphs without
TF32. Then the median time of one call for one image that stays on the GPU. With --eager the same of the network MODEL
in PyTorch, FP32 without TF32 and FP16.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from measure import interleaved, medians

from pcn_deploy.artefact.bundle import Bundle
from pcn_deploy.artefact.engine import Engine
from pcn_deploy.engines.base import Array, Session
from pcn_deploy.proof.judgement import verify_golden
from pcn_deploy.specs import EngineSpec

WARMUP = 20


class CudaSession(Session):
    """A default session on the first GPU."""

    def __init__(self, graph: bytes, spec: EngineSpec, *, tf32: bool) -> None:
        super().__init__(spec)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        provider = ("CUDAExecutionProvider", {"use_tf32": int(tf32)})
        self.session = onnxruntime.InferenceSession(graph, options, providers=[provider, "CPUExecutionProvider"])
        if "CUDAExecutionProvider" not in self.session.get_providers():
            raise SystemExit("ONNX Runtime has no CUDA here.")

    def _run_impl(self, inputs: dict[str, Array], out: dict[str, Array]) -> dict[str, Array]:
        names = [tensor.name for tensor in self.spec.outputs]
        return dict(zip(names, self.session.run(names, inputs), strict=True))

    def close(self) -> None:
        """Nothing is held that Python does not free."""

    def bound(self) -> Callable[[], object]:
        """A call for one image that lies on the GPU, as its answer does."""
        binding = self.session.io_binding()
        image = np.random.default_rng(0).standard_normal(self.spec.inputs[0].with_batch(1), dtype=np.float32)
        binding.bind_ortvalue_input(
            self.spec.inputs[0].name, onnxruntime.OrtValue.ortvalue_from_numpy(image, "cuda", 0)
        )
        for tensor in self.spec.outputs:
            binding.bind_output(tensor.name, "cuda")

        def call() -> None:
            self.session.run_with_iobinding(binding)
            binding.synchronize_outputs()

        return call


def milliseconds(call: Callable[[], object], rounds: int) -> float:
    """Median time of a call that waits for the GPU."""
    return medians(interleaved({"": call}, rounds, WARMUP))[""]


def row(path: Path, rounds: int) -> str:
    """One line of the table."""
    bundle = Bundle.open(path)
    manifest = bundle.manifest
    spec = manifest.interface
    proven: dict[str, Any] = bundle.read_json("parity/cpu.json")
    session = CudaSession(bundle.read("model.onnx"), spec, tf32=manifest.precision != "fp32")
    report = verify_golden(Engine(bundle, "cpu", "cuda", session), manifest.parity_budget)

    def figures(metrics: dict[str, float], passed: bool) -> str:
        found = f"{metrics['sqnr_db']:.1f} dB, changes {metrics.get('sqnr_changes_db', float('nan')):.1f} dB"
        return f"{found}, {'passed' if passed else 'FAILED'}"

    cells = [
        path.stem,
        f"{manifest.precision} ({manifest.remainder})",
        figures(proven["metrics"], not proven["failures"]),
        figures(report.metrics, bool(report)),
        f"{milliseconds(session.bound(), rounds):.2f} ms",
    ]
    lines = ["| " + " | ".join(cells) + " |", *(f"    {failure}" for failure in report.failures)]
    return "\n".join(lines)


def eager(name: str, rounds: int) -> list[str]:
    """Times of the network in PyTorch."""
    import pcn_deploy

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    network = pcn_deploy.create_model(name, random_weights=True).eval().cuda()
    lines = []
    for kind in (torch.float32, torch.float16):
        network = network.to(kind)
        image = torch.randn(1, 3, 224, 224, dtype=kind, device="cuda")

        def call(network: torch.nn.Module = network, image: torch.Tensor = image) -> None:
            with torch.inference_mode():
                network(image)
            torch.cuda.synchronize()

        lines.append(f"{name}, PyTorch, {str(kind)[6:]}: {milliseconds(call, rounds):.2f} ms")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description="Bundles on a GPU, beside their proof.")
    parser.add_argument("bundles", nargs="+", type=Path, metavar="FILE.pcn")
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--eager", metavar="MODEL")
    options = parser.parse_args()
    print(f"{torch.cuda.get_device_name()}, ONNX Runtime {onnxruntime.__version__}, PyTorch {torch.__version__}")
    print("| bundle | precision (rest) | proof on the CPU | the same on the GPU | one image |\n|---|---|---|---|---|")
    for path in options.bundles:
        print(row(path, options.rounds), flush=True)
    if options.eager:
        print("\n".join(eager(options.eager, options.rounds)))


if __name__ == "__main__":
    main()
