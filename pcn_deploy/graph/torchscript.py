"""Script, freeze and serialise a module."""

from __future__ import annotations

import io
import warnings

import torch
from torch import nn

from pcn_deploy.errors import ModelError


def to_torchscript(model: nn.Module) -> bytes:
    """Script and freeze a module in evaluation mode.

    Args:
        model: The module; its definition must be scriptable.

    Returns:
        The serialised frozen module, as `torch.jit.save` writes it.

    Raises:
        ModelError: If it cannot be scripted; the compiler's words name the place.
    """
    with warnings.catch_warnings():  # upstream deprecates TorchScript; our range of torch is bounded for that
        warnings.simplefilter("ignore", DeprecationWarning)
        try:
            frozen = torch.jit.freeze(torch.jit.script(model))
        except (
            RuntimeError,
            ValueError,
            TypeError,
            AttributeError,
            torch.jit.frontend.FrontendError,
        ) as error:
            msg = f"The network cannot be scripted:\n{error}\nRewrite the part shown, or annotate its types."
            raise ModelError(msg) from error
        buffer = io.BytesIO()
        torch.jit.save(frozen, buffer)
    return buffer.getvalue()
