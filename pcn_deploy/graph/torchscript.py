"""Script, freeze and serialise a module."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

import torch
from torch import Tensor, fx, nn

from pcn_deploy.graph.diagnosis import scripting_error
from pcn_deploy.memory import output_error, temporary_path

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
        OutputError: If there is no room for temporary files.
    """
    with warnings.catch_warnings(), temporary_path("model.ts") as path:
        # upstream deprecates TorchScript; our range of torch is bounded for that
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", UserWarning)  # remarks on annotations that it passes over
        refusal: Exception | None = None
        try:
            scripted: torch.jit.ScriptModule = torch.jit.script(model)
        except Exception as error:  # torch raises many kinds here, OSError and its own among them
            refusal = error
        if refusal is not None:
            scripted = _script_traced(model, refusal)
        _save(scripted, path)
        del scripted
        _save(torch.jit.freeze(torch.jit.load(path)), path)  # type: ignore[no-untyped-call]
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
        scripted: torch.jit.ScriptModule = torch.jit.script(traced)
    except Exception as error:  # whatever the network's code does with a symbol instead of a tensor
        raise scripting_error(model, refusal, error) from refusal
    log.info("The definition of the network does not script, its symbolic trace does.")
    return scripted
