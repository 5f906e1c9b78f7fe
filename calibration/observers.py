"""Streaming statistics of activations: one pass, constant memory, any batch size, any order.

Counts are integers and bin edges are multiples of a power of two, so the result is the same to the bit however the
images are grouped or ordered, and statistics of several processes add up exactly.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from pcn_deploy.calibration.statistics import BINS, Statistics, bin_width
from pcn_deploy.errors import DataError


class AmaxObserver:
    """Keeps the largest magnitude."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.amax = 0.0

    def observe(self, x: Tensor) -> None:
        """Take a float tensor of any shape into account.

        Raises:
            DataError: If it holds NaN or infinity; the name of the tensor is in the message.
        """
        low, high = torch.aminmax(x)
        batch_amax = max(-float(low), float(high))
        if not math.isfinite(batch_amax):
            msg = f"The input of {self.name} holds NaN or infinite values: mend the weights or the calibration images."
            raise DataError(msg)
        self.amax = max(self.amax, batch_amax)

    def statistics(self) -> Statistics:
        """What was seen so far."""
        return Statistics(self.amax, np.zeros(0, np.int64), 0.0)


class HistogramObserver(AmaxObserver):
    """Counts magnitudes in `BINS` equal bins; the range doubles, merging pairs of bins, when a larger value comes."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self._counts = torch.zeros(BINS, dtype=torch.int64)
        self._width = 0.0

    def observe(self, x: Tensor) -> None:
        """Take a float tensor of any shape into account.

        Raises:
            DataError: If it holds NaN or infinity; the name of the tensor is in the message.
        """
        super().observe(x)
        if self.amax == 0.0:
            self._counts[0] += x.numel()
            return
        self._widen()
        index = torch.mul(_dense_view(x), 1.0 / self._width).to(torch.int32).abs_()
        self._counts += torch.bincount(index, minlength=BINS)

    def _widen(self) -> None:
        if self._width == 0.0:
            self._width = bin_width(self.amax)
        while self.amax >= self._width * BINS:
            self._counts = torch.cat((self._counts.view(-1, 2).sum(1), self._counts.new_zeros(BINS // 2)))
            self._width *= 2.0

    def statistics(self) -> Statistics:
        """What was seen so far."""
        return Statistics(self.amax, self._counts.numpy().copy(), self._width)


def _dense_view(x: Tensor) -> Tensor:
    """All elements as one axis, in memory order, without a copy where the memory is dense."""
    if x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last):
        x = x.permute(0, 2, 3, 1)
    return x.reshape(-1)
