"""Script, freeze and serialise a module."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from pcn_deploy.errors import ModelError
from pcn_deploy.graph.diagnosis import difference_error, report, running_error, scripting_error
from pcn_deploy.graph.symbolic import trace
from pcn_deploy.memory import output_error, temporary_path
from pcn_deploy.parity import least_sqnr_db

log = logging.getLogger(__name__)


EQUAL_DB = 60.0
"""Least SQNR between a module and what was scripted from it. Both do the same operations, in float32, in the same
order: where they do, they are equal to the bit."""


def to_torchscript(model: nn.Module, images: Tensor) -> bytes:
    """Script and freeze a module in evaluation mode.

    A definition that TorchScript cannot compile is traced symbolically first: that runs its Python code, so that what
    depends on settings and on the height and width of the images is decided, and refuses what depends on the values of
    tensors. What is left scripts.

    Args:
        model: The module; its definition must be scriptable, or traceable by `torch.fx`.
        images: What the scripted module is compared on with the module itself, float32 `(N, C, H, W)`.

    Returns:
        The serialised frozen module, as `torch.jit.save` writes it.

    Raises:
        ModelError: If it is neither, or computes something else when it is scripted; the message names the module, the
            line, the cause and the way round.
        OutputError: If there is no room for temporary files.
    """
    with warnings.catch_warnings(), temporary_path("model.ts") as path:
        # upstream deprecates TorchScript; our range of torch is bounded for that
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", UserWarning)  # remarks on annotations that it passes over
        scripted = _script(model, images)
        _save(scripted, path)
        del scripted
        try:
            frozen = torch.jit.freeze(torch.jit.load(path))  # type: ignore[no-untyped-call]
        except RuntimeError as error:
            raise running_error(model, error, "The scripted network cannot be frozen") from error
        _save(frozen, path)
        return path.read_bytes()


def _least_sqnr_db(model: nn.Module, scripted: torch.jit.ScriptModule, images: Tensor) -> float:
    """SQNR of the outputs of the scripted module; those of the module itself are what is right."""
    outputs: list[list[npt.NDArray[np.float32]]] = []
    with torch.no_grad():
        for form in (model, scripted):
            found = form(images.clone())  # it may write into what it is given
            outputs.append([tensor.numpy() for tensor in ((found,) if isinstance(found, Tensor) else found)])
    return least_sqnr_db(*outputs)


def _save(module: torch.jit.ScriptModule, path: Path) -> None:
    """Save by way of a file: on the way to a buffer, torch copies the weights three times.

    The scripted module is saved and loaded before it is frozen, because torch keeps what it freezes for ever, weights
    included, unless it comes from a file.
    """
    try:
        torch.jit.save(module, path)
    except RuntimeError as error:
        if "Could not export" in str(error):  # what scripting lets through and a file cannot hold
            raise ModelError(report("The scripted network cannot be saved", error, None)) from error
        raise output_error(path.name, error) from error


def _script(model: nn.Module, images: Tensor) -> torch.jit.ScriptModule:
    """Script the definition, else its symbolic trace: the first that computes what the module computes."""
    refusal: Exception | None = None
    found = EQUAL_DB
    try:
        scripted: torch.jit.ScriptModule = torch.jit.script(model)
        found = _least_sqnr_db(model, scripted, images)
        if found >= EQUAL_DB:
            return scripted
    except Exception as error:  # torch raises many kinds here, OSError and its own among them
        refusal = error
    try:
        traced: torch.jit.ScriptModule = torch.jit.script(trace(model, _image_shape(images)).eval())
        found_traced = _least_sqnr_db(model, traced, images)
    except Exception as error:  # whatever the network's code does with a symbol instead of a tensor
        if refusal is None:
            raise difference_error(model, found, None) from error
        raise scripting_error(model, refusal, error) from refusal
    if found_traced < EQUAL_DB:
        raise difference_error(model, found_traced, refusal)
    log.info("The definition of the network does not script as it is, its symbolic trace does.")
    return traced


def _image_shape(images: Tensor) -> tuple[int, int, int]:
    return images.shape[1], images.shape[2], images.shape[3]
