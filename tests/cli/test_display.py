"""What a person sees of progress where there is no terminal."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from pcn_deploy.cli import display
from pcn_deploy.cli.steps import Lines, ticking
from pcn_deploy.proof.budget import BudgetProof
from pcn_deploy.tasks.bound import PairedCounts
from pcn_deploy.tasks.classification import LogitsMeter
from pcn_deploy.tasks.limits import budget_for
from pcn_deploy.tasks.report import ParityReport


def report(executed_by: str, scale: float, **given: Any) -> ParityReport:
    """Of an engine whose error grows with `scale`; 0 is a right one."""
    random = np.random.default_rng(0)
    expected, error = random.standard_normal((2, 8, 10))
    meter = LogitsMeter()
    meter.update(expected, expected + scale * error)
    return meter.report(target="cpu", executed_by=executed_by, data="", budget=budget_for("fp32"), **given)


def test_a_limit_that_several_executions_broke_is_told_once() -> None:
    engine, rounded, stock = report("cpu", 0.5), report("rounded", 0.501), report("stock", 0.0)
    both = engine.with_execution(rounded).with_execution(stock)
    assert len(both.failures) == 2 * len(engine.failures) == 4
    told = display.failures([both, replace(both, target="torchscript")])
    assert told == "; ".join(f"cpu, rounded, torchscript: {failure}" for failure in engine.failures)
    assert display.failures([stock.with_execution(rounded)]) == "; ".join(
        f"rounded: {failure}" for failure in rounded.failures
    )
    alone = report("cpu", 2.0)
    assert [part.partition(" ")[0] for part in display.failures([alone]).split("; ")] == ["cpu:"] * 2


def proof(lost: int, *, asked: bool, unanswered: tuple[str, ...] = ()) -> BudgetProof:
    """Of 100 images and a budget of one point."""
    return BudgetProof(
        target="cpu",
        executed_by="cpu",
        data="photos",
        held_out=True,
        labelled=True,
        counts=PairedCounts(100, lost, 0),
        top1=90.0,
        budget=1.0,
        given=100,
        asked=asked,
        unanswered=unanswered,
    )


@pytest.mark.parametrize(
    ("judged", "passed", "verdict", "shown"),
    [
        (replace(proof(0, asked=True), counts=PairedCounts(1000, 0, 0)), True, "proven", "proven"),
        (proof(1, asked=False), True, "open", "open"),
        (proof(1, asked=True), False, "open", "NOT PROVEN"),
        (proof(20, asked=False), False, "broken", "BROKEN"),
        (proof(0, asked=False, unanswered=("a.png",)), False, "broken", "BROKEN"),
    ],
)
def test_a_budget_is_called_broken_only_where_the_images_or_a_missing_answer_show_it(
    judged: BudgetProof, passed: bool, verdict: str, shown: str
) -> None:
    assert (bool(judged), judged.verdict, display.proof_row(judged)[-1]) == (passed, verdict, shown)
    assert judged.to_json()["verdict"] == verdict


def test_a_log_has_a_line_per_step_and_more_where_it_takes_long(capsys: pytest.CaptureFixture[str]) -> None:
    now = [0.0]
    lines = Lines(lambda: now[0])
    for seconds, done in ((0, 0), (1, 1), (9, 2), (11, 3), (12, 4), (25, 5), (26, 6), (26, 6)):
        now[0] = seconds
        lines("Searching", done, 6, "layers")
    now[0] = 26.4
    lines("Scripting", 0, 1)
    lines("Scripting", 1, 1)
    lines("Searching", 0, 6, "layers")
    lines("Searching", 6, 6, "layers")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == [
        "Searching: 3/6 layers, 11 s, 0.273 layers/s, about 11 s left",
        "Searching: 5/6 layers, 25 s, 0.2 layers/s, about 5 s left",
        "Searching: 6/6 layers, 26 s, 0.231 layers/s",
        "Scripting: 1/1, 0 s",
        "Searching: 6/6 layers, 0 s",
    ]


def test_a_step_that_tells_nothing_for_long_has_a_line_every_ten_seconds(capsys: pytest.CaptureFixture[str]) -> None:
    now = [0.0]
    lines = Lines(lambda: now[0])
    lines("Measuring", 40, 100, "layers")  # of them 40 are of the run before
    lines("TensorRT build", 0, 3)
    for second in range(25):
        now[0] = second
        lines.tick()
    lines("TensorRT build", 1, 3)
    for second in range(25, 32):
        now[0] = second
        lines.tick()
    lines("TensorRT build", 3, 3)
    lines("Measuring", 50, 100, "layers")
    for second in range(32, 55):
        now[0] = second
        lines.tick()
    assert capsys.readouterr().err.splitlines() == [
        "TensorRT build: 0/3, 10 s",
        "TensorRT build: 0/3, 20 s",
        "TensorRT build: 1/3, 30 s, about 60 s left",
        "TensorRT build: 3/3, 31 s",
        "Measuring: 50/100 layers, 41 s, 0.244 layers/s, about 205 s left",
        "Measuring: 50/100 layers, 51 s, 0.196 layers/s, about 255 s left",
    ]


def test_another_thread_asks_the_lines(capsys: pytest.CaptureFixture[str]) -> None:
    """Each look at this clock is 11 s later, so that nothing waits."""
    looks, before = iter(range(0, 10**9, 11)), threading.active_count()
    told = threading.Event()
    lines = Lines(lambda: float(next(looks)))
    tell = lines._tell

    def telling(*given: Any) -> None:
        tell(*given)
        told.set()

    lines._tell = telling  # type: ignore[assignment]
    lines("TensorRT build", 0, 3)
    with ticking(lines, 0.001):
        assert told.wait(30)
    assert capsys.readouterr().err.startswith("TensorRT build: 0/3, 11 s")
    assert threading.active_count() == before, "the thread ends with the body"


def test_without_a_terminal_steps_are_lines_and_quiet_is_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    for quiet in (True, False):
        with display.progress_bars(quiet=quiet) as progress:
            progress("Calibrating", 0, 8, "images")
            progress("Calibrating", 8, 8, "images")
    assert capsys.readouterr().err == "Calibrating: 8/8 images, 0 s\n"
