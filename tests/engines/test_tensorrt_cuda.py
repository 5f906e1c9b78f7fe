"""What the CUDA driver and runtime tell: a FAKE driver and runtime, and the real runtime without a GPU."""

# ruff: noqa: N802 - the fakes have the names of what they stand in for

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any

import pytest

from pcn_deploy.engines.registry import get_backend
from pcn_deploy.engines.tensorrt import library
from pcn_deploy.engines.tensorrt.cuda import Cuda, Device, current, devices, version_text
from pcn_deploy.errors import DependencyError, PcnDeployError


class FakeDriver:
    """Stands in for libcuda with two GPUs."""

    def __init__(self, status: int = 0, count: int = 2) -> None:
        self.status, self.count = status, count

    def cuInit(self, _flags: int) -> int:
        return self.status

    def cuDriverGetVersion(self, version: Any) -> None:
        version._obj.value = 12060

    def cuDeviceGetCount(self, count: Any) -> None:
        count._obj.value = self.count

    def cuDeviceGet(self, device: Any, index: int) -> None:
        device._obj.value = index

    def cuDeviceGetName(self, name: Any, _size: int, device: Any) -> None:
        name.value = f"GPU {device.value}".encode()

    def cuDeviceGetAttribute(self, value: Any, attribute: int, device: Any) -> None:
        value._obj.value = {75: 8, 76: 6 + device.value}[attribute]


def fake_runtime(version: int = 12060, device: int = 1) -> Any:
    """Stands in for libcudart: its version, and the calling thread's device."""

    def answer(value: int) -> Any:
        def call(number: Any) -> int:
            number._obj.value = value
            return 0

        return call

    def release(_what: int) -> int:
        return 0

    return SimpleNamespace(
        cudaRuntimeGetVersion=answer(version),
        cudaGetDevice=answer(device),
        cudaGetErrorString=lambda _status: b"",
        cudaFree=release,
        cudaStreamDestroy=release,
    )


def test_gpus_are_named_with_their_compute_capability(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda _name: FakeDriver())
    found = devices()
    assert [str(device) for device in found.gpus] == ["GPU 0 (SM86)", "GPU 1 (SM87)"]
    assert (version_text(found.driver), found.problem) == ("12.6", "")


@pytest.mark.parametrize(
    ("driver", "words"), [(FakeDriver(status=100), "cuInit returned 100"), (FakeDriver(count=0), "no GPU")]
)
def test_a_driver_without_gpus_is_said(driver: Any, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda _name: driver)
    assert words in devices().problem


def test_without_a_driver_the_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", missing)
    assert devices().problem == "no NVIDIA driver: libcuda.so.1 not found"
    with pytest.raises(DependencyError, match=r"libcudart\.so\.13 or libcudart\.so\.12 not found"):
        Cuda.load()


def test_a_runtime_newer_than_the_driver_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    def runtime(name: str) -> Any:
        return fake_runtime(13000 if name.endswith("13") else 12060)

    monkeypatch.setattr(ctypes, "CDLL", runtime)
    assert Cuda.load(13000).version == 13000
    assert Cuda.load(12080).version == 12060
    with pytest.raises(DependencyError, match=r"driver for CUDA 11\.4"):
        Cuda.load(11040)


def test_the_real_runtime_reports_its_errors() -> None:
    if not devices().problem:
        pytest.skip("there is a GPU, on which nothing fails")
    try:
        cuda = Cuda.load()
    except DependencyError as error:
        pytest.skip(str(error))
    assert cuda.version >= 12000
    with pytest.raises(PcnDeployError, match=r"cudaMalloc failed with error \d+ \(.*driver"):
        cuda.allocate(16)


def test_the_device_is_the_threads_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: FakeDriver() if "libcuda.so" in name else fake_runtime())
    assert current() == Device("GPU 1", "SM87")


@pytest.mark.parametrize(("target", "builds"), [("tensorrt", False), ("tensorrt-rtx", True)])
def test_without_a_gpu_only_rtx_builds(target: str, builds: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise OSError(name)

    monkeypatch.setattr(library, "load", lambda _flavour: SimpleNamespace(__version__="1.2.3"))
    monkeypatch.setattr(ctypes, "CDLL", missing)
    state = get_backend(target).availability()
    assert (state.can_build, state.can_run) == (builds, False)
    assert "libcuda.so.1 not found" in state.detail
    assert ("On the device:" in state.remedy) is not builds


def test_a_gpu_without_a_cuda_runtime_runs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def only_the_driver(name: str) -> Any:
        if "libcuda.so" in name:
            return FakeDriver()
        raise OSError(name)

    monkeypatch.setattr(library, "load", lambda _flavour: SimpleNamespace(__version__="1.2.3"))
    monkeypatch.setattr(ctypes, "CDLL", only_the_driver)
    state = get_backend("tensorrt").availability()
    assert not state.can_run
    assert "no CUDA runtime that a driver for CUDA 12.6 can serve" in state.detail
