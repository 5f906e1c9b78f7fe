"""Factories for networks of other packages: what `file.py:factory` looks like."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def efficientnet_b0(num_classes: int = 1000) -> nn.Module:
    """efficientnet-pytorch: the name is an argument there, so a factory gives it."""
    from efficientnet_pytorch import EfficientNet

    network: nn.Module = EfficientNet.from_name("efficientnet-b0", num_classes=num_classes)
    return network


class Logits(nn.Module):
    """A network of transformers returns a dataclass; an engine returns the logits."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.network(x).logits
        return logits


def transformers_resnet18_raw(num_classes: int = 1000) -> nn.Module:
    """As it comes: returns a dataclass, which is refused."""
    from transformers import ResNetConfig, ResNetForImageClassification

    widths = [64, 128, 256, 512]
    config = ResNetConfig(depths=[2, 2, 2, 2], hidden_sizes=widths, layer_type="basic", num_labels=num_classes)
    network: nn.Module = ResNetForImageClassification(config)
    return network


def transformers_resnet18(num_classes: int = 1000) -> nn.Module:
    """Wrapped: it does not script, but it exports, where checks of shapes are no obstacle."""
    return Logits(transformers_resnet18_raw(num_classes))
