"""The verb `bench`: latency and throughput of an opened engine. numpy only."""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from pcn_deploy.artefact.bundle import Bundle
from pcn_deploy.artefact.engine import Engine, check_finite
from pcn_deploy.errors import OptionError
from pcn_deploy.progress import Progress, silent


@dataclass(frozen=True, kw_only=True)
class Latency:
    """Latency of one batch size, host to host: copies to and from the device are included.

    Attributes:
        target: The engine measured.
        batch: Images per run.
        runs: Timed runs.
        p50: Median, in ms.
        p90: 90th percentile, in ms.
        p99: 99th percentile, in ms.
    """

    target: str
    batch: int
    runs: int
    p50: float
    p90: float
    p99: float

    @property
    def throughput_ips(self) -> float:
        """Images per second at the median."""
        return 1000.0 * self.batch / self.p50

    def to_json(self) -> dict[str, Any]:
        """The form `bench --json` prints."""
        percentiles = {key: value for key, value in asdict(self).items() if key.startswith("p")}
        return {
            "latency_ms": percentiles,
            "throughput_ips": self.throughput_ips,
            "batch": self.batch,
            "runs": self.runs,
        }


def stand_in(bundle: Bundle, target: str) -> str:
    """Why the time of an engine would tell nothing, although it runs here; empty if it does tell."""
    if target == "cpu" and bundle.manifest.remainder == "bf16":
        return "BF16 is computed in FP32 here and rounded tensor by tensor: the time of that is not the time of BF16."
    return ""


def bench(
    engine: Engine,
    *,
    batch: int = 1,
    seconds: float = 3.0,
    warmup: int = 5,
    progress: Progress = silent,
) -> Latency:
    """Time an engine on random images.

    Args:
        engine: An opened engine.
        batch: Images per run, within the engine's range.
        seconds: Time for at least so long, and at least 10 runs.
        warmup: Runs before the timed ones.
        progress: Told how much of the time has passed, in ms.

    Returns:
        The percentiles.

    Raises:
        OptionError: If the batch is outside the engine's range, the time is not above 0, or it would be that of a
            stand-in: see `stand_in`.
        ParityError: If the engine returns NaN or infinite values: its time would be that of no answer.
    """
    if reason := stand_in(engine.bundle, engine.target):
        raise OptionError(reason)
    allowed = engine.spec.batch
    if not allowed.min <= batch <= allowed.max or not 0 < seconds < math.inf:
        msg = f"Batch {batch} for {seconds} s: the engine takes batches {allowed} (MIN:OPT:MAX), and time is above 0."
        raise OptionError(msg)
    shape = engine.spec.inputs[0].with_batch(batch)
    images = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
    for _ in range(warmup):
        engine.run_batch(images)
    step, total = f"Timing {engine.target}", int(1000 * seconds)
    times: list[float] = []
    spent = 0.0
    progress(step, 0, total)
    while spent < seconds or len(times) < 10:
        start = time.perf_counter()
        outputs = engine.run_batch(images)
        times.append(time.perf_counter() - start)
        spent += times[-1]
        progress(step, min(int(1000 * spent), total - 1), total)
    progress(step, total, total)
    check_finite(outputs, engine, "random images", images)
    p50, p90, p99 = (float(1000 * value) for value in np.percentile(times, [50, 90, 99]))
    return Latency(target=engine.target, batch=batch, runs=len(times), p50=p50, p90=p90, p99=p99)
