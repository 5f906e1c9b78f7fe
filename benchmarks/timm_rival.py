"""FP16 and INT8 of an exported network with NVIDIA ModelOpt, in its own environment; run by timm_families.py.

Usage: python timm_rival.py FOLDER, where FOLDER holds what timm_build.py exported. Every result is one line of JSON.
All options are ModelOpt's defaults; the graphs are executed by ONNX Runtime as it comes.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from timm_measures import count_products, sqnr_db


def to_fp16(folder: Path, output: Path) -> None:
    from modelopt.onnx.autocast import convert_to_mixed_precision

    onnx.save(convert_to_mixed_precision(onnx_path=str(folder / "float.onnx"), low_precision_type="fp16"), output)


def to_int8(folder: Path, output: Path) -> None:
    from modelopt.onnx.quantization import quantize

    quantize(
        onnx_path=str(folder / "float.onnx"),
        quantize_mode="int8",
        calibration_data={"images": np.load(folder / "calibration.npz")["images"]},
        calibration_eps=["cpu"],
        output_path=str(output),
    )


def measure(folder: Path, precision: str, convert: Callable[[Path, Path], None]) -> dict[str, Any]:
    """Seconds, products and SQNR of one precision, or why there is none."""
    started, cpu = time.perf_counter(), time.process_time()
    result: dict[str, Any] = {"precision": precision}
    output = folder / f"{precision}.onnx"
    try:
        with redirect_stdout(sys.stderr):
            convert(folder, output)
        result["seconds"] = round(time.perf_counter() - started, 1)
        result |= count_products(onnx.load(output))
        session = ort.InferenceSession(output, providers=["CPUExecutionProvider"])
        unseen = np.load(folder / "unseen.npz")
        feed, wanted = session.get_inputs()[0], unseen["logits"]
        images = unseen["images"].astype(np.float16 if "16" in feed.type else np.float32)
        found = np.concatenate([session.run(None, {feed.name: image[None]})[0] for image in images])
        result["db"] = sqnr_db(wanted, found)
    except Exception as failure:  # whatever the tools raise
        result["refusal"] = f"{type(failure).__name__}: {(str(failure).splitlines() or [''])[0]}"
    result["cpu_seconds"] = round(time.process_time() - cpu, 1)
    return result


def main() -> None:
    folder = Path(sys.argv[1])
    for precision, convert in (("fp16", to_fp16), ("int8", to_int8)):
        print(json.dumps(measure(folder, precision, convert)), flush=True)


if __name__ == "__main__":
    main()
