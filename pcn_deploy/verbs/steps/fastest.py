"""Is INT8 worth it? Build FP16 and INT8, time both where they can run, keep the faster one that passes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any

from pcn_deploy.artefact.engine import Engine
from pcn_deploy.engines.registry import fastest_first, get_backend
from pcn_deploy.errors import ModelError, ParityError
from pcn_deploy.progress import Progress, silent
from pcn_deploy.verbs.bench import bench
from pcn_deploy.verbs.build import CompileResult
from pcn_deploy.verbs.options import CompileOptions

IMPOSSIBLE = (ModelError, ParityError)
"""What a build in INT8 may end with, so that only FP16 is left."""

ROUNDS = 5
SECONDS = 0.4
"""Per engine and round; the engines take turns, so that a busy moment of the machine hits both."""

GAIN = 1.02
"""INT8 must be faster than FP16 by this factor: less is within the noise of a repeated measurement."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What was kept, and why.

    Attributes:
        precision: `int8` or `fp16`.
        reason: In words, with the figures.
        target: What was timed; empty if nothing could be.
        latency_ms: Median latency of each precision at the batch that engines are optimised for, in ms.
    """

    precision: str
    reason: str
    target: str = ""
    latency_ms: dict[str, float]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def both_precisions(options: CompileOptions) -> tuple[CompileOptions, CompileOptions]:
    """The options of the two builds of `compile_fastest`, in their order."""
    return replace(options, precision="int8"), replace(options, precision="fp16", recovery=())


def compile_fastest(
    build: Callable[[CompileOptions], CompileResult], options: CompileOptions, progress: Progress = silent
) -> tuple[CompileResult, Choice]:
    """Build in INT8 and in FP16 and keep the faster one that passes.

    Args:
        build: Compiles the network with the options it is given.
        options: What to build; the precision is replaced.
        progress: Told how far the timing is.

    Returns:
        The result kept, with the choice in its manifest. It is INT8 where both pass and nothing could be timed.

    Raises:
        PcnDeployError: Whatever ends the build of FP16.
    """
    int8_options, fp16_options = both_precisions(options)
    refusal = ""
    int8: CompileResult | None = None
    try:
        int8 = build(int8_options)
        if not int8:
            refusal = "INT8 broke its parity budget"
    except IMPOSSIBLE as error:
        refusal = str(error)
    fp16 = build(fp16_options)
    if int8 is None or refusal:
        choice = Choice(precision="fp16", reason=f"INT8 is not possible: {refusal}", latency_ms={})
    elif not fp16:
        choice = Choice(precision="int8", reason="FP16 broke its parity budget, INT8 did not", latency_ms={})
    else:
        choice = _compare({"int8": int8, "fp16": fp16}, options, progress)
    kept = int8 if int8 is not None and choice.precision == "int8" else fp16
    kept.bundle.manifest.choice = choice.to_json()
    return kept, choice


def _compare(results: dict[str, CompileResult], options: CompileOptions, progress: Progress) -> Choice:
    target = _timed_target(options.targets)
    if not target:
        first = fastest_first(options.targets)[0]
        reason = f"both pass; {first} cannot run here, so which is faster was not measured: run bench on the device"
        return Choice(precision="int8", reason=reason, latency_ms={})
    engines = {precision: Engine.open(result.bundle, target) for precision, result in results.items()}
    times: dict[str, list[float]] = {precision: [] for precision in engines}
    try:
        for done in range(ROUNDS):
            progress("Timing INT8 and FP16", done, ROUNDS)
            for precision, engine in engines.items():
                times[precision].append(bench(engine, batch=options.batch.opt, seconds=SECONDS).p50)
        progress("Timing INT8 and FP16", ROUNDS, ROUNDS)
    finally:
        for engine in engines.values():
            engine.close()
    return decide({precision: median(latencies) for precision, latencies in times.items()}, target)


def _timed_target(targets: tuple[str, ...]) -> str:
    """The fastest of the targets, if it can run here; CPU targets beside a TensorRT target do not speak for it."""
    first = fastest_first(targets)[0]
    return first if get_backend(first).availability().can_run else ""


def decide(latency_ms: dict[str, float], target: str) -> Choice:
    """Choose between two precisions that both pass.

    Args:
        latency_ms: Median latency of `int8` and `fp16`, in ms.
        target: What was timed.
    """
    gain = latency_ms["fp16"] / latency_ms["int8"]
    figures = f"{latency_ms['int8']:.3f} ms in INT8, {latency_ms['fp16']:.3f} ms in FP16 on {target}"
    if gain >= GAIN:
        return Choice(precision="int8", reason=f"{gain:.2f} x as fast: {figures}", target=target, latency_ms=latency_ms)
    return Choice(
        precision="fp16",
        reason=f"INT8 is not worth it here: {figures}",
        target=target,
        latency_ms=latency_ms,
    )
