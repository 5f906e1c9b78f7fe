"""Finding and loading the bindings of a flavour, and the shared libraries behind them."""

from __future__ import annotations

import ctypes
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pcn_deploy.engines.tensorrt.flavour import Flavour
from pcn_deploy.errors import DependencyError


def package_folders(package: str) -> list[Path]:
    """Folders of an installed package, found without importing it; none if it is missing."""
    try:
        spec = find_spec(package)
    except (ImportError, ValueError):
        return []
    return [Path(place) for place in (spec.submodule_search_locations or ())] if spec else []


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
    reasons = []
    for name in flavour.modules:
        try:
            if find_spec(name) is None:
                reasons.append(f"package {name} is not installed")
                continue
            if name == flavour.modules[-1]:
                _preload(flavour)
            return import_module(name)
        except Exception as error:  # a broken install raises what it likes, and the caller needs the reason
            reasons.append(f"package {name} does not load ({error})")
    msg = f"{flavour.title} is missing: {'; '.join(reasons)}"
    raise DependencyError(msg)


def _preload(flavour: Flavour) -> None:
    """Load the shared libraries that another package carries; bindings find them by their soname."""
    folders = package_folders(flavour.library_package) if flavour.library_package else []
    for prefix in flavour.library_prefixes:
        found = sorted(path for folder in folders for path in folder.glob(f"{prefix}*"))
        for path in found[:1]:
            ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL)


def version(trt: Any) -> str:
    """Version of loaded bindings, such as `10.3.0`."""
    return str(getattr(trt, "__version__", "of unknown version"))
