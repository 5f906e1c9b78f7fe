"""What a TensorRT-RTX engine is made of: weights, and the source of its kernels, which the device compiles.

Usage: python benchmarks/engine_size.py [NAME...]

Random weights, one build for each precision. Source is counted as runs of printable text, kernels by a function that
the text of each defines once.
"""

from __future__ import annotations

import re
import sys
from collections import Counter

import numpy as np
from family import PRECISIONS

import pcn_deploy
from pcn_deploy.models.registry import create_model, find_model

TEXT = re.compile(rb"[\t\n\r\x20-\x7e]{1000,}")
PRELUDE = re.compile(rb"__device__ __myln_bool (\w+)")
"""TensorRT-RTX 1.7 puts the same helper functions before every kernel."""


def row(name: str, precision: str) -> str:
    """Sizes in MB of the engine, of its source and of the rest, and the number of kernels."""
    info = find_model(name)
    assert info is not None
    options = pcn_deploy.CompileOptions(
        precision=precision,
        targets=("tensorrt-rtx",),
        transform=pcn_deploy.Transform(resolution=info.resolution),
        golden_images=2,
    )
    images = np.random.default_rng(0).standard_normal((4, 3, *info.resolution), dtype=np.float32)
    result = pcn_deploy.compile(
        create_model(name, random_weights=True), options, calibration=[images] if precision == "int8" else None
    )
    engine = result.bundle.read("engines/tensorrt-rtx.engine")
    source = [text.group() for text in TEXT.finditer(engine)]
    helpers = Counter(found for text in source for found in PRELUDE.findall(text))
    kernels = min(helpers.values(), default=0)
    size, text_size = len(engine) / 1e6, sum(map(len, source)) / 1e6
    return f"| {name} | {precision} | {size:.1f} | {kernels} | {text_size:.1f} | {size - text_size:.1f} |"


def main() -> None:
    print("| network | precision | engine, MB | kernels | their source, MB | the rest, MB |")
    print("|---|---|---:|---:|---:|---:|")
    for name in sys.argv[1:] or ["mnasnet_100", "aa_mnasnet_100"]:
        for precision in PRECISIONS:
            print(row(name, precision), flush=True)


if __name__ == "__main__":
    main()
