"""Definitions of the small networks of `kinds.py`: those that people bring, at 32x32 pixels."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SIDE = 32


class _Excite(nn.Module):
    """Squeeze-excite."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.reduce, self.expand = nn.Conv2d(channels, channels // 8, 1), nn.Conv2d(channels // 8, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.expand(F.relu(self.reduce(x.mean((2, 3), keepdim=True)))))


def _normalised(conv: nn.Conv2d, *after: nn.Module) -> list[nn.Module]:
    return [conv, nn.BatchNorm2d(conv.out_channels), *after]


class _Inverted(nn.Module):
    """Expansion, depthwise convolution, projection; the identity is added where shapes allow."""

    def __init__(self, width: int, out: int, stride: int, act: type[nn.Module], *, excite: bool) -> None:
        super().__init__()
        inner = 4 * width
        self.body = nn.Sequential(
            *_normalised(nn.Conv2d(width, inner, 1, bias=False), act()),
            *_normalised(nn.Conv2d(inner, inner, 3, stride, 1, groups=inner, bias=False), act()),
            *([_Excite(inner)] if excite else []),
            *_normalised(nn.Conv2d(inner, out, 1, bias=False)),
        )
        self.shortcut = width == out and stride == 1

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x) if self.shortcut else self.body(x)


class _Basic(nn.Module):
    """Two convolutions and an identity."""

    def __init__(self, width: int, out: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Sequential(*_normalised(nn.Conv2d(width, out, 3, stride, 1, bias=False), nn.ReLU()))
        self.second = nn.Sequential(*_normalised(nn.Conv2d(out, out, 3, 1, 1, bias=False)))
        changes = stride > 1 or width != out
        self.down = nn.Sequential(*(_normalised(nn.Conv2d(width, out, 1, stride, bias=False)) if changes else ()))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.down(x) + self.second(self.first(x)))


class _Head(nn.Module):
    """Mean over positions, and the classes."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.classes = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.classes(x.mean((2, 3)))
        return found


class _ChannelsLast(nn.Module):
    """LayerNorm over channels, or an MLP on them, of `(N, C, H, W)`."""

    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        self.parts = nn.Sequential(*parts)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.parts(x.permute(0, 2, 3, 1))
        return found.permute(0, 3, 1, 2)


class _ConvNeXtBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 7, 1, 3, groups=width)
        self.mix = _ChannelsLast(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = x + self.mix(self.depthwise(x))
        return found


class _AttentionBlock(nn.Module):
    """Pre-norm self-attention and MLP on `(N, T, C)`."""

    def __init__(self, width: int, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.qkv, self.proj = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        count, tokens, width = x.shape
        qkv = self.qkv(self.norm1(x)).reshape(count, tokens, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        weights = (query @ key.transpose(-2, -1) * (width // self.heads) ** -0.5).softmax(-1)
        x = x + self.proj((weights @ value).transpose(1, 2).reshape(count, tokens, width))
        found: Tensor = x + self.mlp(self.norm2(x))
        return found


class _Tokens(nn.Module):
    """A stem of two convolutions to 8x8 tokens with positions, blocks of attention, the mean of the tokens."""

    def __init__(self, classes: int, width: int = 48, depth: int = 3) -> None:
        super().__init__()
        first = _normalised(nn.Conv2d(3, width // 2, 3, 2, 1, bias=False), nn.ReLU())
        self.patches = nn.Sequential(*first, nn.Conv2d(width // 2, width, 3, 2, 1))
        self.positions = nn.Parameter(0.02 * torch.randn(1, (SIDE // 4) ** 2, width))
        self.blocks = nn.Sequential(*(_AttentionBlock(width) for _ in range(depth)))
        self.norm, self.classes = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.blocks(self.patches(x).flatten(2).transpose(1, 2) + self.positions)
        found: Tensor = self.classes(self.norm(tokens).mean(1))
        return found


def _inverted(act: type[nn.Module], classes: int, *, excite: bool) -> nn.Module:
    stem = _normalised(nn.Conv2d(3, 16, 3, 2, 1, bias=False), act())
    sizes = ((16, 16, 1), (16, 32, 2), (32, 32, 1), (32, 64, 2))
    blocks = [_Inverted(width, out, stride, act, excite=excite) for width, out, stride in sizes]
    return nn.Sequential(*stem, *blocks, *_normalised(nn.Conv2d(64, 96, 1, bias=False), act()), _Head(96, classes))


def _residual(classes: int) -> nn.Module:
    stem = _normalised(nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.ReLU())
    sizes = ((16, 16, 1), (16, 32, 2), (32, 32, 1), (32, 48, 2))
    return nn.Sequential(*stem, *(_Basic(*size) for size in sizes), _Head(48, classes))


def _convnext(classes: int) -> nn.Module:
    down = (_ChannelsLast(nn.LayerNorm(32)), nn.Conv2d(32, 64, 2, 2))
    stem = (nn.Conv2d(3, 32, 4, 4), _ChannelsLast(nn.LayerNorm(32)))
    blocks = (_ConvNeXtBlock(32), _ConvNeXtBlock(32), *down, _ConvNeXtBlock(64), _ConvNeXtBlock(64))
    return nn.Sequential(*stem, *blocks, _ChannelsLast(nn.LayerNorm(64)), _Head(64, classes))


KINDS: dict[str, Callable[[int], nn.Module]] = {
    "depthwise, ReLU6": lambda classes: _inverted(nn.ReLU6, classes, excite=False),
    "depthwise, SiLU, SE": lambda classes: _inverted(nn.SiLU, classes, excite=True),
    "depthwise, Hardswish, SE": lambda classes: _inverted(nn.Hardswish, classes, excite=True),
    "residual, ReLU": _residual,
    "attention, GELU": _Tokens,
    "depthwise, LayerNorm": _convnext,
}
ON_DIGITS = ("depthwise, ReLU6", "residual, ReLU", "attention, GELU")
