"""Sums without rounding, against the sums of Python's integers and fractions."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import numpy as np
import numpy.typing as npt
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from pcn_deploy.exact import ExactSum, ExactVector


@given(st.lists(st.floats(allow_nan=False), max_size=30), st.randoms())
def test_exact_sums(values: list[float], random: Any) -> None:
    forward, shuffled = ExactSum(), ExactSum()
    forward.add(np.array(values, np.float64))
    random.shuffle(values)
    for value in values:
        shuffled.merge(part := ExactSum())
        part.add(np.array([value]))
        shuffled.merge(part)
    assert (forward.units, forward.infinite) == (shuffled.units, shuffled.infinite)
    if any(map(math.isinf, values)):
        assert float(forward) == math.inf
    else:
        with contextlib.suppress(OverflowError):
            assert float(forward) == math.fsum(values)


@given(arrays(np.float64, (6, 3), elements=st.floats(-1e300, 1e300)), st.integers(1, 5))
def test_exact_vectors(rows: npt.NDArray[np.float64], cut: int) -> None:
    from fractions import Fraction

    whole, first, second = ExactVector(), ExactVector(), ExactVector()
    whole.add(rows)
    first.add(rows[:cut])
    second.add(rows[cut:])
    second.merge(first)
    assert second.units == whole.units
    assert [Fraction(units, 2**1074) for units in whole.units] == [
        sum(map(Fraction, column)) for column in rows.T.tolist()
    ]
