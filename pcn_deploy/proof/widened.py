"""The sharpest part of the verdict on a rounded graph: with its rounding taken out it must equal the network.

Rounding hides small faults: an INT8 engine that is right may be 20 dB from the network it was made from. But what a
graph computes in float32, from its own weights and without activation codes, is that of the same network with these
weights up to the order of summation; and the activation codes that were taken out must be those that were planned.
numpy and ONNX only.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from pcn_deploy.artefact.bundle import Bundle
from pcn_deploy.artefact.engine import Engine
from pcn_deploy.artefact.golden import GoldenSet
from pcn_deploy.artefact.manifest import Manifest
from pcn_deploy.calibration.plan.rules import PrecisionPlan
from pcn_deploy.calibration.scales import input_scales
from pcn_deploy.members import GRAPH, PLAN
from pcn_deploy.progress import Progress, silent
from pcn_deploy.proof.judgement import engine_outputs
from pcn_deploy.tasks.distance import sqnr_of_images
from pcn_deploy.tasks.limits import ParityBudget
from pcn_deploy.tasks.report import ParityReport

Array = npt.NDArray[np.float32]
WIDENED = "widened"
"""What reports call this execution."""


def has_widened(manifest: Manifest) -> bool:
    """Whether a bundle with this manifest can be judged so: its graph rounds, and it is not of 0.1.0."""
    return bool(manifest.judged.widened_images)


def verify_widened(engine: Engine, budget: ParityBudget, progress: Progress = silent) -> ParityReport:
    """Judge a widened graph, and the codes of the graph that it was made from.

    Args:
        engine: Executes `engines.rounded.widen` of the bundle's graph.
        budget: Of the bundle; of it only what has no limit here is kept.
        progress: Told the number of images done.

    Returns:
        The report: on every real image the noise of each output must be so far below the mean power of that output as
        the golden set says.

    Raises:
        BundleError: If the golden set was altered.
    """
    golden = GoldenSet.read(engine.bundle)
    outputs = engine_outputs(engine, golden.images[~golden.edge], progress, size=1)  # more take more memory
    return judge_widened(engine.bundle, engine.target, budget, outputs)


def judge_widened(bundle: Bundle, target: str, budget: ParityBudget, outputs: dict[str, Array]) -> ParityReport:
    """Judge what a widened graph has answered to the real images of the golden set; as `verify_widened`.

    Args:
        bundle: Holds the graph, its plan and the golden set.
        target: The engine that was made from the graph.
        budget: Of the bundle.
        outputs: The outputs by name, `(M, ...)`.

    Raises:
        BundleError: If the golden set was altered.
    """
    golden = GoldenSet.read(bundle)
    expected, first = golden.widened, golden.first
    meter = golden.meter(first)
    meter.update(expected[first], outputs[first])
    apart = [sqnr_of_images(expected[name], values, golden.live(name)) for name, values in outputs.items()]
    apart = np.min(apart, axis=0)
    worst = int((apart - golden.widened_db).argmin())
    limit, failures = float(golden.widened_db[worst]), []
    if apart[worst] < limit:
        failures.append(f"SQNR {apart[worst]:.1f} dB of {golden.names[worst]} is below {limit:.1f} dB")
    plan = PrecisionPlan.from_json(bundle.read_json(PLAN))
    return ParityReport(
        target=target,
        executed_by=WIDENED,
        images=len(apart),
        data="golden",
        metrics=meter.metrics(),
        budget=replace(budget, sqnr_db=limit),
        failures=(*failures, *unlike_plan(bundle.read(GRAPH), plan)),
    )


def unlike_plan(graph: bytes, plan: PrecisionPlan) -> list[str]:
    """What the activation codes of a graph are that was not planned, one sentence each.

    Args:
        graph: A serialised ONNX graph.
        plan: With ranges.
    """
    import onnx

    planned, model = input_scales(plan), onnx.load_from_string(graph).graph
    values = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.initializer}
    quantizing = [node for node in model.node if node.op_type == "QuantizeLinear"]
    codes = {node.output[0] for node in quantizing}
    dequantizing = [node for node in model.node if node.op_type == "DequantizeLinear" and node.input[0] in codes]
    sentences, scales = [], set()
    for node in (*quantizing, *dequantizing):
        wanted = planned.get(node.name.rpartition(".")[0], math.nan)
        scale, zero = (values.get(name, np.array(math.nan)).astype(np.float64) for name in node.input[1:3])
        if not np.isclose(scale, wanted, rtol=1e-6, atol=0).all() or (zero != 0).any():
            seen = f"{scale.flat[0]:.6g} and zero point {zero.flat[0]:.6g}"
            sentences.append(f"{node.name} has scale {seen}, planned are {wanted:.6g} and 0")
        scales.add(wanted)
    missing = [path for path, scale in planned.items() if scale not in scales]
    return sentences + [f"nothing has the planned scale of {path}" for path in missing]
