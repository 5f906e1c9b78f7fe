"""What would help an 8-bit build that breaks its budget: found by trying it on the golden images, in simulation."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from pcn_deploy.artefact.golden import GoldenSet
from pcn_deploy.calibration.calibrators import calibrators_of
from pcn_deploy.errors import DataError
from pcn_deploy.progress import Progress
from pcn_deploy.tasks.limits import ParityBudget
from pcn_deploy.tasks.noise_floor import NoiseFloor, natural_db
from pcn_deploy.verbs.options import CompileOptions

if TYPE_CHECKING:
    from pcn_deploy.verbs.steps.prepared import Prepared

Array = npt.NDArray[np.float32]

SECONDS = 60.0
"""Nothing new is tried after that."""

STEP = "Trying what would help"


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """Something that was tried.

    Attributes:
        words: The options to give.
        sqnr_db: SQNR of the logits of the real golden images, simulated.
        passed: Whether it keeps the budget there.
    """

    words: str
    sqnr_db: float
    passed: bool

    def __str__(self) -> str:
        return f"{self.words}: {self.sqnr_db:.1f} dB, {'within' if self.passed else 'not within'} the budget"


def judge(words: str, golden: GoldenSet, outputs: Array, budget: ParityBudget) -> Attempt:
    """What the real images of a golden set say of the first output, `(N, ...)`, for all of its images."""
    meter = golden.meter(golden.first)
    meter.update(golden.outputs[golden.first][~golden.edge], outputs[~golden.edge])
    floor = NoiseFloor(natural_db=natural_db(golden.images[~golden.edge], "int8"))
    report = meter.report(target="", executed_by="", data="", budget=budget, floor=floor)
    return Attempt(words=words, sqnr_db=report.metrics["sqnr_db"], passed=bool(report))


def advise(network: Prepared, golden: GoldenSet, options: CompileOptions, progress: Progress) -> tuple[Attempt, ...]:
    """Try what could help a network whose simulation breaks its budget already.

    Args:
        network: The network, with the plan and the scales that do not do.
        golden: Images with the outputs of the trained network.
        options: What is built.
        progress: Told how much of the time is used, in seconds.

    Returns:
        Other calibrators, then leaving the most harmful layers out: what gained, best first.
    """
    start = time.monotonic()

    def out_of_time() -> bool:
        spent = time.monotonic() - start
        progress(STEP, min(int(spent), int(SECONDS)), int(SECONDS))
        return spent > SECONDS

    now = judge("now", golden, golden.simulated[golden.first], options.budget)
    tried = [*_calibrators(network, golden, options, out_of_time), *_layers(network, golden, options, out_of_time)]
    progress(STEP, int(SECONDS), int(SECONDS))
    gained = [attempt for attempt in tried if attempt.passed or attempt.sqnr_db > now.sqnr_db]
    return tuple(sorted(gained, key=lambda attempt: (not attempt.passed, -attempt.sqnr_db)))


def remainder_in_fp32(golden: GoldenSet, options: CompileOptions) -> tuple[Attempt, ...]:
    """`--remainder fp32`, which is what the simulation computes, if that keeps the budget."""
    if options.graph_type == "fp32":
        return ()
    attempt = judge("--remainder fp32", golden, golden.simulated[golden.first], options.budget)
    return (attempt,) if attempt.passed else ()


def _calibrators(
    network: Prepared, golden: GoldenSet, options: CompileOptions, out_of_time: Callable[[], bool]
) -> list[Attempt]:
    """The same histograms through every other calibrator."""
    from pcn_deploy.calibration.collect import recalibrate
    from pcn_deploy.calibration.quantized import apply_scales

    seen, tried = network.calibration, []
    for name in calibrators_of(options.precision):
        if seen is None or name == seen.calibrator or out_of_time():
            continue
        try:
            other = network.with_calibration(recalibrate(seen, name, options.percentile))
        except DataError:  # of `max` only magnitudes are kept
            continue
        logits = _logits(apply_scales(other.deployed, other.scales), golden.images)
        tried.append(judge(f"--calibrator {name}", golden, logits, options.budget))
    return tried


def _layers(
    network: Prepared, golden: GoldenSet, options: CompileOptions, out_of_time: Callable[[], bool]
) -> list[Attempt]:
    """The most harmful layers left out: 1, 2, 4, ... until the budget is kept, or half of them are."""
    from pcn_deploy.calibration.quantized import apply_scales
    from pcn_deploy.calibration.search.simulate import Simulation

    simulation = Simulation(network.unrounded, apply_scales(network.deployed, network.scales), network.scales)
    units, every, harm = network.units(), frozenset(network.scales), {}
    for unit, layers in units.items():
        if out_of_time():
            return []
        alone = simulation.logits(golden.images, inputs=layers, weights=layers)
        harm[unit] = judge(unit, golden, alone, options.budget).sqnr_db
    ranking = sorted(harm, key=lambda unit: harm[unit])
    tried: list[Attempt] = []
    count = 1
    while count <= max(1, len(ranking) // 2) and not (tried and tried[-1].passed) and not out_of_time():
        kept = every - {layer for unit in ranking[:count] for layer in units[unit]}
        logits = simulation.logits(golden.images, inputs=kept, weights=kept)
        lines = ", ".join(f'[layers."{unit}"] precision = "{options.graph_type}"' for unit in ranking[:count])
        tried.append(judge(f"--recipe FILE.toml with {lines}", golden, logits, options.budget))
        count *= 2
    return tried[-1:]


def _logits(network: object, images: Array) -> Array:
    import torch

    with torch.inference_mode():
        outputs = network(torch.tensor(images))  # type: ignore[operator]
    logits: Array = (outputs if isinstance(outputs, torch.Tensor) else outputs[0]).numpy()
    return logits
