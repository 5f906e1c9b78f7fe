"""Execute a network in float64, without a copy of it: what tells its rounding from what it decides."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map


class InDouble(TorchFunctionMode):
    """Executes every operation on float32 in float64, also where the code asks for float32 by name.

    Weights are converted as they are used. Depthwise convolutions are sums of shifted images, because PyTorch runs
    them in float64 channel by channel: PatchConvNet-S60 takes less than half of the time. What is written in place
    into a tensor that was made outside is lost.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Execute an operation."""
        args, kwargs = tree_map(_double, (args, kwargs or {}))
        if func is Tensor.float:
            return args[0].double()
        if func is torch.conv2d and _is_depthwise(*args, **kwargs):
            return _depthwise(*args, **kwargs)
        return tree_map(_double, func(*args, **kwargs))


def _double(value: Any) -> Any:
    if isinstance(value, Tensor) and value.dtype == torch.float32:
        return value.double()
    return torch.float64 if value is torch.float32 else value


def _is_depthwise(
    x: Tensor, weight: Tensor, bias: Any = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1
) -> bool:
    return x.ndim == 4 and 1 < groups == x.shape[1] == len(weight) and not isinstance(padding, str)


def _depthwise(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    """What `torch.conv2d` computes of `(N, C, H, W)` with weights `(C, 1, kh, kw)` and C groups."""
    step, edge, apart = map(_pair, (stride, padding, dilation))
    x = torch.nn.functional.pad(x, (edge[1], edge[1], edge[0], edge[0]))
    kernel = weight.shape[2:]
    sizes = [(x.shape[2 + i] - apart[i] * (kernel[i] - 1) - 1) // step[i] + 1 for i in (0, 1)]
    total = x.new_zeros(()) if bias is None else bias[:, None, None]
    for row, column in product(*map(range, kernel)):
        starts = (row * apart[0], column * apart[1])
        rows, columns = (slice(a, a + (n - 1) * s + 1, s) for a, n, s in zip(starts, sizes, step, strict=True))
        total = total + weight[:, :, row, column, None] * x[:, :, rows, columns]
    return total


def _pair(value: int | Sequence[int]) -> tuple[int, ...]:
    """Of height and width."""
    return (value, value) if isinstance(value, int) else (*value, *value)[:2]
