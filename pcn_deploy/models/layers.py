"""Layers shared by the networks: scriptable, NCHW, any height and width."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BRANCH_SHARE = 0.2
"""Weight of the last BatchNorm of a fresh residual branch."""


class ChoosesResolution(nn.Module):
    """A network that does not take every resolution."""

    def check_resolution(self, height: int, width: int) -> None:
        """Refuse images of a size that the network cannot take, in pixels.

        Raises:
            OptionError: If it cannot; the message says which it can.
        """
        raise NotImplementedError


def check_resolution(network: nn.Module, height: int, width: int) -> None:
    """Ask a network that does not take every resolution whether it takes this one, in pixels.

    Raises:
        OptionError: If it does not.
    """
    if isinstance(network, ChoosesResolution):
        network.check_resolution(height, width)


class LayerNorm2d(nn.LayerNorm):
    """Layer normalisation over the channels of a feature map.

    The two permutations are views. They keep the operator a single `LayerNormalization` in ONNX, which TensorRT
    runs with FP32 statistics; a chain of mean and variance over axis 1 overflows in FP16 instead.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `(N, C, H, W)` over C; same shape and dtype."""
        x = F.layer_norm(x.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)


class ResidualAdd(nn.Module):
    """The addition at the end of a residual block, as a module: the planner finds it and may quantise its identity."""

    def forward(self, branch: Tensor, identity: Tensor) -> Tensor:
        """Add two tensors of one shape."""
        return branch + identity


def initialise(network: nn.Module, last_norms: Iterable[nn.BatchNorm2d]) -> None:
    """Give convolutions their usual random weights, and keep deep networks with fresh weights within FP16.

    In evaluation a fresh BatchNorm does not normalise, so the sum over many residual blocks would leave the range of
    FP16; hence the branches start small.

    Args:
        network: The network.
        last_norms: The last BatchNorm of each residual branch.

    Source: He et al., "Delving Deep into Rectifiers", arXiv 1502.01852, for the convolutions.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    for norm in last_norms:
        nn.init.constant_(norm.weight, BRANCH_SHARE)


class SqueezeExcite(nn.Module):
    """Channel gate: global mean, 1x1 to fewer channels, ReLU, 1x1 back, sigmoid.

    Args:
        channels: Channels of the map.
        hidden: Channels between the two convolutions; a quarter by default, as in PatchConvNet.

    Source: Hu et al., "Squeeze-and-Excitation Networks", arXiv 1709.01507, section 3.
    """

    def __init__(self, channels: int, hidden: int | None = None) -> None:
        super().__init__()
        hidden = hidden or channels // 4
        self.conv_reduce = nn.Conv2d(channels, hidden, 1)
        self.conv_expand = nn.Conv2d(hidden, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Scale each channel of `(N, C, H, W)`; same shape and dtype."""
        gate = self.conv_expand(F.relu(self.conv_reduce(x.mean((2, 3), keepdim=True))))
        return x * torch.sigmoid(gate)
