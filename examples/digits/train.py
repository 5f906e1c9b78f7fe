"""Train a small PatchConvNet on handwritten digits, in a few minutes on two CPU cores.

Run it as `python examples/digits/train.py`. It writes `digits.safetensors` beside this file. The test split
is looked at once, after the last epoch. torch does not promise equal bits on other processors, so a new run may
differ by an image or two.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from data import NUM_CLASSES, TRANSFORM, write_images
from safetensors.torch import save_file
from torch import Tensor, nn

sys.path.append(str(Path(__file__).resolve().parents[1]))
from training import Recipe, fit

import pcn_deploy
from pcn_deploy import ImageSource

WIDTH, DEPTH, PATCH = 64, 5, 4
LAYER_SCALE = 0.1  # large for a LayerScale: the blocks must matter after a short training
EPOCHS, SEED = 150, 0
RECIPE = Recipe(batch=64, learning_rate=2e-3, weight_decay=0.05, label_smoothing=0.1)
MAX_DEGREES, MAX_SHIFT, MAX_ZOOM = 12.0, 0.12, 0.12  # shift as a share of half the image


def load_split(folder: Path) -> tuple[Tensor, Tensor]:
    """Every image of a split through `TRANSFORM`, `(N, 3, 32, 32)`, and its class, `(N,)`."""
    source = ImageSource(folder, TRANSFORM)
    images, labels = next(source.batches(len(source)))
    if labels is None:
        raise SystemExit(f"{folder} holds no classes.")
    return torch.from_numpy(images), torch.from_numpy(labels)


def augment(images: Tensor) -> Tensor:
    """Turn, zoom and shift each image of `(N, C, H, W)` at random."""
    angle, zoom, dx, dy = torch.empty(4, len(images)).uniform_(-1, 1)
    angle, zoom = angle * math.radians(MAX_DEGREES), 1 + zoom * MAX_ZOOM
    cos, sin = angle.cos() * zoom, angle.sin() * zoom
    rows = (torch.stack((cos, -sin, dx * MAX_SHIFT), 1), torch.stack((sin, cos, dy * MAX_SHIFT), 1))
    grid = F.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def train(model: nn.Module, images: Tensor, labels: Tensor, epochs: int) -> None:
    """Train in place; the last epoch is the result."""
    fit(model, RECIPE, epochs, lambda _: (lambda chosen: augment(images[chosen]), labels), report_every=10)


@torch.inference_mode()
def count_correct(model: nn.Module, images: Tensor, labels: Tensor) -> int:
    """Number of images whose largest logit is their class."""
    return sum(
        int((model(part).argmax(1) == truth).sum())
        for part, truth in zip(images.split(RECIPE.batch), labels.split(RECIPE.batch), strict=True)
    )


def describe_layer_scale(model: nn.Module) -> str:
    """Mean magnitude of `gamma_1` per trunk block: near zero would mean that the block does nothing."""
    gammas = [p.detach().abs().mean() for name, p in model.named_parameters() if name.endswith("gamma_1")]
    return ", ".join(f"{gamma:.3f}" for gamma in gammas)


def main() -> None:
    """Write the images, train, save the weights, and print the accuracy on the test split."""
    here = Path(__file__).resolve().parent
    parser = argparse.ArgumentParser(description="Train a small PatchConvNet on handwritten digits.")
    parser.add_argument("--images", type=Path, default=Path("out/digits"), help="folder for the image files")
    parser.add_argument("--output", type=Path, default=here / "digits.safetensors", help="weights to write")
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(SEED)
    train_folder, test_folder = write_images(given.images)
    model = pcn_deploy.create_model(
        "patchconvnet",
        random_weights=True,
        seed=SEED,
        width=WIDTH,
        depth=DEPTH,
        patch=PATCH,
        num_classes=NUM_CLASSES,
        layer_scale=LAYER_SCALE,
    )
    train(model, *load_split(train_folder), given.epochs)
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, given.output)
    images, labels = load_split(test_folder)
    correct = count_correct(model, images, labels)
    print(f"{given.output}: {given.output.stat().st_size / 1024:.0f} KiB")
    print(f"mean |gamma_1| per block, the token block last: {describe_layer_scale(model)}")
    print(f"test top-1: {100 * correct / len(labels):.2f} % ({correct} of {len(labels)} images)")


if __name__ == "__main__":
    main()
