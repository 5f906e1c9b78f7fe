"""The trained networks of the examples with their images: what benchmarks of accuracy run on."""

from __future__ import annotations

import importlib.util
import sys
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType

import numpy as np
import numpy.typing as npt
from torch import nn

from pcn_deploy import ImageSource, Transform, create_model
from pcn_deploy.models.checkpoint import load_strict, read_state_dict

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


@dataclass(frozen=True)
class Task:
    """A trained network and its images.

    Attributes:
        name: For tables.
        network: In evaluation mode.
        transform: What its images went through.
        calibration: Transformed calibration images `(N, 3, H, W)`, float32.
        images: Transformed test images `(N, 3, H, W)`, float32.
        labels: Their classes `(N,)`.
    """

    name: str
    network: nn.Module
    transform: Transform
    calibration: npt.NDArray[np.float32]
    images: npt.NDArray[np.float32]
    labels: npt.NDArray[np.int64]


def tasks(limit: int | None = None) -> list[Task]:
    """Every task; at most `limit` test images of each."""
    return [_digits(limit), _shapes("patchconvnet", limit), _shapes("aa_resnet", limit)]


def _digits(limit: int | None) -> Task:
    data = _module("digits", "data")
    network = create_model("patchconvnet", weights=EXAMPLES / "digits" / "digits.safetensors")
    with tempfile.TemporaryDirectory() as folder:
        train, test = data.write_images(Path(folder))
        calibration, _ = next(ImageSource(train, data.TRANSFORM, limit=512).batches(512))
        images, labels = next(ImageSource(test, data.TRANSFORM, limit=limit).batches(data.TEST_IMAGES))
    return Task("digits, patchconvnet", network, data.TRANSFORM, calibration, images, labels)


@cache
def _split(split: str, count: int | None) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    data = _module("shapes", "data")
    pixels, labels = data.images(split, count)
    mean, std = (np.array(values, np.float32) for values in (data.TRANSFORM.mean, data.TRANSFORM.std))
    images = ((pixels.astype(np.float32) / 255 - mean) / std).transpose(0, 3, 1, 2)
    return np.ascontiguousarray(images, np.float32), labels


def _shapes(name: str, limit: int | None) -> Task:
    network = _module("shapes", "networks").NETWORKS[name]()
    path = EXAMPLES / "shapes" / f"{name}.safetensors"
    load_strict(network, read_state_dict(path), str(path))
    images, labels = _split("test", limit)
    transform = _module("shapes", "data").TRANSFORM
    return Task(f"shapes, {name}", network.eval(), transform, _split("calibration", None)[0], images, labels)


@cache
def _module(folder: str, name: str) -> ModuleType:
    """A module of an example; both examples have one called `data`."""
    spec = importlib.util.spec_from_file_location(f"{folder}_{name}", EXAMPLES / folder / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
