"""Attention-augmented convolutional networks from checkpoint to a TensorRT engine proven equal to the trained model.

The verbs are `compile`, `load` and `verify`; the command line `pcn-compile` wraps them. Importing this package imports
neither torch, onnx, onnxruntime nor tensorrt; each name is loaded when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pcn_deploy.artefact.bundle import Bundle as Bundle
    from pcn_deploy.artefact.engine import Engine as Engine
    from pcn_deploy.data.images import ImageSource as ImageSource
    from pcn_deploy.data.transform import Transform as Transform
    from pcn_deploy.errors import PcnDeployError as PcnDeployError
    from pcn_deploy.models.libraries import configured_transform as configured_transform
    from pcn_deploy.models.registry import create_model as create_model
    from pcn_deploy.models.registry import list_models as list_models
    from pcn_deploy.specs import BatchRange as BatchRange
    from pcn_deploy.tasks.limits import ParityBudget as ParityBudget
    from pcn_deploy.tasks.report import ParityReport as ParityReport
    from pcn_deploy.verbs.build import CompileResult as CompileResult
    from pcn_deploy.verbs.build import compile as compile  # noqa: A004 - the verb's public name
    from pcn_deploy.verbs.load import load as load
    from pcn_deploy.verbs.options import CompileOptions as CompileOptions
    from pcn_deploy.verbs.verify import verify as verify

_HOMES = {
    "BatchRange": "specs",
    "Bundle": "artefact.bundle",
    "CompileOptions": "verbs.options",
    "CompileResult": "verbs.build",
    "Engine": "artefact.engine",
    "ImageSource": "data.images",
    "ParityBudget": "tasks.limits",
    "ParityReport": "tasks.report",
    "PcnDeployError": "errors",
    "Transform": "data.transform",
    "compile": "verbs.build",
    "configured_transform": "models.libraries",
    "create_model": "models.registry",
    "list_models": "models.registry",
    "load": "verbs.load",
    "verify": "verbs.verify",
}

__all__ = sorted(_HOMES)
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        msg = f"module 'pcn_deploy' has no attribute {name!r}"
        raise AttributeError(msg)
    value = getattr(import_module(f"pcn_deploy.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
