"""Script, freeze and serialise a module."""

from __future__ import annotations

import io
import logging
import warnings

import torch
from torch import Tensor, fx, nn

from pcn_deploy.graph.diagnosis import scripting_error

log = logging.getLogger(__name__)


def to_torchscript(model: nn.Module) -> bytes:
    """Script and freeze a module in evaluation mode.

    A definition that TorchScript cannot compile is traced symbolically first: that runs its Python code, so that what
    depends on settings alone is decided, and refuses what depends on the values of tensors. What is left scripts.

    Args:
        model: The module; its definition must be scriptable, or traceable by `torch.fx`.

    Returns:
        The serialised frozen module, as `torch.jit.save` writes it.

    Raises:
        ModelError: If it is neither; the message names the module, the line, the cause and the way round.
    """
    with warnings.catch_warnings():  # upstream deprecates TorchScript; our range of torch is bounded for that
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", UserWarning)  # remarks on annotations that it passes over
        refusal: Exception | None = None
        try:
            frozen = torch.jit.freeze(torch.jit.script(model))
        except Exception as error:  # torch raises many kinds here, OSError and its own among them
            refusal = error
        if refusal is not None:
            frozen = _script_traced(model, refusal)
        buffer = io.BytesIO()
        torch.jit.save(frozen, buffer)
    return buffer.getvalue()


class _ImageOnly(nn.Module):
    """A network called with the image alone, so that its other arguments have their defaults while it is traced."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.net(x)
        return y


def _script_traced(model: nn.Module, refusal: Exception) -> torch.jit.ScriptModule:
    """Script the symbolic trace of a module whose definition was refused."""
    try:
        traced = fx.symbolic_trace(_ImageOnly(model).eval()).eval()
        for node in traced.graph.nodes:
            node.type = None  # annotations kept as text, which would not compile
        traced.recompile()
        frozen: torch.jit.ScriptModule = torch.jit.freeze(torch.jit.script(traced))
    except Exception as error:  # whatever the network's code does with a symbol instead of a tensor
        raise scripting_error(model, refusal, error) from refusal
    log.info("The definition of the network does not script, its symbolic trace does.")
    return frozen
