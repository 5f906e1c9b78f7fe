"""The verb `doctor`: what this machine can build and run, and what would mend the rest. Standard library only."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from pcn_deploy.engines.base import Availability
from pcn_deploy.engines.registry import TARGETS, get_backend
from pcn_deploy.remedies import install

PACKAGES = {
    "numpy": "the runtime",
    "torch": "building bundles",
    "onnx": "building bundles",
    "onnxscript": "building bundles",
    "onnx-ir": "building bundles",
    "onnxruntime": "target cpu",
    "pillow": "reading images",
    "safetensors": "reading .safetensors weights",
}


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """What was found.

    Attributes:
        system: Operating system, processor and Python.
        packages: Version of each package that matters, or None where it is missing.
        targets: What each target can do here.
    """

    system: str
    packages: dict[str, str | None]
    targets: dict[str, Availability]

    @property
    def can_compile(self) -> bool:
        """Whether a bundle can be built from a checkpoint here."""
        return all(self.packages[name] for name, use in PACKAGES.items() if use == "building bundles")

    @property
    def to_compile(self) -> str:
        """What to type where that cannot be done."""
        return install("compile")


def diagnose() -> Diagnosis:
    """Look at this machine; nothing is changed and no GPU context is made."""
    return Diagnosis(
        system=f"{platform.platform()}, {platform.machine()}, Python {platform.python_version()}",
        packages={name: _version(name) for name in PACKAGES},
        targets={target: get_backend(target).availability() for target in TARGETS},
    )


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
