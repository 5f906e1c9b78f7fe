"""What the training scripts of the examples share: the optimiser, the schedule, a step and the loop around it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WARM_UP = 0.05
"""Share of the training in which the learning rate rises."""

Batches = tuple[Callable[[Tensor], Tensor], Tensor]
"""Makes the images `(n, C, H, W)` of chosen indices `(n,)`; and the classes of all images, `(N,)`."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a network is trained."""

    batch: int
    learning_rate: float
    weight_decay: float
    label_smoothing: float
    max_norm: float = 1.0


def make_optimiser(model: nn.Module, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW; only matrices and kernels decay, not biases, norms, LayerScale and class tokens."""
    decayed = [p for name, p in model.named_parameters() if p.ndim > 1 and name != "cls_token"]
    others = [p for name, p in model.named_parameters() if p.ndim <= 1 or name == "cls_token"]
    groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=recipe.learning_rate)


def schedule(progress: float) -> float:
    """Share of the learning rate at a point of the training, 0 to 1: linear warm-up, then cosine to zero."""
    if progress < WARM_UP:
        return progress / WARM_UP
    return 0.5 * (1 + math.cos(math.pi * (progress - WARM_UP) / (1 - WARM_UP)))


def take_step(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    recipe: Recipe,
    optimiser: torch.optim.Optimizer,
    rate: torch.optim.lr_scheduler.LRScheduler,
) -> tuple[Tensor, float]:
    """One step of the training; returns the logits `(n, K)` and the loss."""
    logits = model(images)
    loss = F.cross_entropy(logits, labels, label_smoothing=recipe.label_smoothing)
    optimiser.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), recipe.max_norm)
    optimiser.step()
    rate.step()
    return logits.detach(), loss.item()


def fit(
    model: nn.Module, recipe: Recipe, epochs: int, batches: Callable[[int], Batches], report_every: int = 1
) -> None:
    """Train in place; the last epoch is the result.

    Args:
        model: The network.
        recipe: How it is trained.
        epochs: How often it sees every image.
        batches: What it sees in each epoch, from 1 on; of the same number of images in all.
        report_every: Epochs from one line of progress to the next.
    """
    optimiser = make_optimiser(model, recipe)
    steps = len(batches(1)[1]) // recipe.batch
    rate = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: schedule((step + 1) / (epochs * steps + 1)))
    start = time.perf_counter()
    model.train()
    for epoch in range(1, epochs + 1):
        images, labels = batches(epoch)
        total = 0.0
        for chosen in torch.randperm(len(labels))[: steps * recipe.batch].split(recipe.batch):
            total += take_step(model, images(chosen), labels[chosen], recipe, optimiser, rate)[1]
        if epoch % report_every == 0 or epoch == epochs:
            print(f"epoch {epoch:3d}  loss {total / steps:.4f}  {time.perf_counter() - start:.0f} s", flush=True)
    model.eval()
