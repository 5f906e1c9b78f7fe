"""Finding and loading the bindings of a flavour."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from pcn_deploy.engines.tensorrt.flavour import Flavour
from pcn_deploy.errors import DependencyError


@cache
def load(flavour: Flavour) -> Any:
    """Load the Python bindings of a flavour. A success is remembered, a failure is tried again.

    Args:
        flavour: Which of the two.

    Returns:
        The module, with the interface of `tensorrt`.

    Raises:
        DependencyError: If it is not installed, or a shared library behind it does not load.
    """
    try:
        if find_spec(flavour.module) is not None:
            return import_module(flavour.module)
    except Exception as error:  # a broken install raises what it likes, and the caller needs the reason
        msg = f"{flavour.title} is missing: package {flavour.module} does not load ({error})"
        raise DependencyError(msg) from error
    msg = f"{flavour.title} is missing: package {flavour.module} is not installed"
    raise DependencyError(msg)


def version(trt: Any) -> str:
    """Version of loaded bindings, such as `10.3.0`."""
    return str(getattr(trt, "__version__", "of unknown version"))
