"""The verdict on what was built: the golden set through the engine, and through every further execution of its graph.

`prove` is all that the verdict of a build consists of, so that it can be asked of any bundle.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from pcn_deploy.bundle import Bundle
from pcn_deploy.engines.base import Array, Session
from pcn_deploy.engines.onnxruntime import open_plain
from pcn_deploy.engines.registry import get_backend
from pcn_deploy.engines.stock import open_stock
from pcn_deploy.errors import StockSessionError
from pcn_deploy.limits import ParityBudget
from pcn_deploy.memory import return_freed
from pcn_deploy.parity import ParityReport
from pcn_deploy.progress import Progress, silent
from pcn_deploy.runtime import Engine, executor
from pcn_deploy.specs import EngineSpec
from pcn_deploy.verification import verify_golden
from pcn_deploy.widened import WIDENED, has_widened, judge_widened, verify_widened

GRAPH = "model.onnx"


@dataclass(frozen=True, kw_only=True)
class Execution:
    """One more way to execute `model.onnx`, which must pass the same verdict as the engine.

    Attributes:
        name: What reports call it.
        applies: Whether it says something of a bundle with this manifest (`precision`, `remainder`).
        judge: Compares what the session answers with what the golden set holds.
        open: Opens a session on the bytes of the graph. A `StockSessionError` from it or its session is noted, and
            does not fail the verdict.
    """

    name: str
    applies: Callable[[dict[str, Any]], bool]
    open: Callable[[bytes, EngineSpec], Session]
    judge: Callable[[Engine, ParityBudget, Progress], ParityReport] = verify_golden


def _open_rounded(data: bytes, spec: EngineSpec) -> Session:
    from pcn_deploy.graph.rounded import round_to_types

    return get_backend("cpu").open(round_to_types(data), spec)


def _open_widened(data: bytes, spec: EngineSpec) -> Session:
    from pcn_deploy.graph.rounded import widen

    return open_plain(widen(data), spec)


EXECUTIONS: tuple[Execution, ...] = (
    Execution(name=WIDENED, applies=has_widened, open=_open_widened, judge=verify_widened),
    Execution(name="rounded", applies=lambda manifest: manifest["remainder"] != "fp32", open=_open_rounded),
    # ONNX Runtime has no BF16 on the CPU
    Execution(name="stock", applies=lambda manifest: manifest["remainder"] != "bf16", open=open_stock),
)
"""In every build, beside the engine of each target that is made from the graph."""


def prove(
    bundle: Bundle,
    target: str,
    budget: ParityBudget | None = None,
    progress: Progress = silent,
    widened: dict[str, Array] | None = None,
) -> ParityReport:
    """Judge one engine of a bundle in all the ways that a build does.

    Where the engine cannot run on this machine, ONNX Runtime runs the graph it was built from.

    Args:
        bundle: Holds the engine, its graph and the golden set.
        target: The engine.
        budget: What is still parity; by default what the bundle was built for.
        progress: Told the number of images done.
        widened: What the widened graph answers to the real images, by name, where that was asked already.

    Returns:
        The report of the engine; it fails where any execution does.

    Raises:
        BundleError: If the golden set was altered.
        PcnDeployError: What opening the engine raises.
    """
    budget = budget or ParityBudget(**bundle.manifest["parity_budget"])
    backend = get_backend(target)
    with Engine.open(bundle, target, executed_by=executor(backend)) as engine:
        report, spec = verify_golden(engine, budget, progress), engine.spec
    if backend.member == "model.ts":
        return report
    if widened:
        report = report.with_execution(judge_widened(bundle, target, budget, widened))
    for execution in EXECUTIONS:
        if execution.name not in report.executions and execution.applies(bundle.manifest):
            return_freed()  # the session before has held all weights
            try:
                with Engine(bundle, target, execution.name, execution.open(bundle.read(GRAPH), spec)) as engine:
                    seen = execution.judge(engine, budget, _named(progress, execution.name))
                    report = report.with_execution(seen)
            except StockSessionError as error:
                report = replace(report, notes=(*report.notes, str(error)))
    return report


def _named(progress: Progress, name: str) -> Progress:
    """Progress whose steps say which execution is at work."""
    return lambda step, *rest: progress(f"{step}, {name}", *rest)
