"""How a missing library is installed on this machine: one rule for every message. Standard library only.

The rule, the first that applies:

1. On a Jetson TensorRT comes with JetPack, so it is installed with apt; TensorRT-RTX is not made for it.
2. Where pcn-deploy itself was installed by its name from a package index, `pip install 'pcn-deploy[extra]'`.
3. Elsewhere, as in a checkout, that name may install nothing, or what is not ours: libraries have their own names.
"""

from __future__ import annotations

import platform
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

LIBRARIES: dict[str, tuple[str, ...]] = {
    "compile": (
        *("torch>=2.9,<2.16", "onnx", "onnx-ir", "onnxscript", "onnxruntime", "pillow", "safetensors"),
        *(() if sys.version_info >= (3, 11) else ("tomli",)),
    ),
    "runtime": ("onnxruntime", "pillow"),
    "tensorrt": ("tensorrt>=10.3",),
    "tensorrt-rtx": ("tensorrt-rtx-cu13==1.7.1.*", "nvidia-cuda-runtime>=13,<14"),
    "plot": ("matplotlib",),
}
"""What each extra of `pyproject.toml` installs; bounds only where the newest release would be wrong."""

TEGRA_RELEASE = Path("/etc/nv_tegra_release")
"""A file that every Jetson Linux has. Source: NVIDIA's Jetson Linux developer guide."""

_ON_A_JETSON = {
    "tensorrt": "Install it: sudo apt-get install python3-libnvinfer. A virtual environment sees it if it was made by "
    "the system's Python with --system-site-packages",
    "tensorrt-rtx": "There is no TensorRT-RTX for Jetson: take target tensorrt",
}


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What decides how something is installed.

    Attributes:
        jetson: Whether it is a Jetson.
        from_index: Whether this distribution was installed by its name, so that the name installs it again.
    """

    jetson: bool = False
    from_index: bool = False

    @classmethod
    def here(cls) -> Machine:
        """This machine."""
        tegra = TEGRA_RELEASE.exists() or "tegra" in platform.release()
        return cls(jetson=platform.machine() == "aarch64" and tegra, from_index=_from_index())


def _from_index() -> bool:
    """Whether pip installed this distribution by its name: from a path or an address it notes which (PEP 610)."""
    from importlib.metadata import PackageNotFoundError, distribution  # slow to load, and rarely needed

    try:
        installed = distribution("pcn-deploy")
    except PackageNotFoundError:
        return False
    return installed.read_text("INSTALLER") is not None and installed.read_text("direct_url.json") is None


def install(extra: str, *, only: tuple[str, ...] = (), again: bool = False, machine: Machine | None = None) -> str:
    """What to type so that a library is there, as a sentence without its full stop.

    Args:
        extra: The extra of this distribution that holds it: a key of `LIBRARIES`.
        only: These libraries of the extra; by default all.
        again: It is there but broken: install it anew.
        machine: Where; by default here.

    Returns:
        Such as `Install it: pip install matplotlib`.
    """
    machine = machine or Machine.here()
    if machine.jetson and extra in _ON_A_JETSON:
        return _ON_A_JETSON[extra]
    names = [name for name in LIBRARIES[extra] if not only or _project(name) in only]
    wanted = [f"pcn-deploy[{extra}]"] if machine.from_index and not only else names
    line = " ".join(shlex.quote(name) for name in wanted)
    return f"Install it again: pip install --force-reinstall {line}" if again else f"Install it: pip install {line}"


def _project(requirement: str) -> str:
    """The name in a requirement."""
    return requirement.partition(">")[0].partition("=")[0]
