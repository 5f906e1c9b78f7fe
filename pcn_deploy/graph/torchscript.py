"""Script, freeze and serialise a module."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from torch import nn

from pcn_deploy.errors import ModelError
from pcn_deploy.memory import output_error, temporary_path


def to_torchscript(model: nn.Module) -> bytes:
    """Script and freeze a module in evaluation mode.

    Args:
        model: The module; its definition must be scriptable.

    Returns:
        The serialised frozen module, as `torch.jit.save` writes it.

    Raises:
        ModelError: If it cannot be scripted; the compiler's words name the place.
        OutputError: If there is no room for temporary files.
    """
    with warnings.catch_warnings(), temporary_path("model.ts") as path:
        # upstream deprecates TorchScript; our range of torch is bounded for that
        warnings.simplefilter("ignore", DeprecationWarning)
        try:
            _save(torch.jit.script(model), path)
            frozen = torch.jit.freeze(torch.jit.load(path))  # type: ignore[no-untyped-call]
        except (
            RuntimeError,
            ValueError,
            TypeError,
            AttributeError,
            torch.jit.frontend.FrontendError,
        ) as error:
            msg = f"The network cannot be scripted:\n{error}\nRewrite the part shown, or annotate its types."
            raise ModelError(msg) from error
        _save(frozen, path)
        return path.read_bytes()


def _save(module: torch.jit.ScriptModule, path: Path) -> None:
    """Save by way of a file: on the way to a buffer, torch copies the weights three times.

    The scripted module is saved and loaded before it is frozen, because torch keeps what it freezes for ever, weights
    included, unless it comes from a file.
    """
    try:
        torch.jit.save(module, path)
    except RuntimeError as error:
        raise output_error(path.name, error) from error
