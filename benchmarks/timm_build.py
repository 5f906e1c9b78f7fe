"""The parts of timm_families.py that need timm: build a network with this library, or export it for a rival.

Usage: python timm_build.py ours NAME RESOLUTION FOLDER
       python timm_build.py export NAME RESOLUTION FOLDER

Every result is one line of JSON on standard output. `export` writes float.onnx, calibration.npz and unseen.npz.
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from timm_measures import count_products, sqnr_db
from timm_network import MEAN, STD, create, photographs
from torch import nn

CALIBRATION_IMAGES, UNSEEN_IMAGES = 32, 16


def ours(network: nn.Module, resolution: int) -> None:
    """Build in both precisions; a refusal, or a failure that is none, is a result too."""
    import pcn_deploy
    from pcn_deploy.artefact.engine import Engine
    from pcn_deploy.data.transform import Transform
    from pcn_deploy.errors import PcnDeployError

    calibration = photographs(CALIBRATION_IMAGES, resolution, part="calibration")
    unseen = photographs(UNSEEN_IMAGES, resolution, part="unseen")
    transform = Transform(resolution=(resolution, resolution), mean=MEAN, std=STD)
    for precision in ("fp16", "int8"):
        started, cpu = time.perf_counter(), time.process_time()
        result: dict[str, Any] = {"precision": precision}
        try:
            options = pcn_deploy.CompileOptions(precision=precision, transform=transform)
            built = pcn_deploy.compile(network, options, calibration=[calibration])
            result["seconds"] = round(time.perf_counter() - started, 1)
            result["passed"] = bool(built)
            result |= count_products(onnx.load_from_string(built.bundle.read("model.onnx")))
            result["vectors"] = sum("matrix times vector" in entry.reason for entry in built.plan.entries)
            with Engine.open(built.bundle, "cpu") as engine:
                result["db"] = sqnr_db(reference(network, unseen), np.asarray(engine(unseen)))
        except PcnDeployError as error:
            result["refusal"] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            result["words"] = str(error)
        except Exception as error:
            result["failure"] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        result["cpu_seconds"] = round(time.process_time() - cpu, 1)
        print(json.dumps(result), flush=True)


def export(network: nn.Module, resolution: int, folder: Path) -> None:
    """What a user of the public tools does first."""
    started, cpu = time.perf_counter(), time.process_time()
    result: dict[str, Any] = {"precision": "fp32"}
    unseen = photographs(UNSEEN_IMAGES, resolution, part="unseen")
    np.savez(folder / "calibration.npz", images=photographs(CALIBRATION_IMAGES, resolution, part="calibration"))
    np.savez(folder / "unseen.npz", images=unseen, logits=reference(network, unseen))
    try:
        torch.onnx.export(
            network,
            (torch.zeros(1, 3, resolution, resolution),),
            folder / "float.onnx",
            dynamo=True,
            input_names=["images"],
            output_names=["logits"],
            verbose=False,
        )
        result["seconds"] = round(time.perf_counter() - started, 1)
    except Exception as error:
        result["refusal"] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    result["cpu_seconds"] = round(time.process_time() - cpu, 1)
    print(json.dumps(result), flush=True)


def reference(network: nn.Module, images: np.ndarray[Any, np.dtype[np.float32]]) -> np.ndarray[Any, Any]:
    """Logits of the eager network."""
    with torch.inference_mode():
        return np.asarray(torch.cat([network(torch.from_numpy(image[None])) for image in images]))


def main() -> None:
    what, name, resolution, folder = sys.argv[1], sys.argv[2], int(sys.argv[3]), Path(sys.argv[4])
    warnings.simplefilter("ignore")
    network = create(name, resolution)
    if what == "ours":
        ours(network, resolution)
    else:
        export(network, resolution, folder)


if __name__ == "__main__":
    main()
