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

Labelled = tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]
"""Transformed images and their classes."""

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
    network = create_model("patchconvnet", weights=EXAMPLES / "digits" / "digits.safetensors")
    transform, (calibration, _), (images, labels) = digits_images(512, limit)
    return Task("digits, patchconvnet", network, transform, calibration, images, labels)


def digits_images(calibration: int | None = None, limit: int | None = None) -> tuple[Transform, Labelled, Labelled]:
    """The transform of the digits, images of the train split and images of the test split, at most so many."""
    data = example_module("digits", "data")
    with tempfile.TemporaryDirectory() as folder:
        train, test = data.write_images(Path(folder))
        seen = ImageSource(train, data.TRANSFORM, limit=calibration)
        unseen = ImageSource(test, data.TRANSFORM, limit=limit)
        return data.TRANSFORM, next(seen.batches(len(seen))), next(unseen.batches(len(unseen)))


@cache
def _split(split: str, count: int | None) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    data = example_module("shapes", "data")
    pixels, labels = data.images(split, count)
    mean, std = (np.array(values, np.float32) for values in (data.TRANSFORM.mean, data.TRANSFORM.std))
    images = ((pixels.astype(np.float32) / 255 - mean) / std).transpose(0, 3, 1, 2)
    return np.ascontiguousarray(images, np.float32), labels


def _shapes(name: str, limit: int | None) -> Task:
    network = example_module("shapes", "networks").NETWORKS[name]()
    path = EXAMPLES / "shapes" / f"{name}.safetensors"
    load_strict(network, read_state_dict(path), str(path))
    images, labels = _split("test", limit)
    transform = example_module("shapes", "data").TRANSFORM
    return Task(f"shapes, {name}", network.eval(), transform, _split("calibration", None)[0], images, labels)


@cache
def example_module(folder: str, name: str) -> ModuleType:
    """A module of an example; both examples have one called `data`."""
    spec = importlib.util.spec_from_file_location(f"{folder}_{name}", EXAMPLES / folder / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
