"""What each layer costs when it becomes INT8: alone, with all the others, by its weights, by its input."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pcn_deploy.calibration.search.evaluation import BATCH, Answers
from pcn_deploy.calibration.search.ledger import Ledger
from pcn_deploy.calibration.search.simulate import Simulation
from pcn_deploy.progress import Progress, silent
from pcn_deploy.tasks.classification import LogitsMeter

STEP = "Sensitivity"
VARIANTS = ("only_quantized", "only_kept", "weight_only", "input_only")


@dataclass(frozen=True, kw_only=True)
class Effect:
    """How far the logits are from those of the unquantised network.

    Attributes:
        sqnr_db: SQNR of the logits over all images, in dB.
        top1_agreement: Share of images with the same answer, in percent.
        top1_drop: Loss of top-1 accuracy, in percentage points; None without labels.
    """

    sqnr_db: float
    top1_agreement: float
    top1_drop: float | None = None


@dataclass(frozen=True, kw_only=True)
class LayerSensitivity:
    """Effects of one layer.

    Attributes:
        op: Name of the module in the deploy form.
        kind: Class name of the module.
        only_quantized: The layer is the only one in INT8.
        only_kept: The layer is the only one not in INT8.
        weight_only: Only the weights of the layer are rounded; None for a residual addition, which has none.
        input_only: Only the input of the layer is rounded (of a residual addition, the identity).
    """

    op: str
    kind: str
    only_quantized: Effect
    only_kept: Effect
    weight_only: Effect | None
    input_only: Effect


@dataclass(frozen=True, kw_only=True)
class Sensitivity:
    """The outcome of an analysis.

    Attributes:
        images: Number of images.
        labelled: Whether they have labels.
        all_quantized: Every layer that may be INT8 is.
        layers: Most harmful first: by the SQNR with only that layer quantised.
    """

    images: int
    labelled: bool
    all_quantized: Effect
    layers: tuple[LayerSensitivity, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def measure_sensitivity(
    simulation: Simulation, kinds: dict[str, str], answers: Answers, ledger: Ledger, progress: Progress = silent
) -> Sensitivity:
    """Measure every layer in every variant.

    Args:
        simulation: The network.
        kinds: Class name of each layer, by its name.
        answers: Images with the answers of the trained network.
        ledger: Where measurements are kept; those it has are not repeated.
        progress: Told the number of measurements done.
    """
    wanted = ["all_quantized:"] + [
        f"{variant}:{layer}"
        for layer in simulation.layers
        for variant in VARIANTS
        if not (variant == "weight_only" and kinds[layer] == "ResidualAdd")
    ]
    judge = _Judge(simulation, answers)

    def measure(name: str) -> dict[str, Any]:
        variant, _, layer = name.partition(":")
        return asdict(judge.effect(*_roundings(simulation, variant, layer)))

    ledger.measure(wanted, measure, lambda done: progress(STEP, done, len(wanted), "measurements"))
    effects = {name: Effect(**ledger[name]) for name in wanted}
    layers = [
        LayerSensitivity(
            op=layer,
            kind=kinds[layer],
            only_quantized=effects[f"only_quantized:{layer}"],
            only_kept=effects[f"only_kept:{layer}"],
            weight_only=effects.get(f"weight_only:{layer}"),
            input_only=effects[f"input_only:{layer}"],
        )
        for layer in simulation.layers
    ]
    return Sensitivity(
        images=len(answers),
        labelled=answers.labelled,
        all_quantized=effects["all_quantized:"],
        layers=tuple(sorted(layers, key=lambda one: one.only_quantized.sqnr_db)),
    )


def rank(
    simulation: Simulation,
    units: dict[str, tuple[str, ...]],
    answers: Answers,
    ledger: Ledger,
    progress: Progress = silent,
) -> list[str]:
    """Order units of layers, most harmful first, by the SQNR of the logits with only that unit quantised.

    Args:
        simulation: The network.
        units: Layers that are quantised together, by the name of the unit.
        answers: Images.
        ledger: Where measurements are kept; those it has are not repeated.
        progress: Told the number of units done.
    """
    judge, names = _Judge(simulation, answers), {f"only_quantized:{unit}": unit for unit in units}

    def measure(name: str) -> dict[str, Any]:
        layers = frozenset(units[names[name]])
        return asdict(judge.effect(layers, layers))

    ledger.measure(list(names), measure, lambda done: progress(STEP, done, len(names), "layers"))
    return [names[name] for name in sorted(names, key=lambda name: float(ledger[name]["sqnr_db"]))]


def _roundings(simulation: Simulation, variant: str, layer: str) -> tuple[frozenset[str], frozenset[str]]:
    """Which layers round their inputs, and which their weights."""
    every, one, none = frozenset(simulation.layers), frozenset({layer}), frozenset[str]()
    return {
        "all_quantized": (every, every),
        "only_quantized": (one, one),
        "only_kept": (every - one, every - one),
        "weight_only": (none, one),
        "input_only": (one, none),
    }[variant]


class _Judge:
    """Measures effects; the unquantised network runs once, its logits are kept."""

    def __init__(self, simulation: Simulation, answers: Answers) -> None:
        self._simulation, self._answers = simulation, answers
        self._reference: list[npt.NDArray[np.float32]] = []

    def effect(self, inputs: frozenset[str], weights: frozenset[str]) -> Effect:
        meter = LogitsMeter()
        for index, (images, labels) in enumerate(self._answers.source.batches(BATCH)):
            if index == len(self._reference):
                self._reference.append(self._simulation.logits(images))
            logits = self._simulation.logits(images, inputs=inputs, weights=weights)
            meter.update(self._reference[index], logits, labels)
        metrics = meter.metrics()
        return Effect(
            sqnr_db=metrics["sqnr_db"], top1_agreement=metrics["top1_agreement"], top1_drop=metrics.get("top1_drop")
        )
