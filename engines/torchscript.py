"""Target `torchscript`: the frozen module, run by PyTorch on a CUDA device if there is one, else on the CPU."""

from __future__ import annotations

import importlib.util
import warnings
from contextlib import nullcontext
from typing import Any

from pcn_deploy.engines.base import (
    CLOSED,
    Array,
    Availability,
    Backend,
    EngineArtifact,
    GraphSource,
    OpenOptions,
    Session,
)
from pcn_deploy.errors import BuildError, IncompatibleError, OptionError, PcnDeployError
from pcn_deploy.members import SCRIPT
from pcn_deploy.memory import temporary_path
from pcn_deploy.progress import Progress
from pcn_deploy.remedies import install
from pcn_deploy.specs import EngineSpec


class TorchScriptBackend(Backend):
    """PyTorch's own runtime for scripted modules."""

    target = "torchscript"
    extra = "compile"
    member = graph = SCRIPT
    rank = 3
    exact = True
    devices = ("cuda", "cpu")
    runs_with = "torch.jit.load in Python, torch::jit::load in C++ and Triton's pytorch backend run it."

    def availability(self) -> Availability:
        """PyTorch builds and runs wherever it is installed."""
        if importlib.util.find_spec("torch") is None:
            detail, remedy = "torch is not installed", install(self.extra, only=("torch",))
            return Availability(can_build=False, can_run=False, detail=detail, remedy=remedy)
        from importlib.metadata import version

        return Availability(can_build=True, can_run=True, detail=f"PyTorch {version('torch')}")

    def check_type(self, precision: str) -> None:
        """Refuse FP16 and BF16: the module is FP32, with fake quantisation for 8 bits."""
        if precision in ("fp16", "bf16"):
            msg = (
                f"The TorchScript module is FP32, so target torchscript cannot be {precision}. "
                "Take --precision fp32 or int8 for it, or leave the target out."
            )
            raise OptionError(msg)

    def _build_impl(self, source: GraphSource, progress: Progress) -> EngineArtifact:
        import torch

        if not source.torchscript:
            msg = "No TorchScript module was given: the target torchscript can only be built with one."
            raise BuildError(msg)
        return EngineArtifact(data=source.torchscript, built_with={"torch": torch.__version__})

    def _open_impl(self, data: bytes, spec: EngineSpec, options: OpenOptions) -> Session:
        import torch

        device = options.device or ("cuda" if options.stream or torch.cuda.is_available() else "cpu")
        if device != "cpu" and (options.index or 0) >= torch.cuda.device_count():
            msg = f"PyTorch finds {torch.cuda.device_count()} CUDA devices here, so there is no {device!r}."
            raise OptionError(msg)
        try:
            with warnings.catch_warnings(), temporary_path("model.ts") as path:
                for kind in (DeprecationWarning, FutureWarning):  # of TorchScript itself
                    warnings.simplefilter("ignore", kind)
                path.write_bytes(data)  # from a buffer, torch would copy it three times
                module = torch.jit.load(path, map_location=device)  # type: ignore[no-untyped-call]
        except RuntimeError as error:
            msg = f"PyTorch {torch.__version__} cannot load this TorchScript module: {error}"
            raise IncompatibleError(msg) from error
        return _TorchScriptSession(module, device, options.stream, spec)


class _TorchScriptSession(Session):
    def __init__(self, module: Any, device: str, stream: int, spec: EngineSpec) -> None:
        super().__init__(spec)
        self._module = module
        self._device = device
        self._stream = stream

    def _run_impl(self, inputs: dict[str, Array], out: dict[str, Array]) -> dict[str, Array]:
        import torch

        if self._module is None:
            raise PcnDeployError(CLOSED)
        external = None
        if self._stream:
            external = torch.cuda.ExternalStream(self._stream, device=self._device)  # type: ignore[no-untyped-call]
        names = [tensor.name for tensor in self.spec.outputs]
        with torch.cuda.stream(external) if external else nullcontext(), torch.inference_mode():
            # a copy: the network may write into what it is given
            tensors = [torch.tensor(inputs[tensor.name], device=self._device) for tensor in self.spec.inputs]
            result = self._module(*tensors)
            results = result if isinstance(result, tuple | list) else (result,)
            return {name: value.cpu().numpy() for name, value in zip(names, results, strict=True)}

    def close(self) -> None:
        """Free the module. May be called more than once."""
        self._module = None
