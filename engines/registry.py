"""Backends by name. Importing this imports none of them."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import import_module

from pcn_deploy.engines.base import Backend, BackendOptions
from pcn_deploy.errors import OptionError

_BACKENDS = {
    "cpu": "pcn_deploy.engines.onnxruntime:OnnxRuntimeBackend",
    "torchscript": "pcn_deploy.engines.torchscript:TorchScriptBackend",
    "tensorrt": "pcn_deploy.engines.tensorrt.backend:TensorRTBackend",
    "tensorrt-rtx": "pcn_deploy.engines.tensorrt.backend:TensorRTRTXBackend",
}

TARGETS = tuple(_BACKENDS)
"""Every target name, in the order they are listed to people."""


def get_backend(target: str, options: BackendOptions | None = None) -> Backend:
    """Return the backend of a target.

    Args:
        target: One of `TARGETS`.
        options: How it builds engines.

    Raises:
        OptionError: If the target is unknown.
    """
    if target not in _BACKENDS:
        msg = f"Unknown target {target!r}. Known targets: {', '.join(TARGETS)}."
        raise OptionError(msg)
    module, _, name = _BACKENDS[target].partition(":")
    backend: Backend = getattr(import_module(module), name)()
    return backend if options is None else backend.configured(options)


def fastest_first(targets: Iterable[str]) -> list[str]:
    """Targets in the order of their rank."""
    return sorted(targets, key=lambda target: get_backend(target).rank)


def check_options(targets: Iterable[str], options: BackendOptions) -> None:
    """Check that each setting that is asked for is one that some target has.

    Raises:
        OptionError: If one is not; the message names the targets that have it.
    """
    taken = {name for target in targets for name in get_backend(target).settings}
    for name in options.asked:
        if name not in taken:
            able = [target for target in TARGETS if name in get_backend(target).settings]
            msg = f"{name} is a setting of {' and '.join(able)}; asked for are engines for {', '.join(targets)}."
            raise OptionError(msg)
