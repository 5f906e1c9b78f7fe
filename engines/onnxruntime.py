"""Target `cpu`: ONNX Runtime executes the bundle's graph on the CPU. The graph is the engine."""

from __future__ import annotations

import base64
import importlib.util
from functools import cache
from typing import Any

import numpy as np

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
from pcn_deploy.errors import BuildError, DependencyError, IncompatibleError, PcnDeployError
from pcn_deploy.members import GRAPH
from pcn_deploy.memory import large_blocks_returned, return_freed
from pcn_deploy.progress import Progress
from pcn_deploy.remedies import install
from pcn_deploy.specs import EngineSpec

WRONG = ("ReluQuantRewrite",)
"""Rewrites that are left out: this one drops a Relu before a QuantizeLinear of FP8, as if its codes had no negatives
(1.31.1). It changes nothing where codes are signed INT8."""

_CODES_OF_HALF = base64.b64decode(
    "CAo6iQEKMwoBeAoBcwoBehIBeRoVbm9kZV9RdWFudGl6ZUxpbmVhcl8wIg5RdWFudGl6ZUxpbmVhchIBZyoJEApCAXNKAgA8KggQA0IBekoBAFoP"
    "CgF4EgoKCAgKEgQKAggBYg8KAXkSCgoICAMSBAoCCAFqCwoBcxIGCgQIChIAagsKAXoSBgoECAMSAEIECgAQEw=="
)
"""One QuantizeLinear at scale 1, float16 `x` `(1)` to INT8 `y` `(1)`; bytes, since devices have no onnx to make it."""


class OnnxRuntimeBackend(Backend):
    """ONNX Runtime with its CPU provider."""

    target = "cpu"
    extra = "runtime"
    member = GRAPH
    rank = 2
    exact = True
    runs_with = (
        "ONNX Runtime and Triton's onnxruntime backend run it as it is. trtexec and TensorRT's builder make an engine "
        "from it: --stronglyTyped before TensorRT 11, and neither --fp16 nor --int8."
    )

    def availability(self) -> Availability:
        """ONNX Runtime builds and runs wherever it is installed."""
        if importlib.util.find_spec("onnxruntime") is None:
            detail, remedy = "onnxruntime is not installed", install(self.extra)
            return Availability(can_build=False, can_run=False, detail=detail, remedy=remedy)
        try:
            import onnxruntime
        except ImportError as error:  # installed, but a library of its own does not load
            detail = f"onnxruntime does not load: {error}"
            remedy = install(self.extra, only=("onnxruntime",), again=True)
            return Availability(can_build=False, can_run=False, detail=detail, remedy=remedy)
        return Availability(can_build=True, can_run=True, detail=f"ONNX Runtime {onnxruntime.__version__}")

    def _build_impl(self, source: GraphSource, progress: Progress) -> EngineArtifact:
        import onnxruntime

        graph = source.read_onnx()
        progress("Loading into ONNX Runtime", 0, 1)
        try:
            _session_of(graph, optimise=False)
        except PcnDeployError:
            raise
        except Exception as error:  # ONNX Runtime's exceptions share no public base
            msg = f"ONNX Runtime {onnxruntime.__version__} refuses the graph on the CPU: {error}"
            raise BuildError(msg) from error
        progress("Loading into ONNX Runtime", 1, 1)
        return EngineArtifact(
            data=graph,
            built_with={"onnxruntime": onnxruntime.__version__, "provider": "CPUExecutionProvider"},
        )

    def _open_impl(self, data: bytes, spec: EngineSpec, options: OpenOptions) -> Session:
        return _opened(data, spec, optimise=True, lean=options.lean)


@cache
def truncates_half() -> bool:
    """Whether the installed ONNX Runtime makes INT8 codes of FP16 by cutting off on the CPU: 2.9 becomes 2.

    1.22 to 1.28 do, 1.30 to 1.32 round to the nearest code as the operator says.
    """
    import onnxruntime

    session = onnxruntime.InferenceSession(_CODES_OF_HALF, providers=["CPUExecutionProvider"])
    return int(session.run(None, {"x": np.array([2.9], np.float16)})[0][0]) != 3


def open_plain(data: bytes, spec: EngineSpec) -> Session:
    """Open a graph that the runtime executes as it stands, without its rewrites: less memory, and soon ready.

    Args:
        data: A serialised ONNX graph.
        spec: Its interface.

    Raises:
        IncompatibleError: If ONNX Runtime cannot load it.
    """
    return _opened(data, spec, optimise=False)


def _opened(data: bytes, spec: EngineSpec, *, optimise: bool, lean: bool = False) -> Session:
    import onnxruntime

    try:
        return _OnnxRuntimeSession(_session_of(data, optimise=optimise, lean=lean), spec)
    except PcnDeployError:
        raise
    except Exception as error:
        msg = f"ONNX Runtime {onnxruntime.__version__} cannot load the graph: {error}. Upgrade onnxruntime."
        raise IncompatibleError(msg) from error


def _session_of(data: bytes, *, optimise: bool = True, lean: bool = False) -> Any:
    """A session on a graph; BF16, for which there are no kernels, is computed in FP32 with every tensor rounded to it.

    Raises:
        DependencyError: If a BF16 graph cannot be rewritten so, as the library for that is missing.
    """
    try:
        return _session(data, optimise=optimise, lean=lean)
    except Exception as refusal:
        try:
            from pcn_deploy.engines.rounded import holds_bf16, round_to_types
        except ModuleNotFoundError as error:
            if "bfloat16" not in str(refusal) and "NOT_IMPLEMENTED" not in str(refusal):
                raise refusal from None
            purpose = "running what ONNX Runtime has no kernels for on the CPU, such as BF16,"
            raise DependencyError.for_extra(error.name or "onnx", "compile", purpose, ("onnx", "onnx-ir")) from error
        if not holds_bf16(data):
            raise
        return _session(round_to_types(data), optimise=optimise, lean=lean)


def _session(data: bytes, *, optimise: bool = True, lean: bool = False) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    levels = onnxruntime.GraphOptimizationLevel
    # All levels but the last one, which executes FP16 operations in FP32, so that less is rounded than the graph says,
    # and in which 1.31.1 ends the process on some attention in FP16. Before it had that level, "all" was without it.
    full = getattr(levels, "ORT_ENABLE_LAYOUT", levels.ORT_ENABLE_ALL)
    options.graph_optimization_level = full if optimise else levels.ORT_DISABLE_ALL
    options.enable_cpu_mem_arena = optimise  # faster, and never gives back what one run took
    options.enable_mem_pattern = not lean  # faster, and holds all that a run takes as one block beside the first's
    options.log_severity_level = 3
    # Convolutions have no kernel that takes INT8 in and gives float out: left to itself, the runtime dequantises
    # their weights on every run. Told not to look for such kernels, it does so once.
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    # Weights out of the arena, which grows by powers of two. Some are copied twice on the way to their final form.
    options.add_session_config_entry("session.use_device_allocator_for_initializers", "1")
    with large_blocks_returned():
        session = onnxruntime.InferenceSession(
            data, options, providers=["CPUExecutionProvider"], disabled_optimizers=list(WRONG)
        )
    release_graph(session)
    return session


def release_graph(session: Any) -> None:
    """Give back what an `onnxruntime.InferenceSession` no longer needs: of PatchConvNet-S60 in INT8 150 of 328 MiB.

    It keeps the bytes of the graph, to open it again with other providers, of which there are none here; and weights
    were copied on the way to the form in which they are multiplied.
    """
    session._model_bytes = None
    return_freed()


class _OnnxRuntimeSession(Session):
    def __init__(self, session: Any, spec: EngineSpec) -> None:
        super().__init__(spec)
        self._session = session

    def _run_impl(self, inputs: dict[str, Array], out: dict[str, Array]) -> dict[str, Array]:
        if self._session is None:
            raise PcnDeployError(CLOSED)
        names = [tensor.name for tensor in self.spec.outputs]
        if set(names) == out.keys():
            self._run_into(inputs, out)
            return out
        return dict(zip(names, self._session.run(names, inputs), strict=True))

    def _run_into(self, inputs: dict[str, Array], out: dict[str, Array]) -> None:
        """Execute with the caller's arrays as the memory of the outputs."""
        binding = self._session.io_binding()
        for name, array in inputs.items():
            binding.bind_cpu_input(name, array)
        for name, array in out.items():
            binding.bind_output(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        self._session.run_with_iobinding(binding)

    def close(self) -> None:
        """Free the session. May be called more than once."""
        self._session = None
