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

_CHUNK = 1 << 17
"""Elements counted at a time: what is made of them stays in the cache of a core."""


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
        low, high = torch.aminmax(_dense_view(x))
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
        values = _dense_view(x)
        scaled = values.new_empty(min(len(values), _CHUNK))
        bins = scaled.new_empty(len(scaled), dtype=torch.int16)
        for chunk in torch.split(values, _CHUNK):
            size = len(chunk)
            torch.mul(chunk, 1.0 / self._width, out=scaled[:size])
            self._counts += torch.bincount(bins[:size].copy_(scaled[:size]).abs_(), minlength=BINS)

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
    return x.permute(sorted(range(x.ndim), key=x.stride, reverse=True)).reshape(-1)
