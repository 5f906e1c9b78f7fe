"""Wide residual networks for small images, plain or attention-augmented: WRN-28-10.

Sources: Zagoruyko and Komodakis, "Wide Residual Networks", arXiv 1605.07146; Bello et al., arXiv 1904.09925, section
4.1: the first convolution of every residual block is augmented. Where a block changes the shape, its shortcut averages
and adds zero channels: with it, and not with 1x1 convolutions, the published 36.3 M parameters come out.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from pcn_deploy.errors import OptionError
from pcn_deploy.models.attention_conv import AttentionAugmentedConv2d
from pcn_deploy.models.augmentation import Augmentation
from pcn_deploy.models.layers import initialise
from pcn_deploy.models.resnet import plain_conv3x3


class ZeroPadShortcut(nn.Module):
    """Averages over `stride` x `stride` pixels and appends channels of zeros: no parameters."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.missing = out_channels - in_channels

    def forward(self, x: Tensor) -> Tensor:
        """Map `(N, in_channels, H, W)` to `(N, out_channels, ceil(H / stride), ceil(W / stride))`."""
        if self.stride > 1:
            x = F.avg_pool2d(x, self.stride, self.stride, ceil_mode=True)
        if self.missing > 0:
            x = F.pad(x, [0, 0, 0, 0, 0, self.missing])
        return x


class WideBlock(nn.Module):
    """Pre-activation block of two 3x3 convolutions. Where the shape changes, the shortcut reads the activated input."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, first: nn.Module) -> None:
        super().__init__()
        self.changes_shape = stride != 1 or in_channels != out_channels
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = first
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.conv2 = plain_conv3x3(out_channels, out_channels, 1)
        self.shortcut = ZeroPadShortcut(in_channels, out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(N, in_channels, H, W)` to `(N, out_channels, ceil(H / stride), ceil(W / stride))`."""
        active = F.relu(self.bn1(x))
        y: Tensor = self.conv2(F.relu(self.bn2(self.conv1(active))))
        # a plain sum: the stream is read by a BatchNorm, in float, so quantising it would only cost accuracy
        sum_: Tensor = y + self.shortcut(active if self.changes_shape else x)
        return sum_


class WideResNet(nn.Module):
    """A wide residual network of three stages at 1, 1/2 and 1/4 of the size of the image.

    Args:
        depth: Convolutions along the main path: 6 n + 4 for n blocks per stage.
        widen: Factor on the widths 16, 32, 64.
        augmentation: How the first convolution of each block is augmented; None for a plain network.
        image_size: Side of the images that the tables of relative positions are made for, in pixels.
        num_classes: Number of logits.
        in_channels: Channels of the image.

    Raises:
        OptionError: If no such depth exists or a number is below 1.
    """

    def __init__(
        self,
        *,
        depth: int = 28,
        widen: int = 10,
        augmentation: Augmentation | None = None,
        image_size: int = 32,
        num_classes: int = 100,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        if depth < 10 or (depth - 4) % 6 or min(widen, image_size, num_classes, in_channels) < 1:
            msg = (
                f"depth={depth}, widen={widen}, image_size={image_size}, num_classes={num_classes}, "
                f"in_channels={in_channels}: the depth must be 6 n + 4, such as 16 or 28, and the rest at least 1."
            )
            raise OptionError(msg)
        self.num_classes = num_classes
        self.conv1 = plain_conv3x3(in_channels, 16, 1)
        stages: list[nn.Sequential] = []
        last_norms: list[nn.BatchNorm2d] = []
        channels = 16
        for index in range(3):
            width, side = 16 * 2**index * widen, -(-image_size // 2**index)
            blocks: list[nn.Module] = []
            for position in range((depth - 4) // 6):
                stride = 2 if index and not position else 1
                conv: nn.Module = plain_conv3x3(channels, width, stride)
                if augmentation is not None:
                    size = (side, side)
                    conv = AttentionAugmentedConv2d(
                        channels,
                        width,
                        3,
                        augmentation,
                        size=size,
                        stride=stride,
                        pooling=augmentation.pooled if index == 0 else "none",
                    )
                block = WideBlock(channels, width, stride, conv)
                blocks.append(block)
                last_norms.append(block.bn2)
                channels = width
            stages.append(nn.Sequential(*blocks))
        self.layer1, self.layer2, self.layer3 = stages
        self.bn = nn.BatchNorm2d(channels)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, num_classes)
        initialise(self, last_norms)

    def stage_features(self, images: Tensor) -> list[Tensor]:
        """Feature maps after each stage, at 1, 1/2 and 1/4 of the size of `(N, C, H, W)`, before activation."""
        first = self.layer1(self.conv1(images))
        second = self.layer2(first)
        return [first, second, self.layer3(second)]

    def forward(self, images: Tensor) -> Tensor:
        """Classify normalised images `(N, C, H, W)`; returns logits `(N, num_classes)`."""
        features = F.relu(self.bn(self.layer3(self.layer2(self.layer1(self.conv1(images))))))
        logits: Tensor = self.fc(self.avgpool(features).flatten(1))
        return logits
