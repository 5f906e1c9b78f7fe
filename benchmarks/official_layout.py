"""PatchConvNet-S60 in the layout of the official release, for comparison only.

The library's own definition keeps feature maps as (batch, channel, height, width). This one keeps tokens as
(batch, token, channel) and turns them into a square map and back in every block, as the official model does:
a public tool chain then sees the graph a user would give it. It serves the benchmarks; do not deploy it. A
non-square input whose token count is a perfect square gives wrong results without an error.

The state-dict keys are those of the official checkpoints. Inference only: no dropout and no drop path.
"""

import math
from itertools import pairwise

import torch
from torch import nn

LAYER_NORM_EPS = 1e-6
STEM_WIDTHS = (8, 4, 2, 1)  # divisors of the embedding width, one per stride-2 convolution
SQUEEZE_DIVISOR = 4
TOKEN_MLP_RATIO = 3


class SqueezeExcite(nn.Module):
    """Gate every channel by a function of the channel means."""

    def __init__(self, width: int) -> None:
        super().__init__()
        squeezed = width // SQUEEZE_DIVISOR
        self.conv_reduce = nn.Conv2d(width, squeezed, kernel_size=1)
        self.act1 = nn.ReLU()
        self.conv_expand = nn.Conv2d(squeezed, width, kernel_size=1)
        self.gate = nn.Sigmoid()

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        means = maps.mean(dim=(2, 3), keepdim=True)
        return maps * self.gate(self.conv_expand(self.act1(self.conv_reduce(means))))


class ConvStem(nn.Module):
    """Four stride-2 convolutions, then one token per remaining pixel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        widths = [3, *(width // divisor for divisor in STEM_WIDTHS)]
        layers: list[nn.Module] = []
        for source, target in pairwise(widths):
            if layers:
                layers.append(nn.GELU())
            conv = nn.Conv2d(source, target, kernel_size=3, stride=2, padding=1, bias=False)
            layers.append(nn.Sequential(conv))  # the wrapper puts the extra ".0" into the key
        self.proj = nn.Sequential(*layers)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.proj(images).flatten(2).transpose(1, 2)


class SpatialMixer(nn.Module):
    """The convolutional body of a trunk block, between two changes of layout."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv_pos = nn.Sequential(
            nn.Conv2d(width, width, kernel_size=1),
            nn.GELU(),
            nn.Conv2d(width, width, kernel_size=3, padding=1, groups=width),
            nn.GELU(),
            SqueezeExcite(width),
            nn.Conv2d(width, width, kernel_size=1),
        )

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        batch, count, width = tokens.shape
        side = math.isqrt(count)
        maps = tokens.transpose(1, 2).reshape(batch, width, side, side)
        return self.qkv_pos(maps).reshape(batch, width, count).transpose(1, 2)


class TrunkBlock(nn.Module):
    """Norm, spatial mixing and scale on a residual branch."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.attn = SpatialMixer(width)
        self.gamma_1 = nn.Parameter(torch.full((width,), 1e-4))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return tokens + self.gamma_1 * self.attn(self.norm1(tokens))


class ClassAttention(nn.Module):
    """One query, the class token, over the class token and all patches."""

    def __init__(self, width: int, heads: int = 1) -> None:
        super().__init__()
        self.heads = heads
        self.scale = (width // heads) ** -0.5
        self.q = nn.Linear(width, width)
        self.k = nn.Linear(width, width)
        self.v = nn.Linear(width, width)
        self.proj = nn.Linear(width, width)

    def _split(self, tokens: torch.Tensor) -> torch.Tensor:
        batch, count, width = tokens.shape
        return tokens.reshape(batch, count, self.heads, width // self.heads).transpose(1, 2)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        query = self._split(self.q(tokens[:, :1])) * self.scale
        keys, values = self._split(self.k(tokens)), self._split(self.v(tokens))
        weights = (query @ keys.transpose(-2, -1)).softmax(dim=-1)
        return self.proj((weights @ values).transpose(1, 2).flatten(2))


class TokenMlp(nn.Module):
    """Two linear layers on the class token."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, TOKEN_MLP_RATIO * width)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(TOKEN_MLP_RATIO * width, width)

    def forward(self, token: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.act(self.fc1(token)))


class TokenBlock(nn.Module):
    """Update the class token from the patches, then by itself."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.attn = ClassAttention(width)
        self.norm2 = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.mlp = TokenMlp(width)
        self.gamma_1 = nn.Parameter(torch.full((width,), 1e-4))
        self.gamma_2 = nn.Parameter(torch.full((width,), 1e-4))

    def forward(self, patches: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
        everything = torch.cat((token, patches), dim=1)
        token = token + self.gamma_1 * self.attn(self.norm1(everything))
        return token + self.gamma_2 * self.mlp(self.norm2(token))


class OfficialPatchConvNet(nn.Module):
    """Stem, convolutional trunk, one token block, norm and classifier."""

    def __init__(self, width: int = 384, depth: int = 60, num_classes: int = 1000) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.patch_embed = ConvStem(width)
        self.blocks = nn.ModuleList([TrunkBlock(width) for _ in range(depth)])
        self.blocks_token_only = nn.ModuleList([TokenBlock(width)])
        self.norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.head = nn.Linear(width, num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        patches = self.patch_embed(images)
        for block in self.blocks:
            patches = block(patches)
        token = self.cls_token.expand(images.shape[0], -1, -1)
        for block in self.blocks_token_only:
            token = block(patches, token)
        return self.head(self.norm(torch.cat((token, patches), dim=1))[:, 0])


def patchconvnet_s60() -> OfficialPatchConvNet:
    """Return S60 with random weights, in evaluation mode."""
    return OfficialPatchConvNet(width=384, depth=60, num_classes=1000).eval()
