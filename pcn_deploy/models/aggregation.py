"""Attention-based aggregation: what replaces average pooling, in PatchConvNet and in any convolutional network.

Source: Touvron et al., "Augmenting Convolutional networks with attention-based aggregation", arXiv 2112.13692,
section 3.3. The key layout of the block is the official one.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pcn_deploy.errors import OptionError
from pcn_deploy.models.augmentation import is_count

NORM_EPS = 1e-6


class Aggregation(nn.Module):
    """Single-head attention from the class tokens to the patches.

    With one class token the keys are the token itself and the patches, with one token per class the patches alone.
    `scale` is 1 once it is folded into the query projection.

    Source: arXiv 2112.13692, section 3.3; official key layout with separate q, k, v.
    """

    def __init__(self, width: int, attend_token: bool) -> None:
        super().__init__()
        self.attend_token = attend_token
        self.scale = width**-0.5
        self.q = nn.Linear(width, width)
        self.k = nn.Linear(width, width)
        self.v = nn.Linear(width, width)
        self.proj = nn.Linear(width, width)

    def forward(self, tokens: Tensor, patches: Tensor) -> tuple[Tensor, Tensor]:
        """Aggregate the patches for each token.

        Args:
            tokens: Normalised class tokens, `(N, T, C)`.
            patches: Normalised patches, `(N, H * W, C)`.

        Returns:
            The update of the class tokens, `(N, T, C)`, and the weights of the keys, `(N, T, keys)`.
        """
        keys = torch.cat((tokens, patches), 1) if self.attend_token else patches
        query = self.q(tokens)
        if self.scale != 1.0:
            query = query * self.scale
        weights = (query @ self.k(keys).transpose(1, 2)).softmax(-1)
        return self.proj(weights @ self.v(keys)), weights


class Mlp(nn.Module):
    """Linear, GELU, linear."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """Transform the last axis; same shape."""
        y: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return y


class TokenBlock(nn.Module):
    """The one transformer-like block: aggregation, then an MLP, both on the class tokens only.

    `gamma_1` and `gamma_2` are None once LayerScale is folded.
    """

    def __init__(self, width: int, mlp_ratio: float, layer_scale: float, attend_token: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=NORM_EPS)
        self.attn: nn.Module = Aggregation(width, attend_token)
        self.norm2 = nn.LayerNorm(width, eps=NORM_EPS)
        hidden = int(width * mlp_ratio + 1e-6)  # a ratio read off a file may lie one rounding below its whole number
        self.mlp = Mlp(width, hidden)
        self.gamma_1 = nn.Parameter(torch.full((width,), layer_scale))
        self.gamma_2 = nn.Parameter(torch.full((width,), layer_scale))

    def forward(self, tokens: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        """Update the class tokens from a feature map.

        Args:
            tokens: Class tokens, `(N, T, C)`.
            features: Feature map, `(N, C, H, W)`.

        Returns:
            The class tokens, `(N, T, C)`, and the attention map: the weight of each patch for each token,
            `(N, T, H, W)`. Where the token itself is a key too, the weights of the patches sum to less than one.
        """
        batch, _, height, width = features.shape
        patches = features.flatten(2).transpose(1, 2)
        update, weights = self.attn(self.norm1(tokens), self.norm1(patches))
        attention_map = weights[:, :, weights.shape[2] - height * width :].reshape(batch, -1, height, width)
        if self.gamma_1 is not None:
            update = update * self.gamma_1
        tokens = tokens + update
        update = self.mlp(self.norm2(tokens))
        if self.gamma_2 is not None:
            update = update * self.gamma_2
        return tokens + update, attention_map


class AttentionPool2d(nn.Module):
    """Attention-based aggregation in the place of global average pooling, on any convolutional network.

    Put it where `nn.AdaptiveAvgPool2d(1)` stands; it takes and returns the same shapes::

        network.avgpool = AttentionPool2d(2048)

    then train. `pcn-compile build ... --with-attention-map` adds its map to the outputs.

    Args:
        channels: Channels of the feature map, C.
        mlp_ratio: Hidden width of the token MLP over C.
        layer_scale: Initial value of LayerScale.

    Raises:
        OptionError: If a number is out of its range; when called, if the feature map is not `(N, C, H, W)`.

    Source: arXiv 2112.13692, section 3.3: the token block of PatchConvNet. The paper gives no layout of weights for
    other networks; this one is ours.
    """

    def __init__(self, channels: int, mlp_ratio: float = 3.0, layer_scale: float = 1e-4) -> None:
        super().__init__()
        if not is_count(channels) or not 1 / channels <= mlp_ratio < math.inf or not math.isfinite(layer_scale):
            msg = (
                f"AttentionPool2d with channels={channels!r}, mlp_ratio={mlp_ratio!r}, layer_scale={layer_scale!r}: "
                "expected the number of channels of the feature map, a ratio that leaves the MLP a channel, and a "
                "finite LayerScale."
            )
            raise OptionError(msg)
        self.channels = channels
        self.cls_token = nn.Parameter(torch.empty(1, 1, channels))
        self.block = TokenBlock(channels, mlp_ratio, layer_scale, attend_token=True)
        self.norm = nn.LayerNorm(channels, eps=NORM_EPS)
        nn.init.trunc_normal_(self.cls_token, std=0.02)

    def __call__(self, features: Tensor) -> Tensor:
        """Check the feature map, then aggregate it. The check is here so that `forward` stays free of conditions."""
        if type(features) is Tensor and (features.ndim != 4 or features.shape[1] != self.channels):
            msg = (
                f"AttentionPool2d({self.channels}) was given {tuple(features.shape)}; expected a feature map "
                f"(N, {self.channels}, H, W)."
            )
            if features.ndim == 4:
                msg += f" Make it AttentionPool2d({features.shape[1]})."
            raise OptionError(msg)
        pooled: Tensor = super().__call__(features)
        return pooled

    def forward(self, features: Tensor) -> Tensor:
        """Aggregate a feature map `(N, C, H, W)` into `(N, C, 1, 1)`."""
        tokens, _ = self.block(self.cls_token.expand(features.shape[0], -1, -1), features)
        pooled: Tensor = self.norm(tokens).transpose(1, 2)
        return pooled.unsqueeze(3)
