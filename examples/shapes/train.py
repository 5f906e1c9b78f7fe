"""Train one of the two networks on the drawn shapes, in minutes on two CPU cores.

Run it as `python examples/shapes/train.py patchconvnet` (or `aa_resnet`). It writes the weights beside this file; the
test split is looked at once, after the last epoch. torch does not promise equal bits on other processors, so a new run
may differ by a few images.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from data import TRANSFORM, images
from networks import NETWORKS
from safetensors.torch import save_file
from torch import Tensor, nn

PLAIN_EPOCHS, EPOCHS, BATCH, SEED = 4, 20, 64, 0
"""The first epochs see the shapes with nothing in the way; without them a PatchConvNet does not start to learn."""
LEARNING_RATE, WEIGHT_DECAY, LABEL_SMOOTHING, WARM_UP, MAX_NORM = 1e-3, 0.05, 0.05, 0.05, 5.0
MAX_SHIFT = 4
"""Pixels by which an image is shifted at random."""


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


def make_optimiser(model: nn.Module) -> torch.optim.AdamW:
    """AdamW; only matrices and kernels decay."""
    decayed = [p for name, p in model.named_parameters() if p.ndim > 1 and name != "cls_token"]
    others = [p for name, p in model.named_parameters() if p.ndim <= 1 or name == "cls_token"]
    groups = [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=LEARNING_RATE)


def schedule(progress: float) -> float:
    """Share of the learning rate at a point of the training, 0 to 1: linear warm-up, then cosine to zero."""
    if progress < WARM_UP:
        return progress / WARM_UP
    return 0.5 * (1 + math.cos(math.pi * (progress - WARM_UP) / (1 - WARM_UP)))


def train(model: nn.Module, epochs: int) -> None:
    """Train in place; the last epoch is the result."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    optimiser = make_optimiser(model)
    pixels, labels = load("train", plain=True)
    steps = len(pixels) // BATCH
    rate = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: schedule((step + 1) / (epochs * steps + 1)))
    start = time.perf_counter()
    model.train()
    for epoch in range(1, epochs + 1):
        if epoch == PLAIN_EPOCHS + 1:
            pixels, labels = load("train")
        total = 0.0
        for chosen in torch.randperm(len(pixels))[: steps * BATCH].split(BATCH):
            loss = F.cross_entropy(
                model(augment(normalise(pixels[chosen]))), labels[chosen], label_smoothing=LABEL_SMOOTHING
            )
            optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
            optimiser.step()
            rate.step()
            total += loss.item()
        print(f"epoch {epoch:3d}  loss {total / steps:.4f}  {time.perf_counter() - start:.0f} s", flush=True)
    model.eval()


@torch.inference_mode()
def accuracy(model: nn.Module, pixels: Tensor, labels: Tensor) -> float:
    """Share of images whose largest logit is their class, in percent."""
    answers = [model(normalise(part)).argmax(1) for part in pixels.split(BATCH)]
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
