"""The few calls of the CUDA driver and runtime that are needed, through ctypes: no torch, no cuda-python.

Source: https://docs.nvidia.com/cuda/cuda-driver-api and https://docs.nvidia.com/cuda/cuda-runtime-api.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pcn_deploy.errors import DependencyError, PcnDeployError

_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR
_TO_DEVICE, _TO_HOST = 1, 2  # cudaMemcpyHostToDevice and cudaMemcpyDeviceToHost
_NON_BLOCKING = 1  # cudaStreamNonBlocking


@dataclass(frozen=True)
class Device:
    """One GPU: its name, and its compute capability such as `SM89`."""

    name: str
    capability: str

    def __str__(self) -> str:
        return f"{self.name} ({self.capability})"


@dataclass(frozen=True, kw_only=True)
class Devices:
    """What the driver says, without any CUDA context having been created.

    Attributes:
        gpus: The GPUs, in the order CUDA numbers them.
        driver: Highest CUDA version of the driver, such as 13000 for 13.0; 0 without a driver.
        problem: Why there is no GPU to use, or an empty string.
    """

    gpus: tuple[Device, ...] = ()
    driver: int = 0
    problem: str = ""


def devices() -> Devices:
    """Ask the driver for its GPUs. Never raises, never creates a context."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return Devices(problem="no NVIDIA driver: libcuda.so.1 not found")
    status = driver.cuInit(0)
    if status:
        return Devices(problem=f"the NVIDIA driver finds no usable GPU (cuInit returned {status})")
    version, count = ctypes.c_int(), ctypes.c_int()
    driver.cuDriverGetVersion(ctypes.byref(version))
    driver.cuDeviceGetCount(ctypes.byref(count))
    gpus = tuple(_describe(driver, index) for index in range(count.value))
    problem = "" if gpus else "the NVIDIA driver finds no GPU"
    return Devices(gpus=gpus, driver=version.value, problem=problem)


def current() -> Device:
    """The calling thread's device.

    Raises:
        DependencyError: If there is no GPU, or no CUDA runtime to ask.
    """
    state = devices()
    if state.problem:
        raise DependencyError(state.problem)
    return state.gpus[Cuda.load(state.driver).device()]


def _describe(driver: ctypes.CDLL, index: int) -> Device:
    device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    name = ctypes.create_string_buffer(256)
    driver.cuDeviceGet(ctypes.byref(device), index)
    driver.cuDeviceGetName(name, len(name), device)
    driver.cuDeviceGetAttribute(ctypes.byref(major), _MAJOR, device)
    driver.cuDeviceGetAttribute(ctypes.byref(minor), _MINOR, device)
    return Device(name.value.decode(errors="replace"), f"SM{major.value}{minor.value}")


def _candidates() -> Iterator[str]:
    """Names of the CUDA runtime: on the loader's path, in the toolkit, in installed wheels."""
    yield from ("libcudart.so.13", "libcudart.so.12")
    yield os.environ.get("CUDA_HOME", "/usr/local/cuda") + "/lib64/libcudart.so"
    wheels = find_spec("nvidia")  # a namespace that the wheels of NVIDIA share
    for folder in (wheels and wheels.submodule_search_locations) or ():
        yield from sorted(map(str, Path(folder).glob("*/lib/libcudart.so.*")), reverse=True)


def version_text(number: int) -> str:
    """CUDA's number for a version as people write it: 13040 is `13.4`."""
    return f"{number // 1000}.{number % 1000 // 10}"


class Cuda:
    """The CUDA runtime. Every call raises when CUDA reports an error, except those that release."""

    def __init__(self, library: Any) -> None:
        self._library = library
        for name in ("cudaFree", "cudaStreamDestroy"):
            getattr(library, name).argtypes = [ctypes.c_void_p]
        library.cudaGetErrorString.restype = ctypes.c_char_p

    @classmethod
    def load(cls, driver: int = 0) -> Cuda:
        """Load the CUDA runtime.

        Args:
            driver: CUDA version of the driver; runtimes of a newer major version are skipped. 0: any.

        Raises:
            DependencyError: If no runtime is found that the driver can serve.
        """
        for name in _candidates():
            try:
                cuda = cls(ctypes.CDLL(name))
            except OSError:
                continue
            if not driver or cuda.version // 1000 <= driver // 1000:
                return cuda
        serving = f" that a driver for CUDA {version_text(driver)} can serve" if driver else ""
        msg = f"no CUDA runtime{serving}: libcudart.so.13 or libcudart.so.12 not found"
        raise DependencyError(msg)

    def _call(self, name: str, *arguments: Any) -> None:
        status = getattr(self._library, name)(*arguments)
        if status:
            text = (self._library.cudaGetErrorString(status) or b"").decode(errors="replace")
            msg = f"CUDA: {name} failed with error {status} ({text}). See what else uses the GPU: nvidia-smi"
            raise PcnDeployError(msg)

    @property
    def version(self) -> int:
        """Version of the runtime, such as 13040 for 13.4."""
        number = ctypes.c_int()
        self._call("cudaRuntimeGetVersion", ctypes.byref(number))
        return number.value

    def device(self) -> int:
        """Index of the calling thread's device."""
        index = ctypes.c_int()
        self._call("cudaGetDevice", ctypes.byref(index))
        return index.value

    def use_device(self, index: int) -> None:
        """Make a device the calling thread's."""
        self._call("cudaSetDevice", index)

    @contextmanager
    def on_device(self, index: int) -> Iterator[None]:
        """Let a device be the calling thread's for a while; afterwards it has the one that it had."""
        before = self.device()
        if before != index:
            self.use_device(index)
        try:
            yield
        finally:
            if before != index:
                self.use_device(before)

    def allocate(self, size: int) -> int:
        """Address of `size` new bytes on the device."""
        address = ctypes.c_void_p()
        self._call("cudaMalloc", ctypes.byref(address), ctypes.c_size_t(size))
        return address.value or 0

    def release(self, address: int) -> None:
        """Free memory that `allocate` gave."""
        self._library.cudaFree(address)

    def stream(self) -> int:
        """Handle of a new stream that does not wait for the default one."""
        handle = ctypes.c_void_p()
        self._call("cudaStreamCreateWithFlags", ctypes.byref(handle), _NON_BLOCKING)
        return handle.value or 0

    def wait(self, stream: int) -> None:
        """Block until all work of a stream is done."""
        self._call("cudaStreamSynchronize", ctypes.c_void_p(stream))

    def drop_stream(self, stream: int) -> None:
        """Destroy a stream that `stream` gave."""
        self._library.cudaStreamDestroy(stream)

    def to_device(self, address: int, host: int, size: int, stream: int) -> None:
        """Queue a copy of `size` bytes from host memory."""
        self._copy(address, host, size, _TO_DEVICE, stream)

    def to_host(self, host: int, address: int, size: int, stream: int) -> None:
        """Queue a copy of `size` bytes to host memory."""
        self._copy(host, address, size, _TO_HOST, stream)

    def _copy(self, target: int, source: int, size: int, kind: int, stream: int) -> None:
        pointer = ctypes.c_void_p
        self._call("cudaMemcpyAsync", pointer(target), pointer(source), ctypes.c_size_t(size), kind, pointer(stream))
