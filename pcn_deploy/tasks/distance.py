"""How far outputs are from what they should be, for checks of our own; verdicts are in `parity.py`. numpy only."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from pcn_deploy.aliases import Outputs
from pcn_deploy.tasks.classification import LogitsMeter
from pcn_deploy.tasks.metrics import centred, power_of_changes
from pcn_deploy.tasks.parity import ParityMeter

Array = npt.NDArray[np.float32]
Live: TypeAlias = npt.NDArray[np.bool_]


def least_sqnr_db(expected: Iterable[Outputs], outputs: Iterable[Outputs]) -> float:
    """The least SQNR, in dB, between two lists of outputs `(N, ...)`, each compared with its counterpart.

    Of outputs `(N, K)`, which may be logits, that of the differences in a row counts too.

    Raises:
        DataError: If shapes differ, or what is expected is not finite.
    """
    return min(
        sqnr_of_output(first, second, np.ones(first.shape[1], np.bool_) if first.ndim == 2 else None)
        for first, second in zip(expected, outputs, strict=True)
    )


def sqnr_of_output(expected: Outputs, outputs: Outputs, live: Live | None) -> float:
    """SQNR, in dB, of an output `(N, ...)`; of logits, the least of theirs and that of the differences in a row.

    Args:
        expected: The output.
        outputs: The same of an engine.
        live: Which of K logits are compared, `(K,)`; None for an output that is compared as it stands.

    Raises:
        DataError: If shapes differ, or what is expected is not finite.
    """
    meter = ParityMeter("output") if live is None else LogitsMeter(live=live)
    meter.update(expected, outputs)
    metrics = meter.metrics()
    return min(metrics["sqnr_db"], metrics.get("sqnr_differences_db", math.inf))


def sqnr_of_images(expected: Array, outputs: Array, live: Live | None) -> npt.NDArray[np.float64]:
    """Mean power of what the images change in what is expected, over the noise of each image, in dB.

    An image to which a network answers little has no less noise than another one, so it is not compared with its own.
    What every image gets alike, such as a large constant, would make every error look small; where they change nothing,
    or there is but one, it is all there is.

    Args:
        expected: `(N, ...)`; of logits `(N, K)` the differences in a row count.
        outputs: The same of an engine.
        live: Which of K logits are compared, `(K,)`; None for an output that is compared as it stands.

    Returns:
        `(N,)`, minus infinity where an answer is not finite.
    """
    wanted, seen = (values.reshape(len(values), -1).astype(np.float64) for values in (expected, outputs))
    if live is not None:
        wanted, seen = centred(wanted[:, live]), centred(seen[:, live])
    noise = np.square(seen - wanted).mean(1)
    noise = np.where(np.isfinite(noise), noise, np.inf)
    power = float(np.square(wanted).sum())
    power = min(power, power_of_changes(power, float(np.square(wanted.sum(0)).sum()), len(wanted)) or power)
    power = max(power / wanted.size, np.finfo(np.float64).tiny)
    ratios: npt.NDArray[np.float64] = 10 * np.log10(power / np.maximum(noise, power * 1e-20))
    return ratios
