"""Quantise a graph with NVIDIA ModelOpt, in its own environment (public-requirements.txt); run by rivals.py.

Usage: python rival_modelopt.py FOLDER OUTPUT METHOD, where FOLDER holds fp32.onnx, calibration.npz and nodes.txt.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np
import onnx
from modelopt.onnx.quantization import quantize


def main() -> None:
    folder, output, method = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    wanted = set((folder / "nodes.txt").read_text().splitlines())
    kinds = {"Conv", "Gemm", "MatMul"}
    nodes = onnx.load(folder / "fp32.onnx").graph.node
    others = [node.name for node in nodes if node.op_type in kinds and node.name not in wanted]
    quantize(
        onnx_path=str(folder / "fp32.onnx"),
        quantize_mode="int8",
        calibration_data={"images": np.load(folder / "calibration.npz")["images"]},
        calibration_method=method,
        calibration_eps=["cpu"],
        op_types_to_quantize=sorted(kinds),
        nodes_to_exclude=[re.escape(name) for name in others],
        high_precision_dtype="fp32",
        output_path=output,
    )


if __name__ == "__main__":
    main()
