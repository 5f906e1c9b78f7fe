"""The attention-augmented convolution: a convolution beside two-dimensional relative self-attention.

Source: Bello et al., "Attention Augmented Convolutional Networks", arXiv 1904.09925, sections 3.1 and 3.2. Tensors are
`(N, C, H, W)`; every height and width works. Tests compare with a loop over pairs of pixels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pcn_deploy.errors import OptionError
from pcn_deploy.models.augmentation import ORDERS, POOLINGS, Augmentation, as_number, as_pair, is_count


def fit_table(table: Tensor, size: int) -> Tensor:
    """Make a table of relative positions fit a side of another length.

    A shorter side needs the offsets near zero only: the centre rows, which is exact. For a longer side the table is
    stretched by linear interpolation, its ends and its centre staying where they are; no rule for this is published.

    Args:
        table: One row per offset from `1 - built` to `built - 1`, `(2 * built - 1, D)`.
        size: The side wanted.

    Returns:
        The table, `(2 * size - 1, D)`.
    """
    built = (table.shape[0] + 1) // 2
    if size > built:
        stretched = F.interpolate(table.t().unsqueeze(0), size=2 * size - 1, mode="linear", align_corners=True)
        return stretched.squeeze(0).t()
    return table[built - size : built + size - 1]


def relative_keys(table: Tensor, size: int) -> Tensor:
    """Row `[i, j]` of the result belongs to the offset `j - i` between query i and key j: `(size, size, D)`."""
    position = torch.arange(size, device=table.device)
    return fit_table(table, size)[position.unsqueeze(0) - position.unsqueeze(1) + size - 1]


class RelativeSelfAttention2d(nn.Module):
    """Multi-head self-attention over all positions of a map, with relative positions by height and by width.

    The logits of query i and key j are `q_i . (k_j + h[y_j - y_i] + w[x_j - x_i])`, q scaled by `(dk / heads)**-0.5`.
    The terms of position are two small products, one per axis, and are added by broadcasting: no tensor of
    (H * W)^2 elements is gathered or tiled.

    Args:
        in_channels: Channels of the input.
        dk: Channels of keys and of queries, all heads together.
        dv: Channels of values, all heads together: the channels of the output.
        heads: Number of heads; divides both.
        size: Height and width of the attended map that the tables of positions are made for, or one number for both.
        stride: Stride of the projections, the same for height and width.
        order: Order of the projections in `conv_qkv`.
        transposed_heads: See `Augmentation`.

    Raises:
        OptionError: If the heads do not divide the channels, a number is none, or the order is unknown.
    """

    def __init__(
        self,
        in_channels: int,
        *,
        dk: int,
        dv: int,
        heads: int,
        size: int | tuple[int, int],
        stride: int = 1,
        order: str = "qkv",
        transposed_heads: bool = False,
    ) -> None:
        super().__init__()
        size, stride = as_pair("size", size), as_number("stride", stride)
        counts = all(is_count(number) for number in (in_channels, dk, dv, heads))
        if not counts or dk % heads or dv % heads or order not in ORDERS:
            msg = (
                f"Attention with in_channels={in_channels!r}, dk={dk!r}, dv={dv!r}, heads={heads!r}, order={order!r}: "
                "all must be whole numbers from 1 on, dk and dv "
                f"multiples of the heads, the order one of {ORDERS}."
            )
            raise OptionError(msg)
        self.dk, self.dv, self.heads = dk, dv, heads
        self.keys_first = order == "kqv"
        self.transposed_heads = transposed_heads
        self.scale = (dk // heads) ** -0.5
        self.conv_qkv = nn.Conv2d(in_channels, 2 * dk + dv, 1, stride)
        self.attn_out = nn.Conv2d(dv, dv, 1)
        self.key_rel_h = nn.Parameter(torch.randn(2 * size[0] - 1, dk // heads) * self.scale)
        self.key_rel_w = nn.Parameter(torch.randn(2 * size[1] - 1, dk // heads) * self.scale)

    def forward(self, x: Tensor) -> Tensor:
        """Attend over `(N, C, H, W)`; returns `(N, dv, ceil(H / stride), ceil(W / stride))`."""
        projected = self.conv_qkv(x)
        batch, _, height, width = projected.shape
        q, k, v = projected.split([self.dk, self.dk, self.dv], dim=1)
        if self.keys_first:
            q, k = k, q
        q = q.reshape(batch, self.heads, -1, height * width).transpose(2, 3)
        if self.scale != 1.0:
            q = q * self.scale
        logits = q @ k.reshape(batch, self.heads, -1, height * width) + self.position_logits(q, height, width)
        v = v.reshape(batch, self.heads, -1, height * width)
        attended = logits.softmax(-1) @ v.transpose(2, 3)
        if not self.transposed_heads:
            attended = attended.transpose(2, 3)
        mixed: Tensor = self.attn_out(attended.reshape(batch, self.dv, height, width))
        return mixed

    def position_logits(self, q: Tensor, height: int, width: int) -> Tensor:
        """The terms of position: scaled queries `(N, heads, H * W, D)` to `(N, heads, H * W, H * W)`."""
        batch = q.shape[0]
        q = q.reshape(batch, self.heads, height, width, q.shape[3])
        by_row = q @ relative_keys(self.key_rel_h, height).transpose(1, 2)
        by_column = (q.transpose(2, 3) @ relative_keys(self.key_rel_w, width).transpose(1, 2)).transpose(2, 3)
        logits = by_row.unsqueeze(5) + by_column.unsqueeze(4)
        return logits.reshape(batch, self.heads, height * width, height * width)


def note_stretched(model: nn.Module, shape: tuple[int, int, int]) -> tuple[str, ...]:
    """Say where images of a shape make maps larger than the tables of relative positions were made for.

    Args:
        model: Any network in evaluation mode.
        shape: C, H and W of the images.

    Returns:
        One sentence, or nothing if no table is stretched.
    """
    layers = {path: layer for path, layer in model.named_modules() if isinstance(layer, RelativeSelfAttention2d)}
    if not layers:
        return ()
    attended: dict[str, tuple[int, int]] = {}
    hooks = [
        layer.register_forward_hook(
            lambda _layer, _inputs, output, path=path: attended.update({path: tuple(output.shape[2:])})
        )
        for path, layer in layers.items()
    ]
    try:
        with torch.no_grad():
            model(torch.zeros(1, *shape))
    finally:
        for hook in hooks:
            hook.remove()
    built = {path: ((len(layer.key_rel_h) + 1) // 2, (len(layer.key_rel_w) + 1) // 2) for path, layer in layers.items()}
    stretched = [path for path, size in attended.items() if size[0] > built[path][0] or size[1] > built[path][1]]
    if not stretched:
        return ()
    first = stretched[0]
    built_size, map_size = ("x".join(map(str, size)) for size in (built[first], attended[first]))
    return (
        f"{len(stretched)} of {len(layers)} tables of relative positions are stretched, such as that of {first}: made "
        f"for a map of {built_size}, used on {map_size}. No rule for it is published, and parity does not judge it: "
        "check the accuracy, or train at this resolution.",
    )


class AttentionAugmentedConv2d(nn.Module):
    """Convolution and self-attention side by side; their channels are concatenated, the convolution's first.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output; `out_channels - dv` of them come from the convolution.
        kernel_size: Side of the convolution's kernel, odd: its padding keeps the size at stride 1.
        augmentation: Heads, widths and variants.
        size: Height and width of the *output* map that the tables of positions are made for, or one number for both.
        stride: Stride of both branches, the same for height and width.
        pooling: `none`; `attention`: the input of the attention is averaged over 3x3 with stride 2 and its output
            returned to full size bilinearly; `layer`: the same around both branches.

    Raises:
        OptionError: If the widths do not fit, the kernel is even, a number is none, or the pooling is unknown.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        augmentation: Augmentation,
        *,
        size: int | tuple[int, int],
        stride: int = 1,
        pooling: str = "none",
    ) -> None:
        super().__init__()
        size, stride = as_pair("size", size), as_number("stride", stride)
        kernel_size = as_number("kernel_size", kernel_size)
        if kernel_size % 2 == 0:
            msg = (
                f"kernel_size={kernel_size}: both branches must give maps of one size, which takes an odd kernel. "
                f"Give {kernel_size - 1} or {kernel_size + 1}."
            )
            raise OptionError(msg)
        if not is_count(out_channels):
            msg = f"out_channels={out_channels!r}: expected a whole number from 1 on."
            raise OptionError(msg)
        if pooling not in POOLINGS:
            msg = f"Pooling {pooling!r} is unknown; known are {POOLINGS}."
            raise OptionError(msg)
        dk, dv = augmentation.channels(out_channels)
        self.pools_layer, self.pools_attention = pooling == "layer", pooling == "attention"
        self.stride = stride
        self.conv_out = nn.Conv2d(
            in_channels, out_channels - dv, kernel_size, stride, kernel_size // 2, bias=augmentation.conv_bias
        )
        self.attention = RelativeSelfAttention2d(
            in_channels,
            dk=dk,
            dv=dv,
            heads=augmentation.heads,
            size=size if pooling == "none" else ((size[0] + 1) // 2, (size[1] + 1) // 2),
            stride=stride,
            order=augmentation.order,
            transposed_heads=augmentation.transposed_heads,
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map `(N, in_channels, H, W)` to `(N, out_channels, ceil(H / stride), ceil(W / stride))`."""
        size = [(x.shape[2] + self.stride - 1) // self.stride, (x.shape[3] + self.stride - 1) // self.stride]
        if self.pools_layer:
            x = F.avg_pool2d(x, 3, 2, 1)
            both = torch.cat((self.conv_out(x), self.attention(x)), 1)
            return F.interpolate(both, size=size, mode="bilinear", align_corners=False)
        pooled = F.avg_pool2d(x, 3, 2, 1, count_include_pad=False) if self.pools_attention else x
        attended: Tensor = self.attention(pooled)
        if self.pools_attention:
            attended = F.interpolate(attended, size=size, mode="bilinear", align_corners=False)
        return torch.cat((self.conv_out(x), attended), 1)
