"""The verb `bench`: what it returns and what it refuses. Nothing here depends on how fast anything is."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from helpers import small_bundle

from pcn_deploy.artefact.bundle import Bundle
from pcn_deploy.errors import OptionError
from pcn_deploy.specs import BatchRange, EngineSpec, TensorSpec
from pcn_deploy.verbs.bench import Latency, bench

SPEC = EngineSpec(
    inputs=(TensorSpec(name="images", dtype="float32", shape=("batch", 3, 4, 4)),),
    outputs=(TensorSpec(name="logits", dtype="float32", shape=("batch", 2)),),
    batch=BatchRange(min=2, opt=2, max=4),
)


@dataclass
class FakeEngine:
    """Keeps the images it is given."""

    target: str = "cpu"
    spec: EngineSpec = SPEC
    bundle: Bundle = field(default_factory=small_bundle)
    seen: list[Any] = field(default_factory=list)

    def run_batch(self, images: Any) -> Any:
        self.seen.append(images)
        return {"logits": np.zeros((len(images), 2), np.float32)}


def measure(engine: FakeEngine, **given: Any) -> Latency:
    return bench(engine, **given)  # type: ignore[arg-type]


def test_it_warms_up_and_then_counts_at_least_ten_runs() -> None:
    engine = FakeEngine()
    found = measure(engine, batch=3, seconds=1e-9, warmup=4)
    assert (found.target, found.batch, found.runs) == ("cpu", 3, 10)
    assert len(engine.seen) == 14
    assert engine.seen[0].shape == (3, 3, 4, 4)
    assert engine.seen[0].dtype == np.float32
    assert engine.seen[0].std() > 0.5, "zeros can be faster than images"
    assert 0 < found.p50 <= found.p90 <= found.p99


def test_throughput_is_images_per_second_at_the_median() -> None:
    latency = Latency(target="cpu", batch=8, runs=10, p50=4.0, p90=5.0, p99=6.0)
    assert latency.throughput_ips == pytest.approx(2000.0)
    assert latency.to_json() == {
        "latency_ms": {"p50": 4.0, "p90": 5.0, "p99": 6.0},
        "throughput_ips": pytest.approx(2000.0),
        "batch": 8,
        "runs": 10,
    }


def test_percentiles_are_those_of_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of 1, 2, ... 100 ms by a clock of ours."""
    durations = np.arange(1, 101) / 1000
    ticks = iter(np.stack([np.cumsum(durations) - durations, np.cumsum(durations)], 1).ravel().tolist())
    monkeypatch.setattr("pcn_deploy.verbs.bench.time.perf_counter", lambda: next(ticks))
    found = measure(FakeEngine(), batch=2, seconds=5.05, warmup=0)
    assert found.runs == 100
    expected = np.percentile(durations * 1000, [50, 90, 99])
    assert (found.p50, found.p90, found.p99) == pytest.approx(tuple(expected))


@pytest.mark.parametrize("batch", [0, 1, 5])
def test_batches_the_engine_does_not_take(batch: int) -> None:
    engine = FakeEngine()
    with pytest.raises(OptionError, match=rf"Batch {batch} .*takes batches 2:2:4"):
        measure(engine, batch=batch)
    assert engine.seen == []


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan"), float("inf")])
def test_times_that_are_none(seconds: float) -> None:
    engine = FakeEngine()
    with pytest.raises(OptionError, match=r"time is above 0"):
        measure(engine, batch=2, seconds=seconds)
    assert engine.seen == []


def test_progress_starts_at_none_and_ends_complete() -> None:
    calls: list[tuple[str, int, int]] = []
    measure(
        FakeEngine(),
        batch=2,
        seconds=0.001,
        progress=lambda step, done, total, unit="", /: calls.append((step, done, total)),
    )
    assert calls[0] == ("Timing cpu", 0, 1)
    assert calls[-1] == ("Timing cpu", 1, 1)
    assert all(done < total for _, done, total in calls[:-1])
