"""From a weight to the scale of each of its output channels."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

QMAX = 127
SHARES = np.linspace(1.0, 0.9, 21)
"""Ranges tried by mse, as shares of a channel's largest weight. 0.9 is low enough: clipping one weight to the share s
of A costs (A - sA)^2 and narrows the steps of all K weights of the channel, sA / 127 wide, so that the least of
(1 - s)^2 + K s^2 / (12 * 127^2) is at s = 1 / (1 + K / 193,548): 0.95 for K = 9,216."""

Floats = npt.NDArray[np.float32]


def weight_scales(weight: Tensor, calibrator: str, stored: Callable[[Floats], Floats]) -> Floats:
    """Scale of INT8 codes per output channel.

    Args:
        weight: Finite, `(C_out, ...)`.
        calibrator: `max`, where nothing is clipped, or `mse`: the clipping of each channel with the least squared
            error of its codes, never more than that of `max`.
        stored: What a scale becomes in the type it is stored in; errors are those of the stored scale.

    Returns:
        float32 `(C_out,)`; of a channel that is all zero, 1.

    Source of mse: Choukroun et al., "Low-bit Quantization of Neural Networks for Efficient Inference", 2019, section 3.
    """
    rows = weight.detach().flatten(1)
    amax = rows.abs().amax(1).numpy()
    amax = np.where(amax > 0, amax, QMAX).astype(np.float32)
    best = stored((amax / QMAX).astype(np.float32))
    if calibrator == "max":
        return best
    least = squared_error(rows, best)
    for share in SHARES[1:]:
        scales = stored((amax * (share / QMAX)).astype(np.float32))
        errors = squared_error(rows, scales)
        better = errors < least
        best, least = np.where(better, scales, best), np.where(better, errors, least)
    return best


def squared_error(rows: Tensor, scales: Floats) -> npt.NDArray[np.float64]:
    """Sum of the squared errors of INT8 codes of `(C, K)` at one scale per row, `(C,)`."""
    steps = torch.from_numpy(scales)[:, None]
    error = (rows / steps).round_().clamp_(-QMAX, QMAX).mul_(steps).sub_(rows)
    return error.square_().sum(1).double().numpy()
