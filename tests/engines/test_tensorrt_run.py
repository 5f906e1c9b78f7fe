"""Our handling of device memory, with a FAKE CUDA runtime and FAKE engine; the real refusal without a GPU."""

# ruff: noqa: N802 - the fakes have the names of what they stand in for

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from pcn_deploy.engines.registry import get_backend
from pcn_deploy.engines.tensorrt import cuda, library
from pcn_deploy.engines.tensorrt.cuda import Cuda, Device
from pcn_deploy.engines.tensorrt.flavour import TENSORRT, TENSORRT_RTX
from pcn_deploy.engines.tensorrt.run import TensorRTSession, open_engine
from pcn_deploy.errors import DataError, DependencyError, IncompatibleError, PcnDeployError
from pcn_deploy.specs import BatchRange, EngineSpec, TensorSpec

SPEC = EngineSpec(
    inputs=(TensorSpec(name="images", dtype="float32", shape=("batch", 3, 2, 2)),),
    outputs=(TensorSpec(name="logits", dtype="float32", shape=("batch", 3)),),
    batch=BatchRange(min=1, opt=2, max=4),
)


class FakeCudart:
    """Stands in for libcudart: device memory is host memory, and every call is counted."""

    def __init__(self) -> None:
        self.memory: dict[int, Any] = {}
        self.streams: set[int] = set()
        self.calls: list[str] = []
        self.fails: set[str] = set()
        self.current = 0
        for name in ("cudaRuntimeGetVersion", "cudaStreamSynchronize"):
            setattr(self, name, self._call(name))
        for name in (
            "cudaGetDevice",
            "cudaSetDevice",
            "cudaMalloc",
            "cudaFree",
            "cudaMemcpyAsync",
            "cudaStreamCreateWithFlags",
            "cudaStreamDestroy",
        ):
            setattr(self, name, self._call(name, getattr(self, f"_{name}")))
        self.cudaGetErrorString = lambda _status: b"out of memory"

    def _call(self, name: str, body: Any = lambda *_: None) -> Any:
        def call(*arguments: Any) -> int:
            self.calls.append(name)
            if name in self.fails:
                return 2
            body(*arguments)
            return 0

        return call

    def _cudaGetDevice(self, index: Any) -> None:
        index._obj.value = self.current

    def _cudaSetDevice(self, index: int) -> None:
        self.current = index

    def _cudaMalloc(self, address: Any, size: ctypes.c_size_t) -> None:
        block = ctypes.create_string_buffer(size.value)
        address._obj.value = ctypes.addressof(block)
        self.memory[ctypes.addressof(block)] = block

    def _cudaFree(self, address: int) -> None:
        del self.memory[address]

    def _cudaMemcpyAsync(self, target: Any, source: Any, size: Any, kind: int, stream: Any) -> None:
        assert stream.value in self.streams
        assert kind == (1 if target.value in self.memory else 2)
        block = next(block for start, block in self.memory.items() if start in (target.value, source.value))
        assert size.value <= len(block)
        ctypes.memmove(target, source, size.value)

    def _cudaStreamCreateWithFlags(self, handle: Any, _flags: int) -> None:
        self.streams.add(77)
        handle._obj.value = 77

    def _cudaStreamDestroy(self, stream: int) -> None:
        self.streams.remove(stream)


class FakeEngine:
    """Stands in for an engine and its context: the mean of each channel."""

    num_io_tensors = 2

    def __init__(self, output: str = "FLOAT") -> None:
        self.types = {"images": "FLOAT", "logits": output}
        self.addresses: dict[str, int] = {}
        self.shape: tuple[int, ...] = (-1, 3, 2, 2)
        self.succeeds = True

    def get_tensor_name(self, index: int) -> str:
        return ("images", "logits")[index]

    def get_tensor_mode(self, name: str) -> str:
        return "INPUT" if name == "images" else "OUTPUT"

    def get_tensor_dtype(self, name: str) -> Any:
        return SimpleNamespace(name=self.types[name])

    def create_execution_context(self) -> FakeEngine:
        return self

    def set_input_shape(self, _name: str, shape: tuple[int, ...]) -> bool:
        self.shape = shape
        return shape[0] <= 4

    def get_tensor_shape(self, _name: str) -> tuple[int, ...]:
        return (self.shape[0], 3)

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def execute_async_v3(self, _stream: int) -> bool:
        def view(name: str, shape: tuple[int, ...]) -> Any:
            numbers = ctypes.c_float * int(np.prod(shape))
            return np.ctypeslib.as_array(numbers.from_address(self.addresses[name])).reshape(shape)

        view("logits", (self.shape[0], 3))[:] = view("images", self.shape).mean(axis=(2, 3))
        return self.succeeds


class FakeTensorRT:
    """Stands in for the bindings: as many names as opening needs."""

    __version__ = "10.3.0"
    TensorIOMode = SimpleNamespace(INPUT="INPUT")

    class ILogger:
        log: Any

    engine: Any = None
    says = ""

    def Runtime(self, log: Any) -> Any:
        def deserialize(_data: bytes) -> Any:
            if self.says:
                log.log(SimpleNamespace(name="ERROR"), self.says)
            return self.engine

        return SimpleNamespace(deserialize_cuda_engine=deserialize)


def opened(
    cudart: FakeCudart, engine: Any, spec: EngineSpec = SPEC, says: str = "", stream: int = 0
) -> TensorRTSession:
    trt = FakeTensorRT()
    trt.engine, trt.says = engine, says
    return open_engine(TENSORRT, trt, Cuda(cudart), Device("NVIDIA Orin", "SM87"), b"engine", spec, stream)


def images(batch: int, seed: int = 0) -> dict[str, Any]:
    return {"images": np.random.default_rng(seed).normal(size=(batch, 3, 2, 2)).astype(np.float32)}


def test_runs_every_batch_of_the_range_in_memory_taken_once() -> None:
    cudart = FakeCudart()
    with opened(cudart, FakeEngine()) as session:
        for batch in (4, 1, 3):
            given = images(batch, batch)
            logits = session.run(given)["logits"]
            np.testing.assert_allclose(logits, given["images"].mean(axis=(2, 3)), rtol=1e-6)
        assert cudart.calls.count("cudaMalloc") == 2
        assert sorted(len(block) for block in cudart.memory.values()) == [4 * 3 * 4, 4 * 12 * 4]


def test_outputs_belong_to_the_caller() -> None:
    with opened(FakeCudart(), FakeEngine()) as session:
        first = session.run(images(2, 1))["logits"]
        kept = first.copy()
        second = session.run(images(2, 2))["logits"]
    np.testing.assert_array_equal(first, kept)
    assert not np.shares_memory(first, second)


def test_outputs_are_copied_where_the_caller_wants_them() -> None:
    cudart, wanted = FakeCudart(), np.full((2, 3), 7, np.float32)
    found = opened(cudart, FakeEngine()).run(images(2), {"logits": wanted})
    assert found["logits"] is wanted
    np.testing.assert_allclose(wanted, images(2)["images"].mean((2, 3)), rtol=1e-6)


def test_the_stream_of_the_caller_is_used_and_kept() -> None:
    cudart = FakeCudart()
    cudart.streams = {5}
    session = opened(cudart, FakeEngine(), stream=5)
    session.run(images(2))
    assert "cudaStreamCreateWithFlags" not in cudart.calls
    session.close()
    assert cudart.streams == {5}
    assert not cudart.memory


def test_inputs_that_are_not_contiguous() -> None:
    given = images(4)["images"]
    with opened(FakeCudart(), FakeEngine()) as session:
        logits = session.run({"images": given[::-1]})["logits"]
    np.testing.assert_allclose(logits, given[::-1].mean(axis=(2, 3)), rtol=1e-6)


def test_close_frees_everything_and_may_be_repeated() -> None:
    cudart = FakeCudart()
    session = opened(cudart, FakeEngine())
    assert len(cudart.memory) == 2
    session.close()
    session.close()
    assert not cudart.memory
    assert not cudart.streams
    assert cudart.calls.count("cudaFree") == 2
    with pytest.raises(PcnDeployError, match="session is closed"):
        session.run(images(1))


def test_the_callers_device_is_left_as_it_was() -> None:
    cudart = FakeCudart()
    cudart.current = 1
    session = opened(cudart, FakeEngine())
    cudart.current = 3
    session.run(images(1))
    assert (cudart.current, cudart.calls.count("cudaSetDevice")) == (3, 2)
    session.close()
    assert (cudart.current, cudart.calls.count("cudaSetDevice")) == (3, 4)


def test_close_frees_even_when_the_device_has_failed() -> None:
    cudart = FakeCudart()
    session = opened(cudart, FakeEngine())
    cudart.fails = {"cudaSetDevice", "cudaStreamSynchronize"}
    session.close()
    assert not cudart.memory
    assert not cudart.streams


def test_batches_out_of_range_never_reach_the_engine() -> None:
    cudart = FakeCudart()
    with opened(cudart, FakeEngine()) as session:
        with pytest.raises(DataError, match="1:2:4"):
            session.run(images(5))
        assert "cudaMemcpyAsync" not in cudart.calls


def test_memory_that_runs_out_is_said_and_nothing_leaks() -> None:
    cudart = FakeCudart()
    cudart.fails = {"cudaMalloc"}
    with pytest.raises(PcnDeployError, match=r"cudaMalloc failed with error 2 \(out of memory\)"):
        opened(cudart, FakeEngine())
    assert not cudart.streams


def test_a_context_that_is_not_created_leaks_nothing() -> None:
    cudart, engine = FakeCudart(), FakeEngine()
    engine.create_execution_context = lambda: None  # type: ignore[method-assign, assignment, return-value]
    with pytest.raises(PcnDeployError, match="could not create an execution context"):
        opened(cudart, engine)
    assert not cudart.streams


def test_a_failed_execution_is_said() -> None:
    engine = FakeEngine()
    with opened(FakeCudart(), engine) as session:
        engine.succeeds = False
        with pytest.raises(PcnDeployError, match="failed to execute"):
            session.run(images(1))


@pytest.mark.parametrize("kind", ["BF16", "FP4", "INT32"])
def test_a_type_that_is_not_the_specifications_is_said(kind: str) -> None:
    with pytest.raises(IncompatibleError, match=rf"'logits' of the engine is {kind}; its bundle says float32"):
        opened(FakeCudart(), FakeEngine(output=kind))


def test_other_tensors_than_the_specifications_are_said() -> None:
    other = EngineSpec(inputs=SPEC.inputs, outputs=(), batch=SPEC.batch)
    with pytest.raises(IncompatibleError, match=r"images.*logits"):
        opened(FakeCudart(), FakeEngine(), other)


def test_a_profile_smaller_than_the_specification_is_said() -> None:
    wide = EngineSpec(inputs=SPEC.inputs, outputs=SPEC.outputs, batch=BatchRange(min=1, opt=1, max=8))
    with pytest.raises(IncompatibleError, match=r"'images' of shape \(8, 3, 2, 2\)"):
        opened(FakeCudart(), FakeEngine(), wide)


def test_an_engine_of_another_device_is_refused_naming_both() -> None:
    said = "The engine plan file is generated on an incompatible device, expecting compute 8.7 got 8.9, rebuild."
    with pytest.raises(IncompatibleError) as caught:
        opened(FakeCudart(), None, says=said)
    text = str(caught.value)
    assert "built for compute capability 8.9; this device (NVIDIA Orin (SM87)) has 8.7" in text
    assert "TensorRT 10.3.0" in text
    assert "pcn-compile engine FILE.pcn --target tensorrt" in text


def test_an_engine_the_library_calls_invalid_is_never_deserialised() -> None:
    class Rtx(FakeTensorRT):
        EngineInvalidityDiagnostics = SimpleNamespace(__members__={"VERSION_MISMATCH": 1})
        EngineValidity = SimpleNamespace(VALID=0, SUBOPTIMAL=1)

        def Runtime(self, log: Any) -> Any:
            return SimpleNamespace(get_engine_validity=lambda _data: (2, 1))

    with pytest.raises(IncompatibleError, match=r"another release than TensorRT-RTX 10\.3\.0"):
        open_engine(TENSORRT_RTX, Rtx(), Cuda(FakeCudart()), Device("RTX 4090", "SM89"), b"engine", SPEC)


@pytest.mark.parametrize("target", ["tensorrt", "tensorrt-rtx"])
def test_without_a_gpu_nothing_is_opened(target: str) -> None:
    backend = get_backend(target)
    if backend.availability().can_run:
        pytest.skip("there is a GPU")
    with pytest.raises(DependencyError, match=rf"Target '{target}' cannot run here"):
        backend.open(b"", SPEC)


def test_a_machine_with_a_gpu_builds_and_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    trt = FakeTensorRT()
    trt.engine = FakeEngine()
    monkeypatch.setattr(library, "load", lambda _flavour: trt)
    cudart = FakeCudart()
    gpus = (Device("GPU 0", "SM86"), Device("GPU 1", "SM87"))
    monkeypatch.setattr(cuda, "devices", lambda: cuda.Devices(gpus=gpus, driver=12060))
    monkeypatch.setattr(Cuda, "load", classmethod(lambda cls, _driver: cls(cudart)))
    backend = get_backend("tensorrt")
    state = backend.availability()
    assert (state.can_build, state.can_run, state.remedy) == (True, True, "")
    assert state.detail == "TensorRT 10.3.0, GPU 0 (SM86), GPU 1 (SM87)"
    with backend.open(b"engine", SPEC) as session:
        assert session.run(images(2))["logits"].shape == (2, 3)
    assert not cudart.memory


@pytest.mark.parametrize("fault", [TypeError("nullptr"), RuntimeError("bad")])
def test_a_runtime_that_does_not_start_is_said(fault: Exception) -> None:
    class Broken(FakeTensorRT):
        def Runtime(self, log: Any) -> Any:
            raise fault

    with pytest.raises(PcnDeployError, match=r"TensorRT 10\.3\.0 could not start its runtime"):
        open_engine(TENSORRT, Broken(), Cuda(FakeCudart()), Device("GPU", "SM87"), b"", SPEC)
