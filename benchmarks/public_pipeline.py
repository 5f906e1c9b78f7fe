"""Baseline: PatchConvNet-S60 to an INT8 TensorRT-RTX engine with public tools only, timed stage by stage.

The stages are those a user would write today on a machine without a GPU: the model in its official layout,
`torch.onnx.export(dynamo=True)`, INT8 calibration with NVIDIA ModelOpt, the TensorRT-RTX build. This library
is not imported. Install `public-requirements.txt` into an environment of its own, then::

    python benchmarks/public_pipeline.py --images 32 --calibrator entropy --out public-out

One JSON object goes to standard output, everything the tools print to `log.txt` in the output folder. The
stages run in a child process, so that measuring costs them little. Linux x86-64 only.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

IMAGE_SHAPE = (3, 224, 224)
COMPUTE_CAPABILITIES = ("SM80", "SM86", "SM89", "SM120")
LAYER_SCALE = 0.2  # the initial 1e-4 of the official code would hide every block from the calibration
POLL_SECONDS = 0.1
MIB = 2**20
DISTRIBUTIONS = (
    "torch",
    "nvidia-modelopt",
    "onnx",
    "onnxscript",
    "onnx-ir",
    "onnxruntime",
    "onnxruntime-gpu",
    "onnx-graphsurgeon",
    "onnxslim",
    "polygraphy",
    "numpy",
    "tensorrt-rtx-cu13",
)

# --- the child: the stages ----------------------------------------------------------------------------------


def make_model(seed: int, weights: Path | None) -> Any:
    """Return S60 with official weights, or with seeded random ones in which every block matters."""
    import torch
    from official_layout import patchconvnet_s60

    torch.manual_seed(seed)
    model = patchconvnet_s60()
    if weights is not None:
        state = torch.load(weights, map_location="cpu", weights_only=True)
        model.load_state_dict(state.get("model", state))
        return model
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "gamma_" in name:
                parameter.fill_(LAYER_SCALE)
    return model


def build_engine(trt: Any, onnx_path: Path) -> bytes:
    """Build for the compute capabilities above, static shapes, no device needed."""
    logger = trt.Logger(trt.Logger.WARNING)
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(onnx_path)):
        sys.exit("\n".join(str(parser.get_error(index)) for index in range(parser.num_errors)))
    config = builder.create_builder_config()
    config.num_compute_capabilities = len(COMPUTE_CAPABILITIES)
    for index, name in enumerate(COMPUTE_CAPABILITIES):
        config.set_compute_capability(getattr(trt.ComputeCapability, name), index)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        sys.exit("TensorRT-RTX refused to build the engine; its messages are above")
    return bytes(engine)


def run_stages(options: argparse.Namespace) -> dict[str, Any]:
    """Run every stage once and return seconds and results."""
    seconds: dict[str, float] = {}

    @contextmanager
    def stage(name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        seconds[name] = round(time.perf_counter() - started, 2)
        print(f"--- {name}: {seconds[name]} s", flush=True)

    with stage("import"):
        import numpy as np
        import onnx
        import tensorrt_rtx as trt
        import torch
        from modelopt.onnx.quantization import quantize

    float_path = options.out / "s60.onnx"
    int8_path = options.out / "s60.int8.onnx"
    engine_path = options.out / "s60.engine"

    with stage("model"):
        model = make_model(options.seed, options.weights)
        shape = (options.images, *IMAGE_SHAPE)
        images = np.random.default_rng(options.seed).standard_normal(shape).astype(np.float32)

    with stage("export"), torch.no_grad():
        example = (torch.zeros(1, *IMAGE_SHAPE),)
        torch.onnx.export(model, example, float_path, dynamo=True, input_names=["images"], output_names=["logits"])

    with stage("quantize"):
        quantize(  # all other options are ModelOpt's defaults
            onnx_path=str(float_path),
            quantize_mode="int8",
            calibration_data={"images": images},
            calibration_method=options.calibrator,
            calibration_eps=["cpu"],
            high_precision_dtype=options.high_precision,
            output_path=str(int8_path),
        )

    with stage("tensorrt_build"):
        engine = build_engine(trt, int8_path)
        engine_path.write_bytes(engine)

    operators = [node.op_type for node in onnx.load(str(int8_path), load_external_data=False).graph.node]
    return {
        "seconds": seconds,
        "nodes": {
            "all": len(operators),
            "QuantizeLinear": operators.count("QuantizeLinear"),
            "DequantizeLinear": operators.count("DequantizeLinear"),
        },
        "engine_bytes": len(engine),
    }


# --- the parent: wall time, memory, versions ----------------------------------------------------------------


def process_tree(root: int) -> set[int]:
    """Return `root` and all its living descendants."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            # The second field, the command in brackets, may hold spaces: split behind it.
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:  # it ended meanwhile
            continue
        children.setdefault(parent, []).append(int(entry.name))
    found: set[int] = set()
    pending = [root]
    while pending:
        process = pending.pop()
        if process not in found:
            found.add(process)
            pending += children.get(process, [])
    return found


def resident_pages(process: int) -> int:
    """Return the size of one resident set, 0 for a process that ended."""
    try:
        return int(Path(f"/proc/{process}/statm").read_text().split()[1])
    except (OSError, IndexError):
        return 0


def resident_bytes(processes: set[int]) -> int:
    """Return the sum of the resident sets; pages that two processes share count twice."""
    return sum(map(resident_pages, processes)) * os.sysconf("SC_PAGE_SIZE")


def watch(command: list[str], log: Path) -> tuple[int, float, int, resource.struct_rusage]:
    """Run a command and return its exit code, seconds, peak resident bytes of its process tree (sampled), and usage."""
    started, peak = time.perf_counter(), 0
    with log.open("w", encoding="utf-8") as file:
        child = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
        while True:
            finished, status, usage = os.wait4(child.pid, os.WNOHANG)
            if finished:
                break
            peak = max(peak, resident_bytes(process_tree(child.pid)))
            time.sleep(POLL_SECONDS)
    child.returncode = os.waitstatus_to_exitcode(status)
    return child.returncode, time.perf_counter() - started, peak, usage


def versions() -> dict[str, str]:
    """Return the versions of Python and of every distribution that takes part."""
    found = {"python": platform.python_version()}
    for name in DISTRIBUTIONS:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Run the stages in a child and return the report."""
    options.out.mkdir(parents=True, exist_ok=True)
    result_path = options.out / "stages.json"
    result_path.unlink(missing_ok=True)
    log_path = options.out / "log.txt"
    load = os.getloadavg()[0]
    code, total, peak, usage = watch([sys.executable, __file__, "--child", *sys.argv[1:]], log_path)
    if code != 0:
        tail = "\n".join(log_path.read_text(encoding="utf-8").splitlines()[-20:])
        sys.exit(f"{tail}\nThe pipeline ended with status {code}; all messages: {log_path}")
    stages = json.loads(result_path.read_text(encoding="utf-8"))
    return {
        "seconds": stages["seconds"],
        "total_seconds": round(total, 2),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 2),
        "peak_memory_mib": {
            "process_tree": round(peak / MIB),  # sum over the tree, sampled
            "largest_process": round(usage.ru_maxrss / 1024),  # getrusage, exact
        },
        "nodes": stages["nodes"],
        "engine_bytes": stages["engine_bytes"],
        "options": {
            "images": options.images,
            "calibrator": options.calibrator,
            "seed": options.seed,
            "weights": "random" if options.weights is None else options.weights.name,
            "calibration_eps": ["cpu"],
            "high_precision_dtype": options.high_precision,
            "compute_capabilities": COMPUTE_CAPABILITIES,
            "batch": 1,
        },
        "machine": {"cpus": len(os.sched_getaffinity(0)), "load_before": round(load, 2)},
        "versions": versions(),
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time the public route to an INT8 TensorRT-RTX engine.")
    parser.add_argument("--images", type=int, default=32, help="calibration images (default 32)")
    parser.add_argument("--calibrator", choices=("entropy", "max"), default="entropy")
    parser.add_argument(
        "--high-precision",
        choices=("fp16", "fp32"),
        default="fp16",
        help="type of what stays unquantised; fp16 is ModelOpt's default, and the slower conversion",
    )
    parser.add_argument("--out", type=Path, default=Path("public-out"), help="folder for graphs and engine")
    parser.add_argument("--weights", type=Path, help="official checkpoint (default: random weights)")
    parser.add_argument("--seed", type=int, default=0, help="seed of images and random weights")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.images < 1:
        parser.error(f"--images must be at least 1, not {options.images}")
    return options


def main() -> None:
    options = parse()
    if options.child:
        results = run_stages(options)
        (options.out / "stages.json").write_text(json.dumps(results, allow_nan=False), encoding="utf-8")
        return
    print(json.dumps(measure(options), indent=2, allow_nan=False))


if __name__ == "__main__":
    main()
