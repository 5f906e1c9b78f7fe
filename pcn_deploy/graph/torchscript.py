"""Script, freeze and serialise a module."""

from __future__ import annotations

import logging
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from pcn_deploy.graph.exported import as_module, example_shape, export_program
from pcn_deploy.memory import output_error, temporary_path
from pcn_deploy.network.diagnosis.report import difference_error, export_error
from pcn_deploy.specs import BatchRange
from pcn_deploy.tasks.distance import least_sqnr_db

log = logging.getLogger(__name__)


EQUAL_DB = 60.0
"""Least SQNR between a module and what was scripted from it. Both do the same operations, in float32, in the same
order: where they do, they are equal to the bit."""


def to_torchscript(model: nn.Module, images: Tensor, batch: BatchRange | None = None) -> bytes:
    """Script and freeze a module in evaluation mode.

    A definition that TorchScript cannot compile or save, or that computes something else when it is scripted, is
    exported (`torch.export`) first: that runs its Python code, so that what depends on settings and on the height and
    width of the images is decided, and refuses what depends on the values of tensors. What is left scripts.

    Args:
        model: The module; its definition must be scriptable, or one that can be exported.
        images: What the scripted module is compared on with the module itself, float32 `(N, C, H, W)`.
        batch: The batch sizes that an exported module must take; any by default.

    Returns:
        The serialised frozen module, as `torch.jit.save` writes it.

    Raises:
        ModelError: If it is neither, or computes something else when it is exported; the message names the module, the
            line, the cause and the way round.
        OutputError: If there is no room for temporary files.
    """
    batch = batch or BatchRange()
    trials = _trials(images, batch)
    with warnings.catch_warnings(), temporary_path("model.ts") as path:
        for kind in (DeprecationWarning, FutureWarning):  # TorchScript is deprecated; our range of torch is tested
            warnings.simplefilter("ignore", kind)
        warnings.simplefilter("ignore", UserWarning)  # remarks on annotations that it passes over
        try:
            scripted: torch.jit.ScriptModule = torch.jit.script(model)
            _check_equal(model, scripted, trials[:1])
            _write_frozen(scripted, path)
        except Exception as error:  # torch raises many kinds here, OSError and its own among them
            log.info("The definition of the network does not script as it is; it is exported first.", exc_info=error)
            exported = _script_exported(model, images, batch)
            _check_equal(model, exported, trials)
            try:
                _write_frozen(exported, path)
            except RuntimeError as failure:
                raise output_error(path.name, failure) from failure
        return path.read_bytes()


def _trials(images: Tensor, batch: BatchRange) -> list[Tensor]:
    """Batches of two sizes, where several are to work, with other images in them: as they are, mirrored, and none."""
    looks = torch.cat([images, images.flip(3), torch.zeros_like(images[:1])])
    sizes = (batch.min, batch.min + 1) if batch.is_dynamic else (batch.min,)
    return [looks[torch.arange(start, start + size) % len(looks)] for start, size in enumerate(sizes)]


def _check_equal(model: nn.Module, scripted: torch.jit.ScriptModule, trials: list[Tensor]) -> None:
    """Run the network itself and what was scripted: the former is right.

    Raises:
        ModelError: If they differ.
    """
    sqnr_db = min(_sqnr_db(model, scripted, images) for images in trials)
    if sqnr_db < EQUAL_DB:
        raise difference_error(sqnr_db)


def _sqnr_db(model: nn.Module, scripted: torch.jit.ScriptModule, images: Tensor) -> float:
    outputs: list[list[npt.NDArray[np.float32]]] = []
    with torch.no_grad(), torch.jit.optimized_execution(False):  # type: ignore[attr-defined] # slower, for one run
        for form in (model, scripted):
            output = form(images.clone())  # it may write into what it is given
            outputs.append([tensor.numpy() for tensor in ((output,) if isinstance(output, Tensor) else output)])
    return least_sqnr_db(*outputs)


def _write_frozen(scripted: torch.jit.ScriptModule, path: Path) -> None:
    """Freeze and save by way of a file.

    On the way to a buffer, torch copies the weights three times. The scripted module is saved and loaded before it is
    frozen, because torch keeps what it freezes for ever, weights included, unless it comes from a file.

    Raises:
        RuntimeError: If the file has no room, or cannot hold what was scripted, such as a call of Python code.
    """
    torch.jit.save(scripted, path)
    frozen = torch.jit.freeze(torch.jit.load(path))  # type: ignore[no-untyped-call]
    torch.jit.save(frozen, path)


def _script_exported(model: nn.Module, images: Tensor, batch: BatchRange) -> torch.jit.ScriptModule:
    """Script the exported network.

    Raises:
        ModelError: If it cannot be exported.
    """
    _, channels, height, width = images.shape
    example = torch.zeros(example_shape((channels, height, width), batch))
    trace = partial(export_program, model, example, batch)
    try:
        with torch.no_grad():
            scripted: torch.jit.ScriptModule = torch.jit.script(as_module(trace()))
    except Exception as error:  # the network's own code may fail in any way
        raise export_error(model, error, trace) from error
    return scripted
