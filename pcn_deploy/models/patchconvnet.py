"""PatchConvNet: a columnar convolutional trunk with attention-based aggregation.

Source: Touvron et al., "Augmenting Convolutional networks with attention-based aggregation", arXiv 2112.13692,
sections 3.1 to 3.4. The layout of the state dict is the official one, so official checkpoints load unchanged; the
one exception, the 1,000 separate heads of the multi-class-token form, is stacked by `models.checkpoint`.

Tensors stay `(N, C, H, W)` from the stem to the aggregation, so any height and width works.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pcn_deploy.errors import OptionError
from pcn_deploy.models.aggregation import NORM_EPS, TokenBlock
from pcn_deploy.models.layers import ChoosesResolution, LayerNorm2d, SqueezeExcite


class ConvStem(nn.Module):
    """One bias-free 3x3 convolution of stride 2 per halving of the patch, GELU between them.

    Args:
        in_channels: Channels of the image.
        width: Channels of the trunk, C.
        patch: Pixels per side of a patch; a power of two, 2 or more.
    """

    def __init__(self, in_channels: int, width: int, patch: int) -> None:
        super().__init__()
        steps = patch.bit_length() - 1
        if patch < 2 or patch != 2**steps or width % 2 ** (steps - 1):
            msg = (
                f"Patch {patch} with width {width}: the patch must be a power of two from 2 upwards, "
                "and the width divisible by half of it."
            )
            raise OptionError(msg)
        layers: list[nn.Module] = []
        for step in range(steps):
            out_channels = width // 2 ** (steps - 1 - step)
            layers += [nn.Sequential(nn.Conv2d(in_channels, out_channels, 3, 2, 1, bias=False)), nn.GELU()]
            in_channels = out_channels
        self.proj = nn.Sequential(*layers[:-1])

    def forward(self, images: Tensor) -> Tensor:
        """Map `(N, in_channels, H, W)` to `(N, C, ceil(H / patch), ceil(W / patch))`."""
        features: Tensor = self.proj(images)
        return features


class ConvMixer(nn.Module):
    """The convolutional body of a trunk block: 1x1, GELU, 3x3 depthwise, GELU, squeeze-excite, 1x1."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv_pos = nn.Sequential(
            nn.Conv2d(width, width, 1),
            nn.GELU(),
            nn.Conv2d(width, width, 3, padding=1, groups=width),
            nn.GELU(),
            SqueezeExcite(width),
            nn.Conv2d(width, width, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Mix `(N, C, H, W)`; same shape."""
        mixed: Tensor = self.qkv_pos(x)
        return mixed


class TrunkBlock(nn.Module):
    """Residual block of the trunk. `gamma_1` is None once LayerScale is folded into the last convolution."""

    def __init__(self, width: int, layer_scale: float) -> None:
        super().__init__()
        self.norm1 = LayerNorm2d(width, eps=NORM_EPS)
        self.attn = ConvMixer(width)
        self.gamma_1 = nn.Parameter(torch.full((width,), layer_scale))

    def forward(self, x: Tensor) -> Tensor:
        """Add the scaled body to `(N, C, H, W)`."""
        update: Tensor = self.attn(self.norm1(x))
        if self.gamma_1 is not None:
            update = update * self.gamma_1[:, None, None]
        return x + update


class PerClassHead(nn.Module):
    """One row of weights per class token: `logits[n, t] = tokens[n, t] . weight[t] + bias[t]`, as one product."""

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_classes, width))
        self.bias = nn.Parameter(torch.zeros(num_classes))
        nn.init.trunc_normal_(self.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map `(N, T, C)` to `(N, T)`."""
        return (tokens * self.weight).sum(-1) + self.bias


class PatchConvNet(ChoosesResolution):
    """A PatchConvNet of any width, depth, patch size and number of classes.

    Args:
        width: Channels of the trunk, C.
        depth: Number of trunk blocks.
        patch: Pixels per side of a patch, a power of two.
        num_classes: Number of logits.
        in_channels: Channels of the image.
        mlp_ratio: Hidden width of the token MLP over C.
        layer_scale: Initial value of LayerScale.
        multi_class_token: One class token per class instead of a single one.

    Raises:
        OptionError: If the stem cannot be built for this width and patch.
    """

    def __init__(
        self,
        *,
        width: int = 384,
        depth: int = 60,
        patch: int = 16,
        num_classes: int = 1000,
        in_channels: int = 3,
        mlp_ratio: float = 3.0,
        layer_scale: float = 1e-6,
        multi_class_token: bool = False,
    ) -> None:
        super().__init__()
        if min(width, depth, num_classes, in_channels) < 1 or not mlp_ratio > 0:
            msg = (
                f"width={width}, depth={depth}, num_classes={num_classes}, in_channels={in_channels}, "
                f"mlp_ratio={mlp_ratio}: all must be at least 1, and the ratio above 0."
            )
            raise OptionError(msg)
        self.patch = patch
        self.in_channels = in_channels
        self.num_classes = num_classes
        self.multi_class_token = multi_class_token
        self.cls_token = nn.Parameter(torch.empty(1, num_classes if multi_class_token else 1, width))
        self.patch_embed = ConvStem(in_channels, width, patch)
        self.blocks = nn.Sequential(*(TrunkBlock(width, layer_scale) for _ in range(depth)))
        self.blocks_token_only = nn.ModuleList(
            [TokenBlock(width, mlp_ratio, layer_scale, attend_token=not multi_class_token)]
        )
        self.norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.head: nn.Module
        self.head = PerClassHead(width, num_classes) if multi_class_token else nn.Linear(width, num_classes)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    @torch.jit.unused
    def check_resolution(self, height: int, width: int) -> None:
        """Refuse images smaller than one patch; every other size works.

        Raises:
            OptionError: If a side is below `patch` pixels.
        """
        if min(height, width) < self.patch:
            msg = f"Resolution {height}x{width} is smaller than one patch of {self.patch} pixels; set --resolution HxW."
            raise OptionError(msg)

    def stage_features(self, images: Tensor) -> list[Tensor]:
        """The patch grid after the stem and after the trunk, each `(N, C, ceil(H / patch), ceil(W / patch))`."""
        patches = self.patch_embed(images)
        return [patches, self.blocks(patches)]

    def forward(self, images: Tensor) -> Tensor:
        """Classify images.

        Args:
            images: Normalised images, float `(N, in_channels, H, W)`; any H and W.

        Returns:
            Logits, `(N, num_classes)`.
        """
        features = self.blocks(self.patch_embed(images))
        tokens = self.cls_token.expand(images.shape[0], -1, -1)
        for block in self.blocks_token_only:
            tokens, _ = block(tokens, features)
        tokens = self.norm(tokens)
        logits: Tensor = self.head(tokens if self.multi_class_token else tokens[:, 0])
        return logits
