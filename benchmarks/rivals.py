"""Accuracy in INT8 against ONNX Runtime's static quantiser and NVIDIA ModelOpt, side by side.

Usage: python benchmarks/rivals.py [--images N] [--public-python .venv-public/bin/python]

All start from the same FP32 graph (ours, BatchNorm folded) and the same calibration images, quantise the inputs and
weights of the same layers, keep the rest in FP32, and are executed by the same ONNX Runtime on the same test images.
Our builds also quantise the identities of residual additions, for the sake of speed: these are left out here, since
the others do not, and have a row of their own. SQNR is that of the logits against the eager network.
"""

from __future__ import annotations

import argparse
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import torch
from trained import Task, tasks

from pcn_deploy import CompileOptions, ImageSource
from pcn_deploy.calibration.calibrators import AUTO, CALIBRATORS
from pcn_deploy.calibration.plan.rules import RESIDUAL_ADD
from pcn_deploy.calibration.recovery import RECOVERIES
from pcn_deploy.graph.export import serialise, to_onnx
from pcn_deploy.progress import silent
from pcn_deploy.specs import BatchRange
from pcn_deploy.tasks.bound import PairedCounts
from pcn_deploy.tasks.classification import LogitsMeter
from pcn_deploy.verbs.steps.preparation import prepare
from pcn_deploy.verbs.steps.prepared import Prepared

HERE = Path(__file__).parent
BATCH = BatchRange(min=1, opt=8, max=64)


def ours(task: Task, calibrator: str, recovery: tuple[str, ...] = ()) -> Prepared:
    """Our plan and scales."""
    options = CompileOptions(
        precision="int8", remainder="fp32", calibrator=calibrator, transform=task.transform, recovery=recovery
    )
    source = ImageSource([task.calibration], task.transform)
    return prepare(task.network, options, source, silent)


def without_additions(network: Prepared) -> Prepared:
    """The products alone in INT8."""
    additions = {layer.path for layer in network.layers if layer.kind == RESIDUAL_ADD and layer.path in network.scales}
    return network.leave_out(frozenset(additions), "its rivals leave it in FP32")


def graph(task: Task, network: Prepared, *, quantized: bool) -> bytes:
    """The graph of the deploy form."""
    scales = network.scales if quantized else {}
    return serialise(to_onnx(network.deployed, task.transform.shape, BATCH, scales))


def planned_nodes(model: onnx.ModelProto, network: Prepared) -> list[str]:
    """Names of the nodes of the FP32 graph that our plan quantises, found by their weights."""
    weights = {f"{path}.weight" for path in network.plan.quantized_entries}
    found = [node.name for node in model.graph.node if weights & set(node.input)]
    if len(found) != len(weights & {tensor.name for tensor in model.graph.initializer}) or not found:
        message = f"{len(found)} of {len(weights)} layers were found in the graph"
        raise RuntimeError(message)
    return found


def products(model: onnx.ModelProto) -> int:
    """Number of products whose factors are both INT8."""
    made_by = {name: node for node in model.graph.node for name in node.output}
    kinds = {"Conv", "Gemm", "MatMul"}
    nodes = [node for node in model.graph.node if node.op_type in kinds]
    dequantized = "DequantizeLinear"
    return sum(
        all(name in made_by and made_by[name].op_type == dequantized for name in node.input[:2]) for node in nodes
    )


class _Reader:
    """Calibration images as ONNX Runtime wants them."""

    def __init__(self, images: npt.NDArray[np.float32]) -> None:
        self._batches = self._split(images)

    @staticmethod
    def _split(images: npt.NDArray[np.float32]) -> Iterator[dict[str, npt.NDArray[np.float32]]]:
        for start in range(0, len(images), 32):
            yield {"images": images[start : start + 32]}

    def get_next(self) -> dict[str, npt.NDArray[np.float32]] | None:
        return next(self._batches, None)


def onnxruntime_static(task: Task, folder: Path, nodes: list[str], method: str) -> Path:
    """ONNX Runtime's static quantiser: symmetric INT8, per channel, as its documentation advises for TensorRT."""
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static

    output = folder / f"ort-{method}.onnx"
    quantize_static(
        folder / "fp32.onnx",
        output,
        _Reader(task.calibration),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QInt8,
        weight_type=QuantType.QInt8,
        nodes_to_quantize=nodes,
        calibrate_method=getattr(CalibrationMethod, method),
        extra_options={
            "ActivationSymmetric": True,
            "WeightSymmetric": True,
            "QuantizeBias": False,
            "OpTypesToExcludeOutputQuantization": ["Conv", "Gemm", "MatMul"],
        },
    )
    return output


def modelopt(task: Task, folder: Path, nodes: list[str], method: str, python: Path) -> Path:
    """NVIDIA ModelOpt in its own environment."""
    output = folder / f"modelopt-{method}.onnx"
    np.savez(folder / "calibration.npz", images=task.calibration)
    (folder / "nodes.txt").write_text("\n".join(nodes))
    command = [python, HERE / "rival_modelopt.py", folder, output, method]
    subprocess.run([str(word) for word in command], check=True, capture_output=True)
    return output


def judge(task: Task, expected: npt.NDArray[np.float32], model: onnx.ModelProto, name: str) -> list[str]:
    """One row: who, products in INT8, SQNR, top-1, drop with its bound."""
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    meter, counts = LogitsMeter(), PairedCounts()
    fixed = session.get_inputs()[0].shape[0]
    step = fixed if isinstance(fixed, int) else BATCH.max
    for start in range(0, len(expected), step):
        part = slice(start, start + step)
        (found,) = session.run(None, {"images": task.images[part]})
        meter.update(expected[part], found, task.labels[part])
        right, was_right = found.argmax(1) == task.labels[part], expected[part].argmax(1) == task.labels[part]
        counts += PairedCounts(len(found), int((was_right & ~right).sum()), int((~was_right & right).sum()))
    metrics = meter.metrics()
    drop = f"{counts.drop:+.2f} (at most {counts.drop_bound:.2f})"
    top1 = f"{metrics['top1_engine']:.2f}"
    return [name, str(products(model)), f"{metrics['sqnr_db']:.2f}", top1, drop]


def run(task: Task, folder: Path, python: Path) -> Iterator[list[str]]:
    """The rows of a task."""
    with torch.inference_mode():
        parts = torch.from_numpy(task.images).split(BATCH.max)
        expected = torch.cat([task.network(part) for part in parts]).numpy()
    built = ours(task, "entropy")
    network = without_additions(built)
    fp32 = onnx.load_from_string(graph(task, network, quantized=False))
    onnx.save(fp32, folder / "fp32.onnx")
    nodes = planned_nodes(fp32, network)
    yield judge(task, expected, fp32, "FP32 graph")
    for calibrator in (*CALIBRATORS, AUTO):
        model = onnx.load_from_string(graph(task, without_additions(ours(task, calibrator)), quantized=True))
        yield judge(task, expected, model, f"ours, {calibrator}")
    recovered = without_additions(ours(task, AUTO, RECOVERIES))
    model = onnx.load_from_string(graph(task, recovered, quantized=True))
    yield judge(task, expected, model, "ours, auto, --recover all")
    if len(built.scales) > len(network.scales):
        model = onnx.load_from_string(graph(task, built, quantized=True))
        yield judge(task, expected, model, "ours, entropy, residual additions too")
    for method in ("MinMax", "Entropy", "Percentile"):
        path = onnxruntime_static(task, folder, nodes, method)
        yield judge(task, expected, onnx.load(path), f"ONNX Runtime, {method}")
    for method in ("entropy", "max") if python.exists() else ():
        yield judge(task, expected, onnx.load(modelopt(task, folder, nodes, method, python)), f"ModelOpt, {method}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=int, default=30_000, help="test images of each task, or as many as it has")
    parser.add_argument("--public-python", type=Path, default=Path(".venv-public/bin/python"))
    options = parser.parse_args()
    print("task | quantised by | INT8 products | SQNR, dB | top-1, % | drop, points (95 % bound)")
    print("---|---|---:|---:|---:|---")
    for task in tasks(options.images):
        with tempfile.TemporaryDirectory() as name:
            for row in run(task, Path(name), options.public_python):
                print(" | ".join([f"{task.name} ({len(task.images)} images)", *row]), flush=True)
    if not options.public_python.exists():
        print(f"{options.public_python} is missing: ModelOpt was not run. See public-requirements.txt.")


if __name__ == "__main__":
    main()
