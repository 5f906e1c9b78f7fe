"""The verdict on what was built: the golden set through the engine, and through every further execution of its graph.

`prove` is all that the verdict of a build consists of, so that it can be asked of any bundle.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from pcn_deploy.artefact.bundle import Bundle
from pcn_deploy.artefact.engine import Engine, executor
from pcn_deploy.artefact.manifest import Manifest
from pcn_deploy.engines.base import Array, OpenOptions, Session
from pcn_deploy.engines.onnxruntime import open_plain
from pcn_deploy.engines.registry import get_backend
from pcn_deploy.engines.stock import STOCK, open_stock
from pcn_deploy.errors import StockSessionError
from pcn_deploy.members import GRAPH, SCRIPT
from pcn_deploy.memory import return_freed
from pcn_deploy.progress import Progress, silent
from pcn_deploy.proof.judgement import verify_golden
from pcn_deploy.proof.widened import WIDENED, has_widened, judge_widened, verify_widened
from pcn_deploy.remedies import install
from pcn_deploy.specs import EngineSpec
from pcn_deploy.tasks.limits import ParityBudget
from pcn_deploy.tasks.report import ParityReport

LEAN = OpenOptions(lean=True)
_TO_EXECUTE = ("onnx", "onnx-ir", "onnxruntime")
"""What the executions below need; a device need not have torch for them."""
ROUNDED = "rounded"
"""What reports call the execution that rounds every tensor to its type."""


@dataclass(frozen=True, kw_only=True)
class Execution:
    """One more way to execute `model.onnx`, which must pass the same verdict as the engine.

    Attributes:
        name: What reports call it.
        applies: Whether it says something of a bundle with this manifest (`precision`, `remainder`).
        judge: Compares what the session answers with what the golden set holds.
        open: Opens a session on the graph whose bytes its first argument gives: they are as large as all weights, and
            need not be kept. A `StockSessionError` from it or its session is noted, and does not fail the verdict.
    """

    name: str
    applies: Callable[[Manifest], bool]
    open: Callable[[Callable[[], bytes], EngineSpec], Session]
    judge: Callable[[Engine, ParityBudget, Progress], ParityReport] = verify_golden


def _open_rounded(read: Callable[[], bytes], spec: EngineSpec) -> Session:
    from pcn_deploy.engines.rounded import round_to_types

    return get_backend("cpu").open(round_to_types(read()), spec)


def _open_widened(read: Callable[[], bytes], spec: EngineSpec) -> Session:
    from pcn_deploy.engines.rounded import widen

    return open_plain(widen(read()), spec)


def _open_stock(read: Callable[[], bytes], spec: EngineSpec) -> Session:
    import onnxruntime  # noqa: F401 - missing here, it is missing in the other process

    return open_stock(read, spec)


def judged_by(bundle: Bundle, target: str) -> str:
    """What executes an engine for the images that judge the accuracy; where it cannot run here, its graph.

    A device stores what the graph declares as FP16, while ONNX Runtime keeps FP32 between such nodes on a CPU, and
    would hide what is lost. So that graph is executed with every tensor rounded to its type.
    """
    by = executor(get_backend(target))
    return by if by == target or bundle.manifest.remainder == "fp32" else ROUNDED


def open_to_judge(bundle: Bundle, target: str) -> Engine:
    """Open what `judged_by` says.

    Args:
        bundle: Holds the engine and its graph.
        target: The engine.

    Raises:
        PcnDeployError: What opening the engine raises.
    """
    by = judged_by(bundle, target)
    if by != ROUNDED:
        return Engine.open(bundle, target, executed_by=by)
    return Engine(bundle, target, by, _open_rounded(partial(bundle.read, GRAPH), bundle.manifest.interface))


EXECUTIONS: tuple[Execution, ...] = (
    Execution(name=WIDENED, applies=has_widened, open=_open_widened, judge=verify_widened),
    Execution(name=ROUNDED, applies=lambda manifest: manifest.remainder != "fp32", open=_open_rounded),
    # ONNX Runtime has no BF16 on the CPU
    Execution(name=STOCK, applies=lambda manifest: manifest.remainder != "bf16", open=_open_stock),
)
"""In every build, beside the engine of each target that is made from the graph."""


def prove(
    bundle: Bundle,
    target: str,
    budget: ParityBudget | None = None,
    progress: Progress = silent,
    widened: dict[str, Array] | None = None,
    between: Callable[[], None] = lambda: None,
) -> ParityReport:
    """Judge one engine of a bundle in all the ways that a build does.

    Where the engine cannot run on this machine, ONNX Runtime runs the graph it was built from.

    Args:
        bundle: Holds the engine, its graph and the golden set.
        target: The engine.
        budget: What is still parity; by default what the bundle was built for.
        progress: Told the number of images done.
        widened: What the widened graph answers to the real images, by name, where that was asked already.
        between: Called when the engine is closed, before its graph is executed in further ways.

    Returns:
        The report of the engine; it fails where any execution does.

    Raises:
        BundleError: If the golden set was altered.
        PcnDeployError: What opening the engine raises.
    """
    budget = budget or bundle.manifest.parity_budget
    backend = get_backend(target)
    with Engine.open(bundle, target, executed_by=executor(backend), options=LEAN) as engine:
        report = verify_golden(engine, budget, progress)
    if backend.graph == SCRIPT:
        return report
    between()
    if widened:
        report = report.with_execution(judge_widened(bundle, target, budget, widened))
    return with_executions(report, engine, budget, progress)


def with_executions(
    report: ParityReport, engine: Engine, budget: ParityBudget, progress: Progress, *, only: str = ""
) -> ParityReport:
    """The report of an engine with that of the further executions of its graph that are not in it yet.

    Args:
        report: Of the engine.
        engine: The engine; it may be closed.
        budget: What is still parity.
        progress: Told the number of images done.
        only: Name of the one execution that is asked for; by default all.

    Returns:
        The report; it fails where any execution does. What cannot be executed for want of a library is a note.
    """
    bundle, missing = engine.bundle, dict[str, str]()
    for execution in EXECUTIONS:
        name = execution.name
        if name in report.executions or only not in ("", name) or not execution.applies(bundle.manifest):
            continue
        return_freed()  # the session before has held all weights
        try:
            session = execution.open(partial(bundle.read, GRAPH), engine.spec)
            with Engine(bundle, engine.target, name, session) as opened:
                report = report.with_execution(execution.judge(opened, budget, _named(progress, name)))
        except StockSessionError as error:
            report = replace(report, notes=(*report.notes, str(error)))
        except ModuleNotFoundError as error:
            missing[name] = str(error.name)
    if missing:
        note = (
            f"the graph was not executed as {', '.join(missing)}, by which a build proves it too: "
            f"{', '.join(sorted(set(missing.values())))} is not installed. {install('compile', only=_TO_EXECUTE)}."
        )
        report = replace(report, notes=(*report.notes, note))
    return report


def _named(progress: Progress, name: str) -> Progress:
    """Progress whose steps say which execution is at work."""
    return lambda step, *rest: progress(f"{step}, {name}", *rest)
