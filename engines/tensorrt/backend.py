"""The two targets `tensorrt` and `tensorrt-rtx`. Importing this loads no library of theirs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from pcn_deploy.engines.base import (
    Availability,
    Backend,
    BackendOptions,
    EngineArtifact,
    GraphSource,
    OpenOptions,
    Session,
)
from pcn_deploy.engines.tensorrt import cuda, library
from pcn_deploy.engines.tensorrt.build import BuildOptions, build, check_capabilities, fp8_capable
from pcn_deploy.engines.tensorrt.flavour import PORTABLE, TENSORRT, TENSORRT_RTX, Flavour
from pcn_deploy.engines.tensorrt.run import open_engine
from pcn_deploy.errors import DependencyError, PcnDeployError
from pcn_deploy.members import engine_member
from pcn_deploy.progress import Progress
from pcn_deploy.specs import EngineSpec


class _TensorRT(Backend):
    """What both flavours share."""

    flavour: ClassVar[Flavour]
    options: BuildOptions
    devices = ("cuda",)

    def __init__(self, *, compute_capabilities: Sequence[str] = PORTABLE, tf32: bool = False) -> None:
        self.options = BuildOptions(compute_capabilities=tuple(compute_capabilities), tf32=tf32)

    def availability(self) -> Availability:
        """What this machine can do with this flavour. Never raises, never starts a GPU context."""
        flavour = self.flavour
        try:
            release = f"{flavour.title} {library.version(library.load(flavour))}"
        except DependencyError as error:
            return Availability(can_build=False, can_run=False, detail=str(error), remedy=flavour.remedy)
        devices = cuda.devices()
        problem = devices.problem
        if not problem:
            try:
                cuda.Cuda.load(devices.driver)
            except PcnDeployError as error:
                problem = str(error)
        if not problem:
            return Availability(can_build=True, can_run=True, detail=f"{release}, {', '.join(map(str, devices.gpus))}")
        if flavour.ahead_of_time:
            detail = f"{release} builds here, but cannot run an engine: {problem}"
            return Availability(can_build=True, can_run=False, detail=detail)
        detail = f"{release} builds and runs engines only where there is a GPU: {problem}"
        remedy = f"On the device: pcn-compile engine FILE.pcn --target {self.target}"
        return Availability(can_build=False, can_run=False, detail=detail, remedy=remedy)

    def configured(self, options: BackendOptions) -> _TensorRT:
        """This backend with the settings that it takes; without compute capabilities, with its own."""
        asked = {name: getattr(options, name) for name in self.settings if name in options.asked}
        return type(self)(**asked)

    def check_precision(self, precision: str) -> None:
        """Refuse FP8 for GPUs that lack it, and GPUs that the library does not know."""
        if self.flavour.ahead_of_time:
            check_capabilities(library.load(self.flavour), self.flavour, self.options)
        if precision == "fp8":
            fp8_capable(self.flavour, self.options)

    def _build_impl(self, source: GraphSource, progress: Progress) -> EngineArtifact:
        return build(library.load(self.flavour), self.flavour, source, self.options, progress)

    def _open_impl(self, data: bytes, spec: EngineSpec, options: OpenOptions) -> Session:
        runtime = cuda.Cuda.load(cuda.devices().driver)
        with runtime.on_device(options.index if options.index is not None else runtime.device()):
            device = cuda.current()
            return open_engine(self.flavour, library.load(self.flavour), runtime, device, data, spec, options.stream)


class TensorRTBackend(_TensorRT):
    """TensorRT 10.3 and later, 11 included: builds for the device at hand, on that device."""

    target = "tensorrt"
    extra = "tensorrt"
    member = engine_member("tensorrt")
    rank = 0
    flavour = TENSORRT
    runs_with = (
        "The same version of TensorRT on the same model of GPU runs it: nvinfer1::IRuntime in C++, trtexec "
        "--loadEngine, Triton's tensorrt backend."
    )
    settings = ("tf32",)


class TensorRTRTXBackend(_TensorRT):
    """TensorRT-RTX 1: builds ahead of time on the CPU, for a list of compute capabilities, whatever GPU is here."""

    target = "tensorrt-rtx"
    extra = "tensorrt-rtx"
    member = engine_member("tensorrt-rtx")
    rank = 1
    flavour = TENSORRT_RTX
    runs_with = (
        "The same version of TensorRT-RTX runs it: nvinfer1::IRuntime of its own library in C++, and its own tool, "
        "tensorrt_rtx --loadEngine. It is no plan of TensorRT: neither trtexec nor Triton's tensorrt backend loads it."
    )
    settings = ("compute_capabilities", "tf32")
    built_aside = True  # ahead of time: no kernel is timed
