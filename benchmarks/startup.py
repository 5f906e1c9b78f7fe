"""How fast the command line answers, and that importing the package imports no framework.

Usage: python benchmarks/startup.py
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from statistics import median

from measure import interleaved, print_rows, verdict

HELP_LIMIT_S = 0.4
FRAMEWORKS = ("torch", "onnx", "onnxruntime", "tensorrt", "tensorrt_rtx", "tensorrt_rtx_bindings")


def main() -> None:
    command = [str(Path(sys.executable).with_name("pcn-compile")), "--help"]
    build = [*command[:1], "build", "--help"]
    functions = {
        "pcn-compile --help": lambda: subprocess.run(command, check=True, capture_output=True),
        "pcn-compile build --help": lambda: subprocess.run(build, check=True, capture_output=True),
    }
    times = interleaved(dict(functions), rounds=10, warmup=2)
    seconds = {name: median(values) / 1000 for name, values in times.items()}
    code = f"import sys, pcn_deploy; print([m for m in {FRAMEWORKS} if m in sys.modules])"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip()
    rows = [
        (name, f"{value:.2f} s", f"< {HELP_LIMIT_S}", verdict(value < HELP_LIMIT_S)) for name, value in seconds.items()
    ]
    rows.append(("frameworks loaded by import pcn_deploy", loaded, "[]", verdict(loaded == "[]")))
    print_rows("Start", rows)


if __name__ == "__main__":
    main()
