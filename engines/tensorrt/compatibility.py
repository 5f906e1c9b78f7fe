"""Why an engine does not fit: TensorRT's verdicts and messages, put in plain words that name both sides."""

from __future__ import annotations

import logging
import re
from typing import Any

from pcn_deploy.engines.tensorrt.cuda import Device
from pcn_deploy.engines.tensorrt.flavour import PORTABLE, Flavour
from pcn_deploy.engines.tensorrt.library import version
from pcn_deploy.engines.tensorrt.messages import Messages
from pcn_deploy.errors import IncompatibleError

_LOG = logging.getLogger(__name__)

# Source: https://docs.nvidia.com/deeplearning/tensorrt-rtx/latest/inference-library/engine-compatibility.html
_DIAGNOSES = {
    "VERSION_MISMATCH": "it was built with another release than {library}, and releases do not share engines",
    "UNSUPPORTED_CC": "it was not built for the compute capability of this device ({device})",
    "OLD_CUDA_DRIVER": "it needs a newer CUDA driver than this machine has",
    "OLD_CUDA_RUNTIME": "it needs a newer CUDA runtime than this machine has",
    "INSUFFICIENT_GPU_MEMORY": "it needs more GPU memory than this device ({device}) has",
    "MALFORMED_ENGINE": "its header is not that of an engine of {library}",
    "CUDA_ERROR": "CUDA reported an error while the engine was looked at",
}

# Which number is whose follows from reports that name the GPU too: github.com/NVIDIA/TensorRT/issues/564.
_COMPUTE = re.compile(r"expecting compute (?P<here>[\d.]+),? got (?:compute )?(?P<there>[\d.]+\d)")
_TAG = re.compile(r"Current Version: (?P<here>\d+), Serialized Engine Version: (?P<there>\d+)")


def plainly(message: str, library: str, device: Device) -> str:
    """One of TensorRT's messages, in words that name the engine's side and this side.

    Args:
        message: What TensorRT logged.
        library: The library at hand, such as `TensorRT 10.3.0`.
        device: The device at hand.

    Returns:
        Plain words, or the message itself where its form is not known.
    """
    if match := _COMPUTE.search(message):
        there, here = match["there"], match["here"]
        return f"the engine was built for compute capability {there}; this device ({device}) has {here}"
    if match := _TAG.search(message):
        return (
            f"the engine was built with another version of TensorRT (its format is number {match['there']}); "
            f"here is {library} (format number {match['here']})"
        )
    return message


def refused(flavour: Flavour, trt: Any, device: Device, reasons: list[str]) -> IncompatibleError:
    """The error for an engine that does not fit, with all reasons and what to do next."""
    library = f"{flavour.title} {version(trt)}"
    why = "; ".join(dict.fromkeys(plainly(reason, library, device) for reason in reasons))
    return IncompatibleError(
        f"The engine does not fit {library} on {device}: {why or 'the library gave no reason'}. "
        "`pcn-compile inspect FILE.pcn` says what it was built with. "
        f"{_next_step(flavour, trt, device.capability)}"
    )


def _next_step(flavour: Flavour, trt: Any, capability: str) -> str:
    """What helps on a device; an RTX build that would not fit it either is not advised."""
    command = "pcn-compile engine FILE.pcn --target"
    if not flavour.ahead_of_time or capability in PORTABLE:
        return f"Rebuild it here with: {command} {flavour.target}"
    if capability in trt.ComputeCapability.__members__:
        return f"Rebuild it with: {command} {flavour.target} --compute-capability {capability}"
    return f"{flavour.title} does not build for {capability}. Build here with: {command} tensorrt"


def check_validity(flavour: Flavour, trt: Any, runtime: Any, data: bytes, device: Device, messages: Messages) -> None:
    """Ask the library whether an engine fits, from its header alone. Only TensorRT-RTX can tell.

    Args:
        flavour: Which flavour.
        trt: The loaded bindings.
        runtime: A runtime of theirs.
        data: The engine.
        device: The device at hand.
        messages: What the library has logged.

    Raises:
        IncompatibleError: If the library says that the engine is not valid here.
    """
    if not hasattr(runtime, "get_engine_validity"):
        return
    verdict, diagnosis = runtime.get_engine_validity(data)
    names = [name for name, bit in trt.EngineInvalidityDiagnostics.__members__.items() if int(diagnosis) & int(bit)]
    library = f"{flavour.title} {version(trt)}"
    reasons = [
        _DIAGNOSES[name].format(library=library, device=device) if name in _DIAGNOSES else name for name in names
    ]
    if verdict == trt.EngineValidity.SUBOPTIMAL:
        _LOG.warning("The engine runs here, but may be slow: %s.", "; ".join(reasons) or "the library gave no reason")
    elif verdict != trt.EngineValidity.VALID:
        raise refused(flavour, trt, device, reasons or messages.of("INTERNAL_ERROR", "ERROR"))
