"""The contract every backend fulfils: say what this machine can do, build, open, run.

Public methods check once what is common to all; a backend fills in the `_impl` hooks.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from types import TracebackType
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from pcn_deploy.errors import DataError, DependencyError, ExecutionError, OptionError, PcnDeployError
from pcn_deploy.members import GRAPH
from pcn_deploy.progress import Progress, silent
from pcn_deploy.specs import EngineSpec, TensorSpec

Array = npt.NDArray[Any]

CLOSED = "The session is closed. Open the engine again."


@dataclass(frozen=True, kw_only=True)
class Availability:
    """What a backend can do on this machine.

    Attributes:
        can_build: Its library is present and builds engines here.
        can_run: It can also execute them here (a GPU is present where one is needed).
        detail: One line for a person: versions found, or what is missing.
        remedy: The command that would mend it, or an empty string.
    """

    can_build: bool
    can_run: bool
    detail: str
    remedy: str = ""


@dataclass(frozen=True, kw_only=True)
class BackendOptions:
    """Settings of how engines are built that not every target has.

    Attributes:
        compute_capabilities: What an engine that is built ahead of time is for, such as `("SM89",)`; empty for the
            target's own choice.
        tf32: Let FP32 convolutions and products round their inputs to TF32 (10 bits of mantissa). Off, because a tensor
            that the graph types as FP32 is meant to be computed as FP32.
    """

    compute_capabilities: tuple[str, ...] = ()
    tf32: bool = False

    @property
    def asked(self) -> tuple[str, ...]:
        """Names of the settings that differ from their default."""
        return tuple(item.name for item in fields(self) if getattr(self, item.name) != item.default)


@dataclass(frozen=True, kw_only=True)
class OpenOptions:
    """How an engine is opened.

    Attributes:
        device: What it runs on, as PyTorch names it: `cpu`, `cuda` for the calling thread's CUDA device, `cuda:1`;
            empty for the backend's own choice.
        stream: Handle of the CUDA stream that its work is queued on, such as `torch.cuda.Stream().cuda_stream`; 0 for
            one of its own. `Session.run` returns when the work is done in either case.
        lean: Whether little memory matters more than speed, as for a proof beside other work; the answers are the same.
    """

    device: str = ""
    stream: int = 0
    lean: bool = False

    @property
    def kind(self) -> str:
        """`cpu`, `cuda`, or empty."""
        return self.device.partition(":")[0]

    @property
    def index(self) -> int | None:
        """Which of the CUDA devices; None for the calling thread's."""
        number = self.device.partition(":")[2]
        return int(number) if number else None


OPEN = OpenOptions()
"""As each backend would have it."""


@dataclass(frozen=True, kw_only=True)
class GraphSource:
    """What an engine is built from.

    Attributes:
        onnx: The typed ONNX graph, explicit Q/DQ included, serialised; or what reads it, so that its weights need not
            stay in memory while an engine is built from them.
        torchscript: The frozen TorchScript module, serialised; empty where it is not at hand.
        spec: Interface of the network and the batch range to build for.
    """

    onnx: bytes | Callable[[], bytes]
    torchscript: bytes
    spec: EngineSpec

    def read_onnx(self) -> bytes:
        """The ONNX graph; keep no reference that is not needed."""
        return self.onnx if isinstance(self.onnx, bytes) else self.onnx()


@dataclass(frozen=True, kw_only=True)
class EngineArtifact:
    """An engine as it goes into a bundle.

    Attributes:
        data: The serialised engine, exactly as the backend's own tools expect it; bytes, or what holds them, since
            there may be many.
        built_with: Library versions and settings that decide where it can run, all as text.
    """

    data: bytes | memoryview
    built_with: dict[str, str] = field(default_factory=dict)


class Session(ABC):
    """An opened engine. Use it as a context manager, or call `close`."""

    def __init__(self, spec: EngineSpec) -> None:
        self.spec = spec

    def run(self, inputs: Mapping[str, Array], out: Mapping[str, Array] | None = None) -> dict[str, Array]:
        """Execute the engine once.

        Args:
            inputs: One array per input of the engine, `(N, ...)`, of the stated dtype, N within the batch range.
            out: Arrays to write outputs into, by name, `(N, ...)`, of the stated dtype, contiguous and writable. The
                other outputs get new ones.

        Returns:
            One array per output, `(N, ...)`, of the stated dtype, owned by the caller.

        Raises:
            DataError: If an input is missing, an array is of another dtype or shape, or the batch is out of range.
            ExecutionError: If the engine fails on them; the message holds its library's words.
        """
        expected = {tensor.name for tensor in self.spec.inputs}
        if set(inputs) != expected:
            msg = f"Inputs given: {sorted(inputs)}; the engine takes {sorted(expected)}."
            raise DataError(msg)
        for tensor in self.spec.inputs:
            self._check(tensor, inputs[tensor.name])
        wanted = dict(out or {})
        self._check_out(wanted, len(inputs[self.spec.inputs[0].name]))
        arrays = {name: np.ascontiguousarray(array) for name, array in inputs.items()}
        try:
            results = self._run_impl(arrays, wanted)
        except PcnDeployError:
            raise
        except Exception as error:  # the libraries' exceptions share no base
            shapes = {name: array.shape for name, array in arrays.items()}
            msg = f"The engine fails on inputs of shape {shapes}: {error}. Build it again, or report it with the graph."
            raise ExecutionError(msg) from error
        return {tensor.name: _delivered(tensor, results, wanted.get(tensor.name)) for tensor in self.spec.outputs}

    def _check_out(self, out: dict[str, Array], batch: int) -> None:
        tensors = {tensor.name: tensor for tensor in self.spec.outputs}
        if not out.keys() <= tensors.keys():
            msg = f"Arrays given for outputs: {sorted(out)}; the engine has {sorted(tensors)}."
            raise DataError(msg)
        for name, array in out.items():
            dtype, shape = tensors[name].dtype, tensors[name].with_batch(batch)
            if (str(array.dtype), array.shape) != (dtype, shape):
                msg = f"The array for {name!r} is {array.dtype} {array.shape}; the engine writes {dtype} {shape}."
                raise DataError(msg)
            if not (array.flags.c_contiguous and array.flags.writeable):
                msg = f"The array for {name!r} is not contiguous, or may not be written. Give one as np.empty makes it."
                raise DataError(msg)

    def _check(self, tensor: TensorSpec, array: Array) -> None:
        low, high = self.spec.batch.min, self.spec.batch.max
        batch = array.shape[0] if array.ndim else 0
        if str(array.dtype) != tensor.dtype or array.shape != tensor.with_batch(batch):
            msg = (
                f"Input {tensor.name!r} is {array.dtype} of shape {array.shape}; "
                f"the engine takes {tensor.dtype} of shape {tensor.shape}."
            )
            raise DataError(msg)
        if not low <= batch <= high:
            msg = f"Batch of {batch} images; the engine was built for {self.spec.batch} (MIN:OPT:MAX)."
            raise DataError(msg)

    @abstractmethod
    def _run_impl(self, inputs: dict[str, Array], out: dict[str, Array]) -> dict[str, Array]:
        """Execute on checked, contiguous inputs.

        Args:
            inputs: All inputs.
            out: Where the caller wants some of the outputs; what is not written there is copied by `run`.

        Returns:
            All outputs: arrays of `out`, or new ones.
        """

    def close(self) -> None:  # noqa: B027 - a backend without resources has nothing to release
        """Release what the session holds. May be called more than once."""

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _delivered(tensor: TensorSpec, results: Mapping[str, Array], wanted: Array | None) -> Array:
    """An output where the caller wants it.

    Raises:
        ExecutionError: If the engine does not return what its interface says.
    """
    array = results.get(tensor.name)
    if array is None or str(array.dtype) != tensor.dtype:
        seen = "nothing" if array is None else str(array.dtype)
        msg = f"The engine returns {seen} as {tensor.name!r}; its bundle says {tensor.dtype}. Build it again."
        raise ExecutionError(msg)
    if wanted is None or array is wanted:
        return array
    np.copyto(wanted, array)
    return wanted


class Backend(ABC):
    """One way to turn a graph into an engine and to run it."""

    target: ClassVar[str]
    """Name on the command line and in the bundle."""

    extra: ClassVar[str]
    """Extra of this distribution that installs the backend's library."""

    member: ClassVar[str]
    """Where the engine lives in a bundle; a backend that executes the graph itself names `model.onnx` or `model.ts`."""

    rank: ClassVar[int]
    """Its place in the order in which the engines of a bundle are tried: the fastest is 0."""

    graph: ClassVar[str] = GRAPH
    """Member of a bundle that its engines are made from: `model.onnx` or `model.ts`."""

    devices: ClassVar[tuple[str, ...]] = ("cpu",)
    """Kinds of device that its engines run on, the best first: of `cpu` and `cuda`."""

    exact: ClassVar[bool] = False
    """Whether it computes a graph of FP32 in FP32, as a CPU does, so that its answers differ by the order of sums."""

    runs_with: ClassVar[str] = ""
    """What else than this library runs its engines, in whole sentences: `extract` tells it."""

    built_aside: ClassVar[bool] = False
    """Whether a build keeps to one core and measures nothing, so that it can go on beside other work."""

    settings: ClassVar[tuple[str, ...]] = ()
    """Names of the `BackendOptions` that this backend takes."""

    def configured(self, options: BackendOptions) -> Backend:
        """This backend with those of the settings that it takes."""
        return self

    @abstractmethod
    def availability(self) -> Availability:
        """What this machine can do with this backend. Never raises, never starts a GPU context."""

    def check_can_build(self) -> None:
        """Raise what `build` would raise before it starts.

        Raises:
            DependencyError: If the backend's library is missing; the message says how to install it.
        """
        state = self.availability()
        if not state.can_build:
            msg = f"Target {self.target!r} cannot be built here: {state.detail}. {state.remedy}".rstrip()
            raise DependencyError(msg)

    def check_type(self, precision: str) -> None:  # noqa: B027 - the typed graph has the type of every precision
        """Refuse a precision that the graph it is made from cannot have; loads no library.

        Raises:
            OptionError: If its engine would not have the precision of its bundle.
        """

    def check_precision(self, precision: str) -> None:  # noqa: B027 - most backends take all of them
        """Refuse what the target's hardware cannot compute in, before the long work.

        Raises:
            OptionError: If it cannot; the message says what can.
        """

    def build(self, source: GraphSource, progress: Progress = silent) -> EngineArtifact:
        """Build an engine.

        Raises:
            DependencyError: If the backend's library is missing; the message says how to install it.
            BuildError: If the library refuses the graph; its own messages are included.
        """
        self.check_can_build()
        return self._build_impl(source, progress)

    def check_can_run(self) -> None:
        """Raise what `open` would raise before it looks at the engine.

        Raises:
            DependencyError: If the backend's library, or the GPU it needs, is missing.
        """
        state = self.availability()
        if not state.can_run:
            msg = f"Target {self.target!r} cannot run here: {state.detail}. {state.remedy}".rstrip()
            raise DependencyError(msg)

    def check_device(self, options: OpenOptions) -> None:
        """Refuse a device or a stream that the engines of this target cannot have.

        Raises:
            OptionError: If they cannot.
        """
        known = re.fullmatch(r"cpu|cuda(:\d+)?", options.device)
        if options.device and not (known and options.kind in self.devices):
            msg = f"Engines of target {self.target!r} run on {' or '.join(self.devices)}, not on {options.device!r}."
            raise OptionError(msg)
        if options.stream and (options.kind or self.devices[0]) != "cuda":
            msg = f"Target {self.target!r} has no CUDA stream on {options.kind or self.devices[0]}; give none."
            raise OptionError(msg)

    def open(self, data: bytes, spec: EngineSpec, options: OpenOptions = OPEN) -> Session:
        """Open an engine whose bytes were verified by the caller.

        Args:
            data: The engine.
            spec: Its interface.
            options: On which device, on whose stream.

        Raises:
            OptionError: If this target has no such device.
            DependencyError: If the backend's library is missing.
            IncompatibleError: If the engine does not fit this device or this version of the library.
        """
        self.check_device(options)
        self.check_can_run()
        return self._open_impl(data, spec, options)

    @abstractmethod
    def _build_impl(self, source: GraphSource, progress: Progress) -> EngineArtifact: ...

    @abstractmethod
    def _open_impl(self, data: bytes, spec: EngineSpec, options: OpenOptions) -> Session: ...
