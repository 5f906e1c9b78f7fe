"""Progress out of TensorRT's phases, and Ctrl-C while TensorRT works: our logic alone, no library needed."""

from __future__ import annotations

import signal
import threading
from typing import Any

import pytest

from pcn_deploy.engines.tensorrt.messages import interrupt_deferred
from pcn_deploy.engines.tensorrt.monitor import Meter


def told_by(events: list[tuple[Any, ...]], stop_after: int = 10**6) -> tuple[list[int], list[bool]]:
    told: list[int] = []
    meter = Meter(lambda _step, done, _total, _unit="": told.append(done), "build", lambda: len(told) > stop_after)
    meter.start()
    going = []
    for kind, *values in events:
        answer = getattr(meter, kind)(*values)
        going += [answer] if kind == "step_complete" else []
    meter.finish()
    return told, going


def test_nested_phases_count_for_their_share() -> None:
    told, going = told_by(
        [
            ("phase_start", "all", None, 2),
            ("phase_start", "first", "all", 4),
            ("step_complete", "first", 0),
            ("step_complete", "first", 3),
            ("phase_finish", "first"),
            ("step_complete", "all", 0),
            ("phase_start", "second", "all", 2),
            ("step_complete", "second", 0),
            ("step_complete", "all", 1),
            ("phase_finish", "all"),
        ]
    )
    assert told == [0, 125, 500, 750, 999, 1000]
    assert all(going)


def test_phases_out_of_order_never_turn_progress_back() -> None:
    told, _ = told_by(
        [
            ("phase_start", "all", None, 2),
            ("step_complete", "all", 0),
            ("phase_start", "left open", "all", 1),
            ("step_complete", "left open", 0),
            ("phase_start", "beside", "all", 100),
            ("step_complete", "beside", 0),
            ("step_complete", "never started", 5),
            ("phase_finish", "never started"),
            ("phase_start", "another root", None, 10),
            ("step_complete", "another root", 0),
        ]
    )
    assert told == [0, 500, 999, 1000]


def test_a_step_of_the_parent_ends_what_is_open_inside() -> None:
    told, _ = told_by(
        [
            ("phase_start", "all", None, 4),
            ("phase_start", "inside", "all", 2),
            ("step_complete", "inside", 0),
            ("step_complete", "all", 0),
            ("phase_finish", "inside"),
            ("step_complete", "all", 1),
        ]
    )
    assert told == [0, 125, 250, 500, 1000]


def test_a_stopped_build_is_told_to_stop() -> None:
    events = [("phase_start", "all", None, 4), *(("step_complete", "all", step) for step in range(3))]
    assert told_by(events, stop_after=2)[1] == [True, False, False]


def test_ctrl_c_is_held_back_until_the_library_has_returned(interruptible: None) -> None:
    reached = []
    with pytest.raises(KeyboardInterrupt):  # noqa: SIM117 - the point is where it is raised
        with interrupt_deferred() as pressed:
            signal.raise_signal(signal.SIGINT)
            reached.append(pressed.is_set())
    assert reached == [True]


def test_threads_leave_signals_alone() -> None:
    handlers: list[Any] = []

    def work() -> None:
        with interrupt_deferred() as pressed:
            handlers.append(signal.getsignal(signal.SIGINT))
            assert not pressed.is_set()

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert handlers == [signal.getsignal(signal.SIGINT)]
