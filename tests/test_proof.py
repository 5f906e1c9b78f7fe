"""The verdict of a build: the engine, and every further execution of its graph."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pcn_deploy import Bundle
from pcn_deploy.engines.registry import get_backend
from pcn_deploy.parity import report_from_json
from pcn_deploy.proof import Execution, prove

pytest.importorskip("torch")


def further(name: str, answer: Any, *, applies: bool = True) -> Execution:
    """ONNX Runtime, whose logits go through `answer`: a fake of another execution, for our own judgement."""

    def open_session(data: bytes, spec: Any) -> Any:
        session = get_backend("cpu").open(data, spec)
        real = session.run
        session.run = lambda inputs: {"logits": answer(real(inputs)["logits"])}  # type: ignore[method-assign]
        return session

    return Execution(name=name, applies=lambda manifest: applies and manifest["precision"] == "fp32", open=open_session)


def test_every_execution_of_the_graph_must_pass(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = (
        further("right", lambda logits: logits),
        further("wrong", lambda logits: logits[:, ::-1]),
        further("not asked", lambda logits: logits[:, ::-1], applies=False),
    )
    monkeypatch.setattr("pcn_deploy.proof.EXECUTIONS", given[:1])
    report = prove(Bundle.open(path), "cpu")
    assert report
    assert report.metrics == pytest.approx(report.executions["right"])
    monkeypatch.setattr("pcn_deploy.proof.EXECUTIONS", given)
    report = prove(Bundle.open(path), "cpu")
    assert not report
    assert report.executed_by == "cpu"
    assert set(report.executions) == {"right", "wrong"}
    assert report.failures
    assert all(failure.startswith("wrong: ") for failure in report.failures)
    assert report_from_json(report.to_json()) == report


def test_the_scripted_module_is_not_the_graph(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pcn_deploy.proof.EXECUTIONS", (further("wrong", lambda logits: logits[:, ::-1]),))
    assert prove(Bundle.open(path), "torchscript")
