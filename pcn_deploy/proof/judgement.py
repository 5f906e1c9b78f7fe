"""The verdict on one execution of a bundle's graph: its answers to the golden set. numpy only."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt

from pcn_deploy.aliases import Images
from pcn_deploy.artefact.engine import Engine
from pcn_deploy.artefact.golden import NOISE, GoldenSet
from pcn_deploy.artefact.manifest import Manifest
from pcn_deploy.engines.registry import TARGETS, get_backend
from pcn_deploy.engines.stock import STOCK
from pcn_deploy.progress import Progress, silent
from pcn_deploy.tasks.limits import BUDGETS, GUARD_DB, ParityBudget
from pcn_deploy.tasks.noise_floor import NoiseFloor, natural_db
from pcn_deploy.tasks.parity import ParityMeter
from pcn_deploy.tasks.report import ParityReport
from pcn_deploy.tasks.role import power_of_noise

_COARSER = {"fp32": 2.0**26, "fp16": 2.0**26, "bf16": 2.0**32}
"""How many times more power the rounding errors of a type have than those of float32: its mantissa has 13 or 16 bits
less. A GPU may round the factors of an FP32 product as FP16."""

_AT_ONCE = 4
"""Images in a batch: enough that batches are proven too; more take more memory (PatchConvNet-S60 20 MB each)."""

_TWICE = 2.0
"""Power of the noise between two executions that share none of their rounding errors."""

TWICE_DB = 3.0
"""Twice the power of a noise."""


def verify_golden(engine: Engine, budget: ParityBudget, progress: Progress = silent) -> ParityReport:
    """Compare an engine with the outputs that the golden set of its bundle holds.

    Real images are judged by the budget, against the eager network. Edge images too; but those of an 8-bit graph, and
    its real images once more, against the simulation of that graph. Where the network answers an edge image with its
    own rounding, the engine's answer must be finite.

    Raises:
        BundleError: If the golden set was altered.
    """
    golden = GoldenSet.read(engine.bundle)
    names = list(golden.outputs)
    outputs = engine_outputs(engine, golden.images, progress)
    first, *others = (_compared(golden, ~golden.edge, golden.outputs[name], outputs[name], name) for name in names)
    real, manifest, by = golden.images[~golden.edge], engine.bundle.manifest, engine.executed_by
    floor, *floors = (noise_floor(golden, real, manifest, by, name) for name in names)
    report = first.report(
        target=engine.target,
        executed_by=engine.executed_by,
        data="golden",
        budget=budget,
        others=list(zip(others, floors, strict=True)),
        changes=floor.judges_noise() or engine.bundle.manifest.golden != NOISE,
        floor=floor,
    )
    guard = GUARD_DB.get(engine.bundle.manifest.precision, 0.0) if _is_exact(engine.executed_by) else 0.0
    if budget.sqnr_db <= report.metrics["sqnr_db"] < budget.sqnr_db + guard:
        failure = (
            f"SQNR {report.metrics['sqnr_db']:.1f} dB is below {budget.sqnr_db + guard:.1f} dB, the least on a CPU"
        )
        report = replace(report, failures=(*report.failures, failure))
    limit = budget
    if golden.simulated:
        limit = simulation_limit(golden, budget, engine.bundle.manifest.remainder)
    edge_limit = replace(limit, sqnr_db=min(limit.sqnr_db, budget.sqnr_db))
    for name in names:
        expected = golden.simulated.get(name, golden.outputs[name])
        if golden.simulated:
            seen = _compared(golden, ~golden.edge, expected, outputs[name], name)
            report = seen.added_to(report, "simulated", limit, first=name == golden.first)
        if golden.judged_edge.any():
            seen = _compared(golden, golden.judged_edge, expected, outputs[name], name)
            report = seen.added_to(report, "edge", edge_limit, first=name == golden.first)
    asked = [(index, golden.names[index]) for index in np.flatnonzero(golden.rounding)]
    broken = [name for index, name in asked if not all(np.isfinite(values[index]).all() for values in outputs.values())]
    if broken:
        report = report.with_part("edge", {}, [f"NaN or infinite outputs for {', '.join(broken)}"], "edge images")
    return replace(report, outputs=golden.roles)


def simulation_limit(golden: GoldenSet, budget: ParityBudget, remainder: str) -> ParityBudget:
    """How far an 8-bit engine may be from the simulation of its graph: twice the power of the noise of quantisation.

    Two right executions of one graph round a few codes to different sides, and from there on draw their rounding errors
    anew: at worst they share none of them. Where that is less than FP16 rounds, the limit is that of FP16.

    Args:
        golden: A golden set with simulated outputs.
        budget: What is parity with the trained network.
        remainder: Type of the graph outside Q/DQ.
    """
    first = golden.first
    seen = _compared(golden, ~golden.edge, golden.outputs[first], golden.simulated[first], first).metrics()
    noise = seen.get("sqnr_differences_db", seen["sqnr_db"])
    return replace(budget, sqnr_db=min(noise - TWICE_DB, BUDGETS[remainder].sqnr_db))


def noise_floor(golden: GoldenSet, images: Images, manifest: Manifest, by: str, output: str) -> NoiseFloor:
    """What rounding leaves of what the images change, in an execution.

    Args:
        golden: Holds what was measured.
        images: Those that are compared, or some of them, `(N, C, H, W)`, transformed.
        manifest: Of the bundle.
        by: What executes its graph.
        output: Name of the output.
    """
    precision, power = manifest.precision, golden.noise(output)
    exact = precision == "fp32" and _is_exact(by)
    if not exact:
        power *= _COARSER[manifest.remainder]
    if golden.simulated:
        trained, simulated = (values[output][~golden.edge] for values in (golden.outputs, golden.simulated))
        power += _TWICE * power_of_noise(trained, simulated, golden.role(output), golden.live(output))
    return NoiseFloor(natural_db=natural_db(images, precision), power=power, exact=exact)


def _is_exact(by: str) -> bool:
    """Whether what executes a graph computes FP32 in FP32: a backend, or an execution that runs where `cpu` does."""
    return get_backend(by).exact if by in TARGETS else by == STOCK


def engine_outputs(engine: Engine, images: Images, progress: Progress, size: int | None = None) -> dict[str, Images]:
    """All outputs of an engine for all images `(N, C, H, W)`, by name; by default some at once, if it takes them."""
    batch, step = engine.spec.batch, f"Proving {engine.target}"
    size = size or max(batch.min, min(batch.max, _AT_ONCE))
    batches = []
    progress(step, 0, len(images), "images")
    for start in range(0, len(images), size):
        batches.append(engine.outputs(images[start : start + size]))
        progress(step, min(start + size, len(images)), len(images), "images")
    return {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}


def _compared(
    golden: GoldenSet, chosen: npt.NDArray[np.bool_], expected: Images, outputs: Images, output: str
) -> ParityMeter:
    """Some of the golden images, compared."""
    meter = golden.meter(output)
    names = [name for name, one in zip(golden.names, chosen, strict=True) if one]
    meter.update(expected[chosen], outputs[chosen], name=names.__getitem__)
    return meter
