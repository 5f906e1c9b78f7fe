"""Executing a plan: device memory for the largest batch, taken once; numpy in, numpy out."""

from __future__ import annotations

import threading
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from pcn_deploy.engines.base import CLOSED, Array, Session
from pcn_deploy.engines.tensorrt.compatibility import check_validity, refused
from pcn_deploy.engines.tensorrt.cuda import Cuda, Device
from pcn_deploy.engines.tensorrt.flavour import Flavour
from pcn_deploy.engines.tensorrt.library import version
from pcn_deploy.engines.tensorrt.messages import Messages, interrupt_deferred, log_of
from pcn_deploy.errors import IncompatibleError, PcnDeployError
from pcn_deploy.specs import EngineSpec

# Types of TensorRT that numpy has too.
_DTYPES = {
    "FLOAT": "float32",
    "HALF": "float16",
    "INT8": "int8",
    "UINT8": "uint8",
    "INT32": "int32",
    "INT64": "int64",
    "BOOL": "bool",
}


@dataclass(frozen=True, kw_only=True)
class _Tensor:
    """An input or output of the engine, and its memory on the device."""

    name: str
    dtype: npt.DTypeLike
    address: int


def open_engine(
    flavour: Flavour, trt: Any, cuda: Cuda, device: Device, data: bytes, spec: EngineSpec, stream: int = 0
) -> TensorRTSession:
    """Check, deserialise and open an engine. Host code in engines stays forbidden: TensorRT's default.

    Args:
        flavour: Which flavour.
        trt: The loaded bindings.
        cuda: The CUDA runtime.
        device: The device at hand.
        data: The engine, verified by the caller.
        spec: Its interface.
        stream: The caller's CUDA stream; 0 for one of the session's own.

    Raises:
        IncompatibleError: If the engine does not fit this device, this version, or the specification.
        PcnDeployError: If CUDA fails, for want of memory for instance.
    """
    log, messages = log_of(trt)
    messages.clear()
    with interrupt_deferred():
        try:
            runtime = trt.Runtime(log)
        except (TypeError, RuntimeError) as error:  # what the bindings make of a null pointer
            msg = f"{flavour.title} {version(trt)} could not start its runtime:{messages.summary()}"
            raise PcnDeployError(msg) from error
        check_validity(flavour, trt, runtime, data, device, messages)
        engine = runtime.deserialize_cuda_engine(data)
        if engine is None:
            raise refused(flavour, trt, device, messages.of("INTERNAL_ERROR", "ERROR"))
        return TensorRTSession(trt, cuda, runtime, engine, spec, messages, stream)


class TensorRTSession(Session):
    """An opened engine on the device that was current when it was opened.

    Threads may share it; they take turns. Arrays are ordinary (pageable) memory: CUDA is done with the
    caller's memory when a copy returns, so nothing dangles if a later call fails.

    Args:
        trt: The loaded bindings.
        cuda: The CUDA runtime.
        runtime: The runtime that deserialised the engine; kept alive as long as the engine.
        engine: The engine.
        spec: Its interface.
        messages: What the library logs.
        stream: The caller's CUDA stream, of the current device; 0 for one of the session's own.

    Raises:
        IncompatibleError: If the engine's inputs and outputs are not those of the specification.
        PcnDeployError: If CUDA or TensorRT cannot provide the memory.
    """

    def __init__(
        self, trt: Any, cuda: Cuda, runtime: Any, engine: Any, spec: EngineSpec, messages: Messages, stream: int = 0
    ) -> None:
        super().__init__(spec)
        self._cuda, self._runtime, self._engine, self._messages = cuda, runtime, engine, messages
        self._lock = threading.Lock()
        self._device = cuda.device()
        dtypes = self._interface(trt)
        with ExitStack() as owned:
            self._stream = stream or cuda.stream()
            if not stream:
                owned.callback(cuda.drop_stream, self._stream)
            self._context = engine.create_execution_context()
            if self._context is None:
                self._fail("could not create an execution context")
            self._inputs = [self._input(item.name, dtypes, owned) for item in spec.inputs]
            self._outputs = [self._output(item.name, dtypes, owned) for item in spec.outputs]
            self._owned = owned.pop_all()

    def _interface(self, trt: Any) -> dict[str, np.dtype[Any]]:
        """Element type by name, after the names, types and modes were compared with the specification."""
        engine = self._engine
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        inputs = {name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT}
        expected = {item.name for item in self.spec.inputs}
        if inputs != expected or set(names) - inputs != {item.name for item in self.spec.outputs}:
            msg = f"The engine has the tensors {sorted(names)}; its bundle says {self.spec}. Build it again."
            raise IncompatibleError(msg)
        kinds = {name: engine.get_tensor_dtype(name).name for name in names}
        for item in (*self.spec.inputs, *self.spec.outputs):
            if _DTYPES.get(kinds[item.name]) != item.dtype:
                msg = (
                    f"Tensor {item.name!r} of the engine is {kinds[item.name]}; its bundle says "
                    f"{item.dtype}. Known are {', '.join(_DTYPES)}. Build it with FP32 inputs and outputs."
                )
                raise IncompatibleError(msg)
        return {name: np.dtype(_DTYPES[kind]) for name, kind in kinds.items()}

    def _input(self, name: str, dtypes: dict[str, np.dtype[Any]], owned: ExitStack) -> _Tensor:
        spec = next(item for item in self.spec.inputs if item.name == name)
        shape = spec.with_batch(self.spec.batch.max)
        if not self._context.set_input_shape(name, shape):
            msg = f"The engine refuses {name!r} of shape {shape}, which its bundle allows. Build it again."
            raise IncompatibleError(msg)
        return self._tensor(name, dtypes[name], shape, owned)

    def _output(self, name: str, dtypes: dict[str, np.dtype[Any]], owned: ExitStack) -> _Tensor:
        return self._tensor(name, dtypes[name], self._shape(name), owned)

    def _shape(self, name: str) -> tuple[int, ...]:
        shape = tuple(int(dim) for dim in self._context.get_tensor_shape(name))
        if min(shape, default=0) < 0:
            self._fail(f"cannot tell the shape of output {name!r} ahead of execution")
        return shape

    def _tensor(self, name: str, dtype: np.dtype[Any], shape: tuple[int, ...], owned: ExitStack) -> _Tensor:
        address = self._cuda.allocate(max(int(np.prod(shape)) * dtype.itemsize, 1))
        owned.callback(self._cuda.release, address)
        if not self._context.set_tensor_address(name, address):
            self._fail(f"refused the memory of {name!r}")
        return _Tensor(name=name, dtype=dtype, address=address)

    def _fail(self, what: str) -> NoReturn:
        msg = f"TensorRT {what}:{self._messages.summary()}"
        raise PcnDeployError(msg)

    def _run_impl(self, inputs: dict[str, Array], out: dict[str, Array]) -> dict[str, Array]:
        with self._lock:
            if self._engine is None:
                raise PcnDeployError(CLOSED)
            with self._cuda.on_device(self._device):
                return self._execute(inputs, out)

    def _execute(self, inputs: dict[str, Array], out: dict[str, Array]) -> dict[str, Array]:
        for tensor in self._inputs:
            array = inputs[tensor.name]
            self._cuda.to_device(tensor.address, array.ctypes.data, array.nbytes, self._stream)
            if not self._context.set_input_shape(tensor.name, array.shape):
                self._fail(f"refused {tensor.name!r} of shape {array.shape}")
        if not self._context.execute_async_v3(self._stream):
            self._fail("failed to execute the engine")
        outputs = {}
        for tensor in self._outputs:
            array = out[tensor.name] if tensor.name in out else np.empty(self._shape(tensor.name), tensor.dtype)
            outputs[tensor.name] = array
            self._cuda.to_host(array.ctypes.data, tensor.address, array.nbytes, self._stream)
        self._cuda.wait(self._stream)
        return outputs

    def close(self) -> None:
        """Free the device memory, the stream and the engine. May be called more than once."""
        with self._lock:
            if self._engine is None:
                return
            with suppress(PcnDeployError), ExitStack() as device:
                with suppress(PcnDeployError):  # a device that has failed must not keep the rest from being freed
                    device.enter_context(self._cuda.on_device(self._device))
                    self._cuda.wait(self._stream)
                self._context = self._engine = self._runtime = None
                self._owned.close()
