"""ResNets, plain, attention-augmented or with attention-based aggregation.

The plain networks have torchvision's key layout and its place of the stride (the 3x3 convolution of a bottleneck), so
that its checkpoints load unchanged.

Sources: He et al., "Deep Residual Learning for Image Recognition", arXiv 1512.03385, table 1; Bello et al., arXiv
1904.09925, section 4.2: the 3x3 convolution of every block in the last three stages is augmented, with pooled attention
in the first of them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from pcn_deploy.errors import OptionError
from pcn_deploy.models.aggregation import AttentionPool2d
from pcn_deploy.models.attention_conv import AttentionAugmentedConv2d
from pcn_deploy.models.augmentation import Augmentation
from pcn_deploy.models.layers import ResidualAdd, initialise

MakeConv = Callable[[int, int, int], nn.Module]
"""Makes the 3x3 convolution of a block from its input channels, output channels and stride."""


def plain_conv3x3(in_channels: int, out_channels: int, stride: int) -> nn.Module:
    """A bias-free 3x3 convolution that keeps the size at stride 1."""
    return nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)


def _shortcut(in_channels: int, out_channels: int, stride: int) -> nn.Module:
    """What brings the input of a block to the shape of its output."""
    if stride == 1 and in_channels == out_channels:
        return nn.Identity()
    return nn.Sequential(nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions; the first has the stride and may be augmented."""

    expansion = 1

    def __init__(self, in_channels: int, width: int, stride: int, conv3x3: MakeConv) -> None:
        super().__init__()
        self.conv1 = conv3x3(in_channels, width, stride)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = plain_conv3x3(width, width, 1)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = _shortcut(in_channels, width, stride)
        self.add = ResidualAdd()

    def forward(self, x: Tensor) -> Tensor:
        """Map `(N, in_channels, H, W)` to `(N, width, H / stride, W / stride)`."""
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.add(self.bn2(self.conv2(y)), self.downsample(x)))


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1; the 3x3 has the stride and may be augmented."""

    expansion = 4

    def __init__(self, in_channels: int, width: int, stride: int, conv3x3: MakeConv) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = conv3x3(width, width, stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.downsample = _shortcut(in_channels, 4 * width, stride)
        self.add = ResidualAdd()

    def forward(self, x: Tensor) -> Tensor:
        """Map `(N, in_channels, H, W)` to `(N, 4 * width, H / stride, W / stride)`."""
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        return F.relu(self.add(self.bn3(self.conv3(y)), self.downsample(x)))


BLOCKS: dict[str, type[BasicBlock] | type[Bottleneck]] = {"basic": BasicBlock, "bottleneck": Bottleneck}


class ResNet(nn.Module):
    """A ResNet of four stages.

    Args:
        block: `basic` or `bottleneck`.
        depths: Blocks per stage.
        width: Channels of the stem and of the first stage's 3x3 convolutions; doubled from stage to stage.
        augmentation: How the last three stages are augmented; None for a plain network.
        attention_pool: Attention-based aggregation in the place of average pooling.
        image_size: Side of the images that the tables of relative positions are made for, in pixels. Images of any
            other height and width work.
        num_classes: Number of logits.
        in_channels: Channels of the image.

    Raises:
        OptionError: If the block is unknown or a number is below 1.
    """

    def __init__(
        self,
        *,
        block: str = "bottleneck",
        depths: tuple[int, ...] = (3, 4, 6, 3),
        width: int = 64,
        augmentation: Augmentation | None = None,
        attention_pool: bool = False,
        image_size: int = 224,
        num_classes: int = 1000,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        if block not in BLOCKS or len(depths) != 4 or min(*depths, width, image_size, num_classes, in_channels) < 1:
            msg = (
                f"block={block!r}, depths={depths}, width={width}, image_size={image_size}, num_classes={num_classes}, "
                f"in_channels={in_channels}: expected one of {tuple(BLOCKS)}, four stages, and numbers of at least 1."
            )
            raise OptionError(msg)
        self.num_classes = num_classes
        self.conv1 = nn.Conv2d(in_channels, width, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        stages: list[nn.Sequential] = []
        channels = width
        for index, depth in enumerate(depths):
            inner = width * 2**index
            reduction = 4 * 2**index
            conv3x3 = _augmented(augmentation, index, -(-image_size // reduction)) if index else plain_conv3x3
            blocks: list[nn.Module] = []
            for position in range(depth):
                stride = 2 if index and not position else 1
                blocks.append(BLOCKS[block](channels, inner, stride, conv3x3))
                channels = inner * BLOCKS[block].expansion
            stages.append(nn.Sequential(*blocks))
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.avgpool: nn.Module = AttentionPool2d(channels) if attention_pool else nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, num_classes)
        last = "bn2" if block == "basic" else "bn3"
        initialise(self, [getattr(module, last) for stage in stages for module in stage])

    def stem(self, images: Tensor) -> Tensor:
        """Map `(N, C, H, W)` to `(N, width, H / 4, W / 4)`, what the first stage reads."""
        reduced: Tensor = self.maxpool(F.relu(self.bn1(self.conv1(images))))
        return reduced

    def stage_features(self, images: Tensor) -> list[Tensor]:
        """Feature maps after each of the four stages, at 1/4, 1/8, 1/16 and 1/32 of the size of `(N, C, H, W)`."""
        first = self.layer1(self.stem(images))
        second = self.layer2(first)
        third = self.layer3(second)
        return [first, second, third, self.layer4(third)]

    def forward(self, images: Tensor) -> Tensor:
        """Classify normalised images `(N, C, H, W)`; returns logits `(N, num_classes)`."""
        features = self.layer4(self.layer3(self.layer2(self.layer1(self.stem(images)))))
        logits: Tensor = self.fc(self.avgpool(features).flatten(1))
        return logits


def _augmented(augmentation: Augmentation | None, stage: int, side: int) -> MakeConv:
    """The 3x3 convolution of a stage whose map is `side` x `side`."""
    if augmentation is None:
        return plain_conv3x3

    def make(in_channels: int, out_channels: int, stride: int) -> nn.Module:
        return AttentionAugmentedConv2d(
            in_channels,
            out_channels,
            3,
            augmentation,
            size=(side, side),
            stride=stride,
            pooling=augmentation.pooled if stage == 1 else "none",
        )

    return make
