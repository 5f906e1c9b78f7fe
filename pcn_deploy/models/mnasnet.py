"""MnasNet-A1 at any width multiplier, plain or attention-augmented.

The key layout is timm's (its `semnasnet_*` are this network), so those checkpoints load unchanged.

Sources: Tan et al., "MnasNet", arXiv 1807.11626, figure 7. Augmented are the 1x1 expansions from the stage at 1/8 of
the image on, 13 blocks, with attention pooled where the map is larger than 1/16 of the image: see docs/models.md.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from pcn_deploy.errors import OptionError
from pcn_deploy.models.attention_conv import AttentionAugmentedConv2d
from pcn_deploy.models.augmentation import Augmentation
from pcn_deploy.models.layers import ResidualAdd, SqueezeExcite, initialise


@dataclass(frozen=True)
class Stage:
    """Blocks of one shape: their number, kernel, stride of the first, expansion, channels, and the gate or none."""

    blocks: int
    kernel: int
    stride: int
    expansion: int
    channels: int
    gated: bool


STAGES = (
    Stage(2, 3, 2, 6, 24, gated=False),
    Stage(3, 5, 2, 3, 40, gated=True),
    Stage(4, 3, 2, 6, 80, gated=False),
    Stage(2, 3, 1, 6, 112, gated=True),
    Stage(3, 5, 2, 6, 160, gated=True),
    Stage(1, 3, 1, 6, 320, gated=False),
)
FIRST_AUGMENTED = 1
UNPOOLED_FROM = 16
"""From this reduction of the image on, attention reads the whole map."""


def scaled(channels: int, multiplier: float) -> int:
    """Channels times the multiplier, to the nearest multiple of 8, at most a tenth smaller."""
    wanted = channels * multiplier
    rounded = max(8, int(wanted + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * wanted else rounded


class SeparableConv(nn.Module):
    """Depthwise 3x3, then 1x1: the first block."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv_dw = nn.Conv2d(in_channels, in_channels, 3, 1, 1, groups=in_channels, bias=False)
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv_pw = nn.Conv2d(in_channels, out_channels, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(N, in_channels, H, W)` to `(N, out_channels, H, W)`."""
        y: Tensor = self.bn2(self.conv_pw(F.relu(self.bn1(self.conv_dw(x)))))
        return y


class InvertedResidual(nn.Module):
    """1x1 expansion, depthwise convolution, gate, 1x1 projection; a residual where the shape stays."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, stage: Stage, expand: nn.Module) -> None:
        super().__init__()
        hidden = in_channels * stage.expansion
        self.has_residual = stride == 1 and in_channels == out_channels
        self.conv_pw = expand
        self.bn1 = nn.BatchNorm2d(hidden)
        self.conv_dw = nn.Conv2d(hidden, hidden, stage.kernel, stride, stage.kernel // 2, groups=hidden, bias=False)
        self.bn2 = nn.BatchNorm2d(hidden)
        self.se: nn.Module = SqueezeExcite(hidden, in_channels // 4) if stage.gated else nn.Identity()
        self.conv_pwl = nn.Conv2d(hidden, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.add = ResidualAdd()

    def forward(self, x: Tensor) -> Tensor:
        """Map `(N, in_channels, H, W)` to `(N, out_channels, ceil(H / stride), ceil(W / stride))`."""
        y = F.relu(self.bn1(self.conv_pw(x)))
        y = self.se(F.relu(self.bn2(self.conv_dw(y))))
        y = self.bn3(self.conv_pwl(y))
        projected: Tensor = self.add(y, x) if self.has_residual else y
        return projected


class MnasNet(nn.Module):
    """MnasNet-A1.

    Args:
        multiplier: Factor on the channels of every stage.
        augmentation: How the expansions from the stage at 1/8 of the image on are augmented; None for a plain network.
        image_size: Side of the images that the tables of relative positions are made for, in pixels. Images of any
            other height and width work.
        num_classes: Number of logits.
        in_channels: Channels of the image.

    Raises:
        OptionError: If a number is too small.
    """

    def __init__(
        self,
        *,
        multiplier: float = 1.0,
        augmentation: Augmentation | None = None,
        image_size: int = 224,
        num_classes: int = 1000,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        if not multiplier > 0 or min(image_size, num_classes, in_channels) < 1:
            msg = (
                f"multiplier={multiplier}, image_size={image_size}, num_classes={num_classes}, "
                f"in_channels={in_channels}: the multiplier must be above 0, the rest at least 1."
            )
            raise OptionError(msg)
        self.num_classes = num_classes
        channels = scaled(32, multiplier)
        self.conv_stem = nn.Conv2d(in_channels, channels, 3, 2, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        first = scaled(16, multiplier)
        stages: list[nn.Module] = [nn.Sequential(SeparableConv(channels, first))]
        channels, reduction = first, 2
        for index, stage in enumerate(STAGES):
            out_channels = scaled(stage.channels, multiplier)
            blocks: list[nn.Module] = []
            for position in range(stage.blocks):
                stride = 1 if position else stage.stride
                augmented = augmentation if index >= FIRST_AUGMENTED else None
                expand = _expansion(channels, channels * stage.expansion, augmented, image_size, reduction)
                blocks.append(InvertedResidual(channels, out_channels, stride, stage, expand))
                channels, reduction = out_channels, reduction * stride
            stages.append(nn.Sequential(*blocks))
        self.blocks = nn.Sequential(*stages)
        self.conv_head = nn.Conv2d(channels, 1280, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(1280)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(1280, num_classes)
        initialise(self, [module.bn3 for module in self.modules() if isinstance(module, InvertedResidual)])

    def stem(self, images: Tensor) -> Tensor:
        """Map `(N, C, H, W)` to half its height and width, what the first stage reads."""
        return F.relu(self.bn1(self.conv_stem(images)))

    def stage_features(self, images: Tensor) -> list[Tensor]:
        """Feature maps after each of the seven stages, for images `(N, C, H, W)`."""
        x = self.stem(images)
        features: list[Tensor] = []
        for stage in self.blocks:
            x = stage(x)
            features.append(x)
        return features

    def forward(self, images: Tensor) -> Tensor:
        """Classify normalised images `(N, C, H, W)`; returns logits `(N, num_classes)`."""
        features = self.blocks(self.stem(images))
        x = F.relu(self.bn2(self.conv_head(features)))
        logits: Tensor = self.classifier(self.avgpool(x).flatten(1))
        return logits


def _expansion(
    channels: int, hidden: int, augmentation: Augmentation | None, image_size: int, reduction: int
) -> nn.Module:
    """The 1x1 convolution at the start of a block, on a map of 1 / `reduction` of the image."""
    if augmentation is None:
        return nn.Conv2d(channels, hidden, 1, bias=False)
    side = -(-image_size // reduction)
    pooling = augmentation.pooled if reduction < UNPOOLED_FROM else "none"
    return AttentionAugmentedConv2d(channels, hidden, 1, augmentation, size=(side, side), pooling=pooling)
