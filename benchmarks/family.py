"""Every registered network in every precision: build time, engine size and peak memory, on this machine.

Usage: python benchmarks/family.py [NAME...] [--markdown benchmarks/family.md]

With --markdown the rows of that file are replaced or added, and those of other networks stay.

Each build is a process of its own: ONNX graph, TorchScript module and TensorRT-RTX engine, from random weights, proven
on golden images; for INT8, calibrated on 8 images. One round; about 40 minutes for all on two cores.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from measure import run_watched, verdict

from pcn_deploy import Bundle
from pcn_deploy.models.catalogue import ModelInfo
from pcn_deploy.models.registry import list_models

PRECISIONS = ("fp32", "fp16", "int8")
LARGEST, TIMES_WEIGHTS = "patchconvnet_l120", 4
HEAD = [
    "network",
    "FP32 weights, MB",
    *(f"{what} {precision.upper()}" for what in ("build, s:", "engine, MB:", "peak, MB:") for precision in PRECISIONS),
]


@dataclass(frozen=True)
class Built:
    """One build: seconds, bytes of the TensorRT-RTX engine, peak resident memory of the process tree in MB."""

    seconds: float
    engine_mb: float
    peak_mb: float


def build(name: str, precision: str, folder: Path) -> Built:
    """Build one network in a process of its own."""
    output, log = folder / "built.pcn", folder / "build.log"
    command = [str(Path(sys.executable).with_name("pcn-compile")), "build", name, "--random-weights", "--overwrite"]
    command += ["--precision", precision, "--images", "8", "--target", "cpu", "--target", "tensorrt-rtx"]
    try:
        seconds, peak = run_watched([*command, "-o", str(output)], log)
    except RuntimeError:
        print(log.read_text(), file=sys.stderr)
        raise
    engine = Bundle.open(output).engine("tensorrt-rtx").bytes
    return Built(seconds, engine / 1e6, peak * 2**20 / 1e6)


def row(info: ModelInfo, folder: Path) -> tuple[list[str], Built]:
    """The cells of one network, and its FP16 build."""
    built = {precision: build(info.name, precision, folder) for precision in PRECISIONS}
    cells = [info.name, f"{info.parameters * 4 / 1e6:.0f}"]
    cells += [f"{one.seconds:.1f}" for one in built.values()]
    cells += [f"{one.engine_mb:.1f}" for one in built.values()]
    cells += [f"{one.peak_mb:,.0f}" for one in built.values()]
    return cells, built["fp16"]


def keep(table: Path, cells: list[str]) -> None:
    """Replace or add the row of one network, in the order in which the networks are registered."""
    lines = table.read_text(encoding="utf-8").splitlines() if table.exists() else []
    rows = {line.split("|")[1].strip(): line for line in lines if line.startswith("|")}
    rows[cells[0]] = f"| {' | '.join(cells)} |"
    text = (
        "# Every network in every precision\n\nPrinted by `python benchmarks/family.py --markdown "
        f"benchmarks/family.md`, {platform.machine()}, {os.cpu_count()} cores, no GPU; one build each.\n\n"
    )
    head = [f"| {' | '.join(HEAD)} |", f"|---|{'---:|' * (len(HEAD) - 1)}"]
    ordered = [rows[info.name] for info in list_models() if info.name in rows]
    table.write_text(text + "\n".join([*head, *ordered]) + "\n", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--markdown", type=Path, help="keep the table in this file too")
    options = parser.parse_args()
    chosen = [info for info in list_models() if info.arguments and (not options.names or info.name in options.names)]
    print(" | ".join(HEAD), flush=True)
    reached = True
    with tempfile.TemporaryDirectory() as name:
        for info in chosen:
            cells, fp16 = row(info, Path(name))
            print(" | ".join(cells), flush=True)
            if options.markdown:
                keep(options.markdown, cells)
            if info.name == LARGEST:
                times = fp16.peak_mb * 1e6 / (info.parameters * 4)
                reached = times < TIMES_WEIGHTS
                limit = f"{LARGEST} in FP16: peak {times:.2f} x its FP32 weights, limit {TIMES_WEIGHTS}"
                print(f"{limit}: {verdict(reached)}", flush=True)
    return 0 if reached else 1


if __name__ == "__main__":
    sys.exit(main())
