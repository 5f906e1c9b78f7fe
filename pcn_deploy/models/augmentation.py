"""How a convolution is augmented with attention: heads, widths, rules of rounding. Standard library only.

Source: Bello et al., "Attention Augmented Convolutional Networks", arXiv 1904.09925, sections 3.2 and 4. The paper
states shares of the output channels; with these rules of rounding its published parameter counts come out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from pcn_deploy.errors import OptionError

ORDERS = ("qkv", "kqv")
POOLINGS = ("none", "attention", "layer")


def is_count(value: object) -> bool:
    """Whether a value is a whole number from 1 on; `True` and `2.0` are not."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def as_pair(name: str, value: object) -> tuple[int, int]:
    """A height and width given as such, or as one number for both.

    Raises:
        OptionError: If it is neither.
    """
    sides = tuple(value) if isinstance(value, tuple | list) else (value, value)
    if len(sides) != 2 or not all(is_count(side) for side in sides):
        msg = f"{name}={value!r}: expected a whole number from 1 on, or a pair of them, height and width, as (14, 14)."
        raise OptionError(msg)
    return int(sides[0]), int(sides[1])


def as_number(name: str, value: object) -> int:
    """A number that is the same for height and width, given once or as a pair.

    Raises:
        OptionError: If the two differ, or are no whole numbers from 1 on.
    """
    height, width = as_pair(name, value)
    if height != width:
        msg = f"{name}={value!r}: height and width must have the same here. Give one number, such as {name}={height}."
        raise OptionError(msg)
    return height


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """The choices that are the same for every augmented convolution of a network.

    Attributes:
        heads: Number of attention heads.
        kappa: Channels of keys (and queries) over the output channels of the layer.
        upsilon: Channels of values over the output channels of the layer.
        min_head_channels: Fewest channels of keys per head.
        order: Order of the projections in the weights, `qkv` or `kqv`.
        transposed_heads: Join the heads as if channels came before positions. That is the fault of the public
            AA-ResNet-50, whose weights were trained with it; leave it off for anything else.
        conv_bias: Whether the convolutional branch has biases.
        pooled: What is halved where the map is largest: only the input of the attention (`attention`, as in the
            paper), or the whole layer (`layer`, as in the public AA-ResNet-50).
        nearest_multiple: Round key and value channels to the nearest multiple of 8 instead of down to a multiple of
            the heads.

    Raises:
        OptionError: If a value is out of its range.
    """

    heads: int = 8
    kappa: float = 0.2
    upsilon: float = 0.1
    min_head_channels: int = 20
    order: str = "qkv"
    transposed_heads: bool = False
    conv_bias: bool = False
    pooled: str = "attention"
    nearest_multiple: bool = False

    def __post_init__(self) -> None:
        counts = is_count(self.heads) and is_count(self.min_head_channels)
        shares = all(isinstance(share, int | float) for share in (self.kappa, self.upsilon))
        if not counts or not shares or not 0 < self.kappa < math.inf or not 0 < self.upsilon < 1:
            msg = (
                f"heads={self.heads!r}, kappa={self.kappa!r}, upsilon={self.upsilon!r}, "
                f"min_head_channels={self.min_head_channels!r}: expected whole numbers from 1 on of heads and of "
                "channels per head, a finite kappa above 0 and upsilon between 0 and 1."
            )
            raise OptionError(msg)
        if self.order not in ORDERS or self.pooled not in POOLINGS:
            msg = f"order {self.order!r}, pooled {self.pooled!r}: known are {ORDERS} and {POOLINGS}."
            raise OptionError(msg)

    def channels(self, out_channels: int) -> tuple[int, int]:
        """Channels of keys and of values for a layer of `out_channels` outputs, all heads together.

        Each is the stated share of the outputs, rounded down to a multiple of the heads (or to the nearest multiple of
        8); keys have at least `min_head_channels` per head, values at least one.

        Raises:
            OptionError: If no output channel would be left for the convolution.
        """
        keys, values = (self._rounded(share * out_channels) for share in (self.kappa, self.upsilon))
        keys = max(keys, self.min_head_channels * self.heads)
        if values >= out_channels:
            msg = f"{values} value channels of {out_channels} outputs leave none for the convolution; use fewer heads."
            raise OptionError(msg)
        return keys, values

    def _rounded(self, channels: float) -> int:
        if self.nearest_multiple:
            return max(8, int(channels + 4) // 8 * 8)
        return max(1, int(channels + 1e-9) // self.heads) * self.heads
