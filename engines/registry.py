"""Backends by name. Importing this imports none of them."""

from __future__ import annotations

from importlib import import_module

from pcn_deploy.engines.base import Backend
from pcn_deploy.errors import OptionError

_BACKENDS = {
    "cpu": "pcn_deploy.engines.onnxruntime:OnnxRuntimeBackend",
    "torchscript": "pcn_deploy.engines.torchscript:TorchScriptBackend",
    "tensorrt": "pcn_deploy.engines.tensorrt.backend:TensorRTBackend",
    "tensorrt-rtx": "pcn_deploy.engines.tensorrt.backend:TensorRTRTXBackend",
}

TARGETS = tuple(_BACKENDS)
"""Every target name, in the order they are listed to people."""


def get_backend(target: str) -> Backend:
    """Return the backend of a target.

    Args:
        target: One of `TARGETS`.

    Raises:
        OptionError: If the target is unknown.
    """
    if target not in _BACKENDS:
        msg = f"Unknown target {target!r}. Known targets: {', '.join(TARGETS)}."
        raise OptionError(msg)
    module, _, name = _BACKENDS[target].partition(":")
    backend: Backend = getattr(import_module(module), name)()
    return backend
