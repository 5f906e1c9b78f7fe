"""The contract of a backend, once; each backend that runs anywhere is a subclass."""

from __future__ import annotations

import io
import sys
import warnings
from abc import ABC, abstractmethod
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from pcn_deploy.engines.base import Array, Backend, GraphSource, OpenOptions, Session
from pcn_deploy.engines.registry import TARGETS, get_backend
from pcn_deploy.errors import (
    BuildError,
    DataError,
    DependencyError,
    ExecutionError,
    IncompatibleError,
    OptionError,
    PcnDeployError,
)
from pcn_deploy.members import engine_member
from pcn_deploy.specs import BatchRange, EngineSpec, TensorSpec

torch = pytest.importorskip("torch")
onnx = pytest.importorskip("onnx")

SPEC = EngineSpec(
    inputs=(TensorSpec(name="images", dtype="float32", shape=("batch", 3, 2, 2)),),
    outputs=(TensorSpec(name="logits", dtype="float32", shape=("batch", 3)),),
    batch=BatchRange(min=2, opt=2, max=4),
)

TWO = replace(SPEC, outputs=(*SPEC.outputs, TensorSpec(name="classes", dtype="int64", shape=("batch",))))


def images(count: int = 3, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal((count, 3, 2, 2), dtype=np.float32)


def expected(batch: Array) -> Array:
    """What the network of these tests computes: the sum over the pixels of each channel."""
    total: Array = batch.sum((2, 3))
    return total


class ContractTemplate(ABC):
    """What every backend must do. Subclasses say which one, and make its graph."""

    target: ClassVar[str]
    missing: ClassVar[str]

    @abstractmethod
    def source(self) -> GraphSource:
        """A graph that computes `expected`."""

    @abstractmethod
    def two_outputs(self) -> GraphSource:
        """A graph with a second output, the class as an integer, and `TWO` as its interface."""

    @abstractmethod
    def broken(self) -> list[GraphSource]:
        """Graphs that cannot become an engine that opens."""

    @abstractmethod
    def failing(self) -> GraphSource:
        """A graph that opens, and fails when it runs."""

    @property
    def backend(self) -> Backend:
        return get_backend(self.target)

    @pytest.fixture
    def session(self) -> Session:
        return self.backend.open(bytes(self.backend.build(self.source()).data), SPEC)

    def test_it_says_what_it_can_do(self) -> None:
        state = self.backend.availability()
        assert state.can_build
        assert state.can_run
        assert any(character.isdigit() for character in state.detail), "a version"
        assert self.backend.target == self.target
        assert isinstance(self.backend.rank, int), "load asks for the fastest"

    def test_an_engine_computes_the_graph(self, session: Session) -> None:
        for count in (2, 3, 4):
            outputs = session.run({"images": images(count)})
            assert list(outputs) == ["logits"]
            assert outputs["logits"].dtype == np.float32
            np.testing.assert_allclose(outputs["logits"], expected(images(count)), rtol=1e-5, atol=1e-6)

    def test_the_engine_says_what_built_it(self) -> None:
        facts = self.backend.build(self.source()).built_with
        assert facts
        assert all(isinstance(value, str) for value in facts.values())

    def test_inputs_that_are_not_contiguous(self, session: Session) -> None:
        batch = images()[:, :, ::-1].transpose(0, 1, 3, 2)
        assert not batch.flags.c_contiguous
        np.testing.assert_allclose(session.run({"images": batch})["logits"], expected(batch), rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("names", [[], ["image"], ["images", "more"]], ids=str)
    def test_other_names(self, session: Session, names: list[str]) -> None:
        with pytest.raises(DataError, match=r"Inputs given: .*the engine takes \['images'\]"):
            session.run({name: images() for name in names})

    @pytest.mark.parametrize("dtype", ["float64", "float16", "uint8", "int32"])
    def test_another_dtype(self, session: Session, dtype: str) -> None:
        with pytest.raises(DataError, match=f"'images' is {dtype} .*takes float32"):
            session.run({"images": images().astype(dtype)})

    @pytest.mark.parametrize("shape", [(3, 3, 2, 3), (3, 1, 2, 2), (3, 2, 2), (3, 3, 2, 2, 1), ()], ids=str)
    def test_another_shape(self, session: Session, shape: tuple[int, ...]) -> None:
        with pytest.raises(DataError, match=r"of shape \(.*the engine takes float32 of shape \('batch', 3, 2, 2\)"):
            session.run({"images": np.zeros(shape, np.float32)})

    @pytest.mark.parametrize("count", [0, 1, 5])
    def test_a_batch_out_of_range(self, session: Session, count: int) -> None:
        with pytest.raises(DataError, match=f"Batch of {count} images; the engine was built for 2:2:4"):
            session.run({"images": images(count)})

    def test_outputs_belong_to_the_caller(self, session: Session) -> None:
        given = images()
        first = session.run({"images": given})["logits"]
        kept = first.copy()
        second = session.run({"images": images(seed=1)})["logits"]
        np.testing.assert_array_equal(first, kept, "a later run writes elsewhere")
        second[:] = 7
        given[:] = 7
        np.testing.assert_array_equal(first, kept)
        np.testing.assert_array_equal(session.run({"images": images()})["logits"], kept)

    def test_outputs_are_written_where_the_caller_wants_them(self, session: Session) -> None:
        memory = np.full((6, 3), 7, np.float32)
        wanted = memory[1:4]
        found = session.run({"images": images()}, {"logits": wanted})
        assert found["logits"] is wanted
        np.testing.assert_allclose(wanted, expected(images()), rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(memory[[0, 4, 5]], 7, "nothing is written beside it")

    @pytest.mark.parametrize(
        ("out", "words"),
        [
            ({"scores": np.empty((3, 3), np.float32)}, r"given for outputs: \['scores'\]; the engine has \['logits'\]"),
            ({"logits": np.empty((3, 3), np.float64)}, r"'logits' is float64 \(3, 3\); the engine writes float32"),
            ({"logits": np.empty((4, 3), np.float32)}, r"is float32 \(4, 3\); the engine writes float32 \(3, 3\)"),
            ({"logits": np.empty((3, 6), np.float32)[:, ::2]}, "not contiguous, or may not be written"),
            ({"logits": np.frombuffer(bytes(36), np.float32).reshape(3, 3)}, "not contiguous, or may not be written"),
        ],
        ids=["name", "dtype", "shape", "strided", "read only"],
    )
    def test_arrays_that_cannot_be_written(self, session: Session, out: dict[str, Array], words: str) -> None:
        with pytest.raises(DataError, match=words):
            session.run({"images": images()}, out)

    def test_outputs_have_types_of_their_own(self) -> None:
        session = self.backend.open(bytes(self.backend.build(self.two_outputs()).data), TWO)
        given, classes = images(), np.empty(3, np.int64)
        for found in (session.run({"images": given}), session.run({"images": given}, {"classes": classes})):
            assert {name: str(array.dtype) for name, array in found.items()} == {
                "logits": "float32",
                "classes": "int64",
            }
            np.testing.assert_array_equal(found["classes"], expected(given).argmax(1))
        assert found["classes"] is classes

    def test_an_output_of_another_type_than_its_interface_says(self) -> None:
        wrong = replace(TWO, outputs=(TWO.outputs[0], replace(TWO.outputs[1], dtype="int32")))
        session = self.backend.open(bytes(self.backend.build(self.two_outputs()).data), wrong)
        with pytest.raises(ExecutionError, match="returns int64 as 'classes'; its bundle says int32"):
            session.run({"images": images()})

    @pytest.mark.parametrize("device", ["gpu", "cuda:one", "cpu:0", "CUDA", "xpu"])
    def test_a_device_that_is_none(self, device: str) -> None:
        with pytest.raises(OptionError, match=f"run on .*cpu.*, not on {device!r}"):
            self.backend.open(bytes(self.backend.build(self.source()).data), SPEC, OpenOptions(device=device))

    def test_the_device_and_the_stream_of_the_caller(self) -> None:
        data = bytes(self.backend.build(self.source()).data)
        session = self.backend.open(data, SPEC, OpenOptions(device="cpu", lean=True))
        np.testing.assert_allclose(
            session.run({"images": images()})["logits"], expected(images()), rtol=1e-5, atol=1e-6
        )
        with pytest.raises(OptionError, match="has no CUDA stream on cpu"):
            self.backend.open(data, SPEC, OpenOptions(device="cpu", stream=1))
        if not torch.cuda.is_available():
            with pytest.raises(OptionError, match=r"not on 'cuda:3'|there is no 'cuda:3'"):
                self.backend.open(data, SPEC, OpenOptions(device="cuda:3"))

    def test_inputs_are_left_alone(self, session: Session) -> None:
        given = images()
        session.run({"images": given})
        np.testing.assert_array_equal(given, images())

    def test_closing_twice(self, session: Session) -> None:
        with session:
            session.run({"images": images()})
        session.close()
        session.close()
        with pytest.raises(PcnDeployError, match="session is closed"):
            session.run({"images": images()})
        another = self.backend.open(bytes(self.backend.build(self.source()).data), SPEC)
        assert another.run({"images": images()})["logits"].shape == (3, 3)

    def test_graphs_that_are_broken(self) -> None:
        for source in self.broken():
            with pytest.raises((BuildError, IncompatibleError)) as caught:
                self.backend.open(bytes(self.backend.build(source).data), SPEC)
            assert len(str(caught.value)) > 20

    def test_what_fails_when_it_runs_is_said_in_our_words(self) -> None:
        session = self.backend.open(bytes(self.backend.build(self.failing()).data), SPEC)
        with session, pytest.raises(ExecutionError, match=r"fails on inputs of shape \{'images': \(3, 3, 2, 2\)\}: .*"):
            session.run({"images": images()})

    def test_bytes_that_are_no_engine(self) -> None:
        with pytest.raises(IncompatibleError, match=r"cannot load"):
            self.backend.open(b"no engine at all", SPEC)

    def test_without_its_library(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import importlib.util

        real = importlib.util.find_spec

        def without(name: str, *rest: Any) -> Any:
            return None if name == self.missing else real(name, *rest)

        monkeypatch.setattr(importlib.util, "find_spec", without)
        state = self.backend.availability()
        assert (state.can_build, state.can_run) == (False, False)
        for attempt in (lambda: self.backend.build(self.source()), lambda: self.backend.open(b"", SPEC)):
            with pytest.raises(DependencyError, match=rf"not installed\. Install it: pip install '?{self.missing}"):
                attempt()


class TestOnnxRuntime(ContractTemplate):
    target = "cpu"
    missing = "onnxruntime"

    def source(self) -> GraphSource:
        return self._graph("ReduceSum", keepdims=0)

    def two_outputs(self) -> GraphSource:
        model = onnx.load_from_string(self.source().read_onnx())
        model.graph.node.append(onnx.helper.make_node("ArgMax", ["logits"], ["classes"], axis=1, keepdims=0))
        model.graph.output.append(onnx.helper.make_tensor_value_info("classes", onnx.TensorProto.INT64, ["batch"]))
        return GraphSource(onnx=model.SerializeToString(), torchscript=b"", spec=TWO)

    def broken(self) -> list[GraphSource]:
        good = self.source()
        return [self._graph("NoSuchOperator"), replace(good, onnx=b""), replace(good, onnx=good.read_onnx()[:-20])]

    def failing(self) -> GraphSource:
        return self._graph("Reshape")

    def test_a_library_that_does_not_load(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "onnxruntime.py").write_text("raise ImportError('libgomp.so.1: cannot open')")
        monkeypatch.delitem(sys.modules, "onnxruntime", raising=False)
        monkeypatch.syspath_prepend(tmp_path)
        state = self.backend.availability()
        assert (state.can_build, state.can_run) == (False, False)
        assert state.detail.startswith("onnxruntime does not load: libgomp")
        with pytest.raises(DependencyError, match="--force-reinstall"):
            self.backend.build(self.source())

    def _graph(self, operator: str, **attributes: int) -> GraphSource:
        info, kind = onnx.helper.make_tensor_value_info, onnx.TensorProto.FLOAT
        graph = onnx.helper.make_graph(
            [onnx.helper.make_node(operator, ["images", "axes"], ["logits"], **attributes)],
            "sum",
            [info("images", kind, ["batch", 3, 2, 2])],
            [info("logits", kind, ["batch", 3])],
            [onnx.numpy_helper.from_array(np.array([2, 3]), "axes")],
        )
        model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
        return GraphSource(onnx=model.SerializeToString(), torchscript=b"", spec=SPEC)


class _Sum(torch.nn.Module):  # type: ignore[name-defined,misc]
    def forward(self, images: torch.Tensor) -> torch.Tensor:  # type: ignore[name-defined]
        return images.sum((2, 3))


class _SumAndClass(torch.nn.Module):  # type: ignore[name-defined,misc]
    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[name-defined]
        logits = images.sum((2, 3))
        return logits, logits.argmax(1)


class _Reshaped(torch.nn.Module):  # type: ignore[name-defined,misc]
    def forward(self, images: torch.Tensor) -> torch.Tensor:  # type: ignore[name-defined]
        return images.reshape(2, 3)


class TestTorchScript(ContractTemplate):
    target = "torchscript"
    missing = "torch"

    def source(self) -> GraphSource:
        return self._scripted(_Sum())

    def two_outputs(self) -> GraphSource:
        return replace(self._scripted(_SumAndClass()), spec=TWO)

    def failing(self) -> GraphSource:
        return self._scripted(_Reshaped())

    def _scripted(self, module: torch.nn.Module) -> GraphSource:  # type: ignore[name-defined]
        buffer = io.BytesIO()
        with warnings.catch_warnings():
            for kind in (DeprecationWarning, FutureWarning):
                warnings.simplefilter("ignore", kind)
            torch.jit.save(torch.jit.script(module), buffer)
        return GraphSource(onnx=b"", torchscript=buffer.getvalue(), spec=SPEC)

    def broken(self) -> list[GraphSource]:
        good = self.source()
        return [replace(good, torchscript=b""), replace(good, torchscript=good.torchscript[:-200])]


def test_every_target_has_a_backend_of_its_name() -> None:
    members = dict(zip(("cpu", "torchscript"), ("model.onnx", "model.ts"), strict=True))
    assert len({get_backend(target).rank for target in TARGETS}) == len(TARGETS), "each has a place of its own"
    for target in TARGETS:
        backend = get_backend(target)
        assert backend.target == target
        assert isinstance(backend.rank, int)
        assert set(backend.devices) <= {"cpu", "cuda"}
        assert backend.member == members.get(target, backend.member)
        assert backend.member in (backend.graph, engine_member(target)), "the graph itself, or a member of its own"
        assert backend.availability().detail


def test_an_unknown_target() -> None:
    with pytest.raises(OptionError, match=rf"Unknown target 'gpu'. Known targets: {', '.join(TARGETS)}\."):
        get_backend("gpu")
