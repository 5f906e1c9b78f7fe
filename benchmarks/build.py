"""End to end: our build of S60 in INT8 against the public pipeline, alternating, on this machine.

Usage: python benchmarks/build.py [--rounds 3] [--public-python .venv-public/bin/python]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

from measure import Row, print_rows, run_watched, verdict

HERE = Path(__file__).parent
MEMORY_LIMIT_MB = 1400
OURS = "build patchconvnet_s60 --random-weights --precision int8 --calibrator entropy --images 32"
TARGETS = ["--target", "cpu", "--target", "tensorrt-rtx"]


def ours(folder: Path, remainder: str) -> tuple[float, float]:
    """Seconds and peak MiB of one build by us."""
    command = [str(Path(sys.executable).with_name("pcn-compile")), *OURS.split(), *TARGETS]
    extra = ["--remainder", remainder, "-o", str(folder / "s60.pcn"), "--overwrite"]
    return run_watched(command + extra, folder / "ours.log")


def public(folder: Path, python: Path, remainder: str) -> tuple[float, float]:
    """Seconds and peak MiB of one run of the public pipeline."""
    script = str(HERE / "public_pipeline.py")
    command = [str(python), script, "--out", str(folder / "public"), "--high-precision", remainder]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    report = json.loads(done.stdout)
    print("   public stages:", report["seconds"], flush=True)
    return report["total_seconds"], report["peak_memory_mib"]["process_tree"]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--public-python", type=Path, default=Path(".venv-public/bin/python"))
    options = parser.parse_args()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for remainder in ("fp32", "fp16"):
            mine, theirs, memory = [], [], []
            for _ in range(options.rounds):
                seconds, peak = ours(folder, remainder)
                mine.append(seconds)
                memory.append(peak * 2**20 / 1e6)
                if options.public_python.exists():
                    theirs.append(public(folder, options.public_python, remainder)[0])
            rows.append((f"ours, rest {remainder}: median of {len(mine)}", f"{median(mine):.1f} s", "", ""))
            if theirs:
                ratio = median(mine) / median(theirs)
                rows.append((f"public pipeline, rest {remainder}", f"{median(theirs):.1f} s", "", ""))
                rows.append(("ours / public", f"{ratio:.2f}", "< 0.50", verdict(ratio < 0.5)))
            peak_mb = max(memory)
            rows.append(("ours, peak memory", f"{peak_mb:.0f} MB", "< 1400", verdict(peak_mb < MEMORY_LIMIT_MB)))
    print_rows("Checkpoint to INT8 TensorRT-RTX engine, PatchConvNet-S60, 32 images, entropy", rows)
    if not options.public_python.exists():
        print(f"{options.public_python} is missing: the public pipeline was not run. See public-requirements.txt.")


if __name__ == "__main__":
    main()
