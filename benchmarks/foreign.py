"""Networks of other packages through `pcn-compile build`, FP16 and INT8: the table of docs/bring-your-own.md.

Install them first; `--no-deps` keeps torchvision and a second torch away:
    pip install --no-deps pytorchcv==0.0.74 geffnet==1.0.2 efficientnet-pytorch==0.7.1
    pip install transformers==5.23.0

Usage: python benchmarks/foreign.py [NAME...] [--resolution 224x224]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

OWN = Path(__file__).with_name("foreign_networks.py")
NETWORKS = {
    "resnet18": ("pytorchcv", "pytorchcv.models.resnet:resnet18"),
    "mobilenetv2_w1": ("pytorchcv", "pytorchcv.models.mobilenetv2:mobilenetv2_w1"),
    "densenet121": ("pytorchcv", "pytorchcv.models.densenet:densenet121"),
    "seresnet18": ("pytorchcv", "pytorchcv.models.seresnet:seresnet18"),
    "squeezenet_v1_1": ("pytorchcv", "pytorchcv.models.squeezenet:squeezenet_v1_1"),
    "shufflenetv2_wd2": ("pytorchcv", "pytorchcv.models.shufflenetv2:shufflenetv2_wd2"),
    "regnetx002": ("pytorchcv", "pytorchcv.models.regnet:regnetx002"),
    "mnasnet_a1": ("geffnet", "geffnet:mnasnet_a1"),
    "efficientnet_lite0": ("geffnet", "geffnet:efficientnet_lite0"),
    "efficientnet_b0": ("efficientnet-pytorch", f"{OWN}:efficientnet_b0"),
    "resnet18, raw": ("transformers", f"{OWN}:transformers_resnet18_raw"),
    "resnet18, wrapped": ("transformers", f"{OWN}:transformers_resnet18"),
}


def build(spec: str, precision: str, resolution: str, folder: Path) -> str:
    """One cell: seconds and parity of the graph, or the first line of the refusal."""
    command = [sys.executable, "-m", "pcn_deploy.cli.main", "build", spec, "--random-weights", "--precision", precision]
    command += ["--resolution", resolution, "--images", "32", "--target", "cpu", "--target", "tensorrt-rtx"]
    started = time.perf_counter()
    done = subprocess.run(
        [*command, "-o", str(folder / "x.pcn"), "--overwrite", "--json"], capture_output=True, text=True
    )
    seconds = time.perf_counter() - started
    if done.returncode != 0:
        return "refused: " + done.stderr.partition("Error: ")[2].partition("\n")[0][:160]
    (metrics,) = {json.dumps(report["metrics"]) for report in json.loads(done.stdout)["parity"]}
    return f"{seconds:.0f} s, {json.loads(metrics)['cosine_min']:.4f}, {json.loads(metrics)['sqnr_db']:.0f} dB"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(NETWORKS))
    parser.add_argument("--resolution", default="224x224")
    given = parser.parse_args()
    print(
        "| package | network | fp16: build, worst cosine, SQNR | int8: build, worst cosine, SQNR |\n|---|---|---|---|"
    )
    with tempfile.TemporaryDirectory() as folder:
        for name in given.names or NETWORKS:
            package, spec = NETWORKS[name]
            try:
                label = f"{package} {version(package)}"
            except PackageNotFoundError:
                print(f"| {package} | {name} | not installed | |", flush=True)
                continue
            cells = [build(spec, precision, given.resolution, Path(folder)) for precision in ("fp16", "int8")]
            print(f"| {label} | {name} | {cells[0]} | {cells[1]} |", flush=True)


if __name__ == "__main__":
    main()
