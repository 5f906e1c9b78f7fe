"""Small networks, images and a figure that the tests of recovery share."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from pcn_deploy import CompileOptions, ImageSource, Transform
from pcn_deploy.calibration.quantized import apply_scales
from pcn_deploy.models.attention_conv import AttentionAugmentedConv2d
from pcn_deploy.models.augmentation import Augmentation
from pcn_deploy.progress import silent
from pcn_deploy.tasks.classification import LogitsMeter
from pcn_deploy.verbs.steps.preparation import prepare
from pcn_deploy.verbs.steps.prepared import Prepared

SHAPE = (3, 12, 12)
TRANSFORM = Transform(resolution=SHAPE[1:])


def images(count: int = 16, seed: int = 0) -> npt.NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal((count, *SHAPE), dtype=np.float32)


def source() -> ImageSource:
    return ImageSource([images()], TRANSFORM)


class TwoReaders(nn.Module):
    """One tensor, read by two convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.left, self.right = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 1), nn.Conv2d(16, 32, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        return torch.cat((self.left(x).mean((2, 3)), self.right(x).mean((2, 3))), 1)


class AugmentedPair(nn.Module):
    """An augmented convolution with pooled attention between two plain ones."""

    def __init__(self) -> None:
        super().__init__()
        augmentation = Augmentation(heads=2, kappa=0.5, upsilon=0.5, min_head_channels=4)
        self.before = nn.Conv2d(3, 16, 3, padding=1)
        self.augmented = AttentionAugmentedConv2d(16, 32, 3, augmentation, size=(12, 12), pooling="attention")
        self.after = nn.Conv2d(32, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.augmented(torch.relu(self.before(x))))
        pooled: Tensor = self.after(x).mean((2, 3))
        return pooled


def prepared(
    net: nn.Module, recovery: tuple[str, ...], given: npt.NDArray[np.float32] | None = None, **options: str
) -> Prepared:
    chosen = CompileOptions(
        **{"precision": "int8", "calibrator": "max", "transform": TRANSFORM, "recovery": recovery, **options}  # type: ignore[arg-type]
    )
    return prepare(net, chosen, ImageSource([images() if given is None else given], TRANSFORM), silent)


def logits_sqnr(net: nn.Module, recovery: tuple[str, ...], given: npt.NDArray[np.float32] | None = None) -> float:
    """SQNR of the INT8 logits on images that did not calibrate, in dB."""
    network = prepared(net, recovery, given)
    x = torch.from_numpy(images(32, seed=9))
    meter = LogitsMeter()
    with torch.inference_mode():
        meter.update(net(x).numpy(), apply_scales(network.deployed, network.scales)(x).numpy())
    return meter.metrics()["sqnr_db"]
