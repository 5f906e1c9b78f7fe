"""Small networks of the kinds that people bring, trained here in minutes: what a default must be right on.

Six kinds (depthwise with ReLU6, depthwise with SiLU and squeeze-excite, the same with Hardswish, residual, attention,
depthwise with LayerNorm) on the drawn shapes at 32x32, three of them on the digits too. Training is short but real:
ranges, outliers and dead channels come from it. Weights are kept in a folder outside the repository and trained again
if they are not there.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from kinds_networks import KINDS, ON_DIGITS, SIDE
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from trained import Task, digits_images, example_module

from pcn_deploy import Transform

FOLDER = Path(__file__).resolve().parent.parent / "out" / "kinds"

BATCH, LEARNING_RATE, WEIGHT_DECAY = 64, 2e-3, 0.05
PLAIN_IMAGES, IMAGES, EPOCHS = 4_000, 6_000, 6
"""The shapes are seen with nothing in the way first, then as they are."""
DIGITS_EPOCHS = 30
TRANSFORM = Transform(resolution=(SIDE, SIDE), crop_pct=1.0, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))

Arrays = tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]


def tasks(limit: int = 1000, folder: Path = FOLDER) -> list[Task]:
    """Every kind, trained.

    Args:
        limit: Test images of each, at most.
        folder: Where weights are kept.
    """
    folder.mkdir(parents=True, exist_ok=True)
    found = []
    shapes, digits = _Shapes(limit), _Digits(limit)
    drawn, written = shapes.judged(), digits.judged()
    for name, make in KINDS.items():
        network = _trained(partial(make, shapes.classes), folder / f"shapes-{_plain(name)}.safetensors", shapes.train)
        found.append(Task(f"shapes, {name}", network, TRANSFORM, *drawn))
    for name in ON_DIGITS:
        network = _trained(partial(KINDS[name], 10), folder / f"digits-{_plain(name)}.safetensors", digits.train)
        found.append(Task(f"digits, {name}", network, digits.transform, *written))
    return found


def _plain(name: str) -> str:
    return name.replace(",", "").replace(" ", "-").lower()


class _Shapes:
    """The drawn shapes at half their size."""

    classes = 16

    def __init__(self, limit: int) -> None:
        self._limit = limit

    def judged(self) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32], npt.NDArray[np.int64]]:
        return self._split("calibration", 512)[0], *self._split("test", self._limit)

    def train(self) -> list[tuple[Arrays, int]]:
        return [(self._split("train", PLAIN_IMAGES, plain=True), 4), (self._split("train", IMAGES), EPOCHS)]

    def _split(self, split: str, count: int, *, plain: bool = False) -> Arrays:
        pixels, labels = example_module("shapes", "data").images(split, count, plain=plain)
        small = [np.asarray(Image.fromarray(image).resize((SIDE, SIDE), Image.Resampling.BOX)) for image in pixels]
        mean, std = (np.array(values, np.float32) for values in (TRANSFORM.mean, TRANSFORM.std))
        images = ((np.stack(small).astype(np.float32) / 255 - mean) / std).transpose(0, 3, 1, 2)
        return np.ascontiguousarray(images, np.float32), labels


class _Digits:
    """The digits of scikit-learn; images that trained calibrate too, as there are few."""

    def __init__(self, limit: int) -> None:
        self.transform, (self._images, self._labels), (self._others, self._other_labels) = digits_images()
        self._limit = limit

    def judged(self) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32], npt.NDArray[np.int64]]:
        spread = np.linspace(0, len(self._images) - 1, 512).round().astype(int)
        return self._images[spread], self._others[: self._limit], self._other_labels[: self._limit]

    def train(self) -> list[tuple[Arrays, int]]:
        return [((self._images, self._labels), DIGITS_EPOCHS)]


def _trained(make: Callable[[], nn.Module], path: Path, stages: Callable[[], list[tuple[Arrays, int]]]) -> nn.Module:
    torch.manual_seed(0)
    network = make()
    if not path.exists():
        _train(network, stages())
        save_file(network.state_dict(), path)
    network.load_state_dict(load_file(path))
    return network.eval()


def _train(network: nn.Module, stages: list[tuple[Arrays, int]]) -> None:
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    training = example_module(".", "training")
    recipe = training.Recipe(
        batch=BATCH, learning_rate=LEARNING_RATE, weight_decay=WEIGHT_DECAY, label_smoothing=0.05, max_norm=5.0
    )
    optimiser = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    total = sum(epochs * (len(labels) // BATCH) for (_, labels), epochs in stages)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimiser, LEARNING_RATE, total_steps=total + 1, pct_start=0.1)
    network.train()
    started = time.perf_counter()
    for (images, labels), epochs in stages:
        pixels, classes = torch.from_numpy(images), torch.from_numpy(labels)
        for epoch in range(epochs):
            right = 0
            for chosen in torch.randperm(len(pixels))[: len(pixels) // BATCH * BATCH].split(BATCH):
                x = pixels[chosen]
                if torch.rand(()) < 0.5:
                    x = torch.roll(x, tuple(torch.randint(-2, 3, (2,)).tolist()), (2, 3))
                logits, _ = training.take_step(network, x, classes[chosen], recipe, optimiser, rate)
                right += int((logits.argmax(1) == classes[chosen]).sum())
            share, seconds = 100 * right / len(pixels), time.perf_counter() - started
            print(f"  epoch {epoch}: {share:.1f} % of the training images, {seconds:.0f} s", file=sys.stderr)
