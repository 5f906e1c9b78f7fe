"""A default session of ONNX Runtime in a process of its own: its answers, its refusals, its crashes."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from pcn_deploy import Bundle
from pcn_deploy.engines import stock
from pcn_deploy.engines.stock import open_stock
from pcn_deploy.errors import PcnDeployError, StockSessionError
from pcn_deploy.proof.executions import prove
from pcn_deploy.specs import BatchRange, EngineSpec, TensorSpec

SPEC = EngineSpec(
    inputs=(TensorSpec(name="images", dtype="float32", shape=("batch", 3)),),
    outputs=(TensorSpec(name="logits", dtype="float32", shape=("batch", 3)),),
    batch=BatchRange(min=1, opt=1, max=4),
)
IMAGES = np.array([[1, -2, 3]], np.float32)


def graph(operator: str = "Relu", *more: str) -> bytes:
    """One node; whatever is given more are inputs without a value."""
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [None, 3]) for name in ("images", "logits")]
    node = helper.make_node(operator, ["images", *more], ["logits"])
    opset = [helper.make_opsetid("", 20)]
    model = helper.make_model(helper.make_graph([node], "g", values[:1], values[1:]), opset_imports=opset, ir_version=9)
    return bytes(model.SerializeToString())


def test_it_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "onnxruntime.py").write_text("raise SystemExit('the module of the current folder')")
    monkeypatch.chdir(tmp_path)
    with open_stock(graph, SPEC) as session:
        for factor in (1, 2):
            found = session.run({"images": factor * IMAGES})
            np.testing.assert_array_equal(found["logits"], factor * np.array([[1, 0, 3]], np.float32))
    with pytest.raises(PcnDeployError, match="closed"):
        session.run({"images": IMAGES})


def test_a_graph_that_it_refuses() -> None:
    with pytest.raises(StockSessionError, match=r"refuses this graph when opening it: .*NoSuchOperator"):
        open_stock(partial(graph, "NoSuchOperator"), SPEC)


def test_a_graph_that_fails_when_it_runs() -> None:
    reshape = onnx.load_from_string(graph("Reshape", "shape"))
    reshape.graph.initializer.append(helper.make_tensor("shape", TensorProto.INT64, [2], [7, 3]))
    session = open_stock(reshape.SerializeToString, SPEC)
    with session, pytest.raises(StockSessionError, match=r"refuses this graph when running it: .*Reshape"):
        session.run({"images": IMAGES})


def dies(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the process do something else: a FAKE session, whose end is real."""
    monkeypatch.setattr(stock, "_START", f"import os, sys, time; {how}")


def test_a_crash_is_told_and_survived(monkeypatch: pytest.MonkeyPatch) -> None:
    dies("print('last words', file=sys.stderr, flush=True); os.kill(os.getpid(), 11)", monkeypatch)
    with pytest.raises(StockSessionError, match=r"crashes on this graph \(signal 11 when opening it\): last words"):
        open_stock(graph, SPEC)


def test_an_answer_is_not_awaited_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    dies("time.sleep(600)", monkeypatch)
    monkeypatch.setattr(stock, "LIMIT", 0.2)
    with pytest.raises(StockSessionError, match=r"no answer in 0\.2 s"):
        open_stock(graph, SPEC)


def test_a_build_that_crashes_it_goes_on_and_says_so(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dies("os.kill(os.getpid(), 11)", monkeypatch)
    report = prove(Bundle.open(path), "cpu")
    assert report
    assert "stock" not in report.executions
    (note,) = report.notes
    assert "A stock ONNX Runtime session crashes on this graph (signal 11" in note


def test_a_build_is_judged_by_it(path: Path) -> None:
    report = prove(Bundle.open(path), "cpu")
    assert report.notes == ()
    assert report.executions["stock"]["sqnr_db"] > 60
