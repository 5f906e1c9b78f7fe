"""Train one of the two networks on the drawn shapes, in minutes on two CPU cores.

Run it as `python examples/shapes/train.py patchconvnet` (or `aa_resnet`). It writes the weights beside this file; the
test split is looked at once, after the last epoch. torch does not promise equal bits on other processors, so a new run
may differ by a few images.
"""

from __future__ import annotations

import argparse
import sys
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from data import TRANSFORM, images
from networks import NETWORKS
from safetensors.torch import save_file
from torch import Tensor, nn

sys.path.append(str(Path(__file__).resolve().parents[1]))
from training import Batches, Recipe, fit

PLAIN_EPOCHS, EPOCHS, SEED = 4, 20, 0
"""The first epochs see the shapes with nothing in the way; without them a PatchConvNet does not start to learn."""
RECIPE = Recipe(batch=64, learning_rate=1e-3, weight_decay=0.05, label_smoothing=0.05, max_norm=5.0)
MAX_SHIFT = 4
"""Pixels by which an image is shifted at random."""


@lru_cache(maxsize=1)
def load(split: str, *, plain: bool = False) -> tuple[Tensor, Tensor]:
    """A split as uint8 `(N, 3, 64, 64)`, with its classes `(N,)`."""
    pixels, labels = images(split, plain=plain)
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))), torch.from_numpy(labels)


def normalise(pixels: Tensor) -> Tensor:
    """What `TRANSFORM` does to an image of this size."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (TRANSFORM.mean, TRANSFORM.std))
    return (pixels.float() / 255 - mean) / std


def augment(pixels: Tensor) -> Tensor:
    """Shift each image of `(N, C, H, W)` at random; the edge is repeated."""
    padded = F.pad(pixels, [MAX_SHIFT] * 4, mode="replicate")
    side = pixels.shape[-1]
    shifts = torch.randint(0, 2 * MAX_SHIFT + 1, (len(pixels), 2)).tolist()
    return torch.stack([image[:, y : y + side, x : x + side] for image, (y, x) in zip(padded, shifts, strict=True)])


def train(model: nn.Module, epochs: int) -> None:
    """Train in place; the last epoch is the result."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")

    def batches(epoch: int) -> Batches:
        pixels, labels = load("train", plain=epoch <= PLAIN_EPOCHS)
        return lambda chosen: augment(normalise(pixels[chosen])), labels

    fit(model, RECIPE, epochs, batches)


@torch.inference_mode()
def accuracy(model: nn.Module, pixels: Tensor, labels: Tensor) -> float:
    """Share of images whose largest logit is their class, in percent."""
    answers = [model(normalise(part)).argmax(1) for part in pixels.split(RECIPE.batch)]
    return 100 * float((torch.cat(answers) == labels).float().mean())


def main() -> None:
    """Draw the images, train, save the weights, and print the accuracy on the test split."""
    here = Path(__file__).resolve().parent
    parser = argparse.ArgumentParser(description="Train on the drawn shapes.")
    parser.add_argument("network", choices=NETWORKS)
    parser.add_argument("--output", type=Path, help="weights to write")
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(SEED)
    model = NETWORKS[given.network]()
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    train(model, given.epochs)
    save_file(model.state_dict(), given.output or here / f"{given.network}.safetensors")
    print(f"top-1 on the test split: {accuracy(model, *load('test')):.2f} %")


if __name__ == "__main__":
    main()
