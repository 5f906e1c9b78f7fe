"""Sums of floats without rounding: the same in every order, every grouping, every number of processes."""

from __future__ import annotations

import math

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
