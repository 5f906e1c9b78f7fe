"""Sums of floats without rounding: the same in every order, every grouping, every number of processes."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

_UNITS = 2**1074
"""A finite double is a whole number of the least subnormal, 2**-1074; Python's integers add those exactly."""


class ExactSum:
    """Sum of doubles, rounded once when it is read.

    Attributes:
        units: The sum of the finite values, in units of 2**-1074.
        infinite: Whether an infinite value was among them.
    """

    def __init__(self, units: int = 0, *, infinite: bool = False) -> None:
        self.units = units
        self.infinite = infinite

    def add(self, values: npt.NDArray[np.float64]) -> None:
        """Add every value; none may be NaN."""
        for value in values.ravel().tolist():
            if math.isinf(value):
                self.infinite = True
            else:
                numerator, denominator = value.as_integer_ratio()
                self.units += numerator * (_UNITS // denominator)

    def merge(self, other: ExactSum) -> None:
        """Add what another sum holds."""
        self.units += other.units
        self.infinite = self.infinite or other.infinite

    def __float__(self) -> float:
        try:
            return math.inf if self.infinite else self.units / _UNITS
        except OverflowError:
            return math.inf


class ExactVector:
    """Sum of vectors `(K,)` of finite doubles, exact until it is read.

    Attributes:
        units: The sum of each entry, in units of 2**-1074; empty before the first vector.
    """

    def __init__(self, units: Iterable[int] = ()) -> None:
        self.units: list[int] = list(units)

    def add(self, rows: npt.NDArray[np.float64]) -> None:
        """Add every row of `(N, K)`."""
        mantissa, exponent = np.frexp(rows)
        whole = np.ldexp(mantissa, 53).astype(np.int64).astype(object)
        shift = np.maximum(exponent.astype(np.int64) + (1074 - 53), 0)  # below 0 only the subnormals: see the next line
        excess = np.maximum(-(exponent.astype(np.int64) + (1074 - 53)), 0)  # zeros at the end of their mantissa
        self.merge(ExactVector(((whole >> excess) << shift).sum(0).tolist()))

    def merge(self, other: ExactVector) -> None:
        """Add what another sum holds."""
        if other.units:
            mine = self.units or [0] * len(other.units)
            self.units = [first + second for first, second in zip(mine, other.units, strict=True)]

    def sum_of_squares(self) -> float:
        """Of the K sums, rounded once."""
        try:
            return sum(units * units for units in self.units) / _UNITS**2
        except OverflowError:
            return math.inf
