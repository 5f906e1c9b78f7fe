"""Export a module to one ONNX graph: named input and outputs, optional dynamic batch, INT8 weights stored as INT8."""

from __future__ import annotations

import ast
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.passes.common import ClearMetadataAndDocStringPass
from torch import Tensor, nn

from pcn_deploy.calibration.quantized import Quantization
from pcn_deploy.errors import ModelError
from pcn_deploy.graph.exported import example_shape, export_program
from pcn_deploy.graph.names import name_by_module
from pcn_deploy.graph.optimise import fold_shapes, simplify_exactly
from pcn_deploy.graph.qdq import insert_qdq
from pcn_deploy.graph.repeat import SCOPES, Run, find_runs, keep_first, unroll
from pcn_deploy.graph.stable import translations
from pcn_deploy.network.diagnosis.places import place_of_module
from pcn_deploy.network.diagnosis.report import export_error, obstacle, running_error
from pcn_deploy.network.preconditions import HEADLINE
from pcn_deploy.progress import Progress, silent
from pcn_deploy.specs import BATCH_AXIS, IMAGE, BatchRange, EngineSpec, OutputSpec, TensorSpec, usual_role
from pcn_deploy.tasks.roles import get_role

log = logging.getLogger(__name__)

OPSET = 20
"""First opset with native Gelu; LayerNormalization is native since 17."""

_IMAGE_AXES = ("batch", "channel", "height", "width")
INPUT_NAME = "images"


@dataclass(frozen=True, kw_only=True)
class Exported:
    """A network and the float graph made of it: its blocks are unrolled, the exporter's notes are on its nodes."""

    model: nn.Module
    graph: ir.Model


def export_network(
    model: nn.Module,
    image_shape: tuple[int, int, int],
    batch: BatchRange,
    *,
    outputs: tuple[OutputSpec, ...] = (OutputSpec(),),
) -> Exported:
    """Export a module in evaluation mode, in float32.

    Args:
        model: The deploy form.
        image_shape: Shape of one input image, `(C, H, W)`.
        batch: The batch sizes the graph must take; the batch axis is symbolic if it is a true range.
        outputs: What the module returns, in order.

    Raises:
        ModelError: If the module cannot be exported, with the exporter's words.
    """
    example = torch.zeros(example_shape(image_shape, batch))
    with _quiet_exporter(), torch.no_grad():
        program = _export_unrolled(model, example, batch, _runs(model, example), outputs)
        _check_deterministic(model, program.model.graph)
        _separate_outputs(program.model.graph, outputs)
    return Exported(model=model, graph=program.model)


def to_onnx(
    model: nn.Module,
    image_shape: tuple[int, int, int],
    batch: BatchRange,
    quantized: dict[str, Quantization],
    progress: Progress = silent,
    *,
    outputs: tuple[OutputSpec, ...] = (OutputSpec(),),
    exported: Exported | None = None,
) -> ir.Model:
    """Make the graph of a module in evaluation mode.

    Args:
        model: The deploy form.
        image_shape: Shape of one input image, `(C, H, W)`.
        batch: The batch sizes the graph must take; the batch axis is symbolic if it is a true range.
        quantized: Scales of the layers to quantise, by name; empty for a float graph.
        progress: Told the stages done.
        outputs: What the module returns, in order.
        exported: What `export_network` made, to be changed in place; used if it was made of this very module.

    Returns:
        The graph, float32 apart from Q/DQ, with the exporter's notes on its nodes.

    Raises:
        ModelError: If the module cannot be exported, with the exporter's words.
    """
    step = "Exporting to ONNX"
    progress(step, 0, 3)
    if exported is None or exported.model is not model:
        exported = export_network(model, image_shape, batch, outputs=outputs)
    graph = exported.graph
    with _quiet_exporter(), torch.no_grad():
        progress(step, 1, 3)
        insert_qdq(graph.graph, quantized)
        progress(step, 2, 3)
        simplify_exactly(graph)  # last: it merges equal weights, whose names then no longer tell the layers apart
        _separate_outputs(graph.graph, outputs)
        name_by_module(graph.graph)
    progress(step, 3, 3)
    return graph


def _separate_outputs(graph: ir.Graph, outputs: tuple[OutputSpec, ...]) -> None:
    """Give every output a value and its name: what computes the same was merged, and blocks were copied with theirs."""
    for index, output in enumerate(outputs):
        value = graph.outputs[index]
        if any(value is other for other in graph.outputs[:index]):
            copied = ir.node("Identity", [value], name=f"{output.name}.identity")
            graph.append(copied)
            copied.outputs[0].type, copied.outputs[0].shape = value.type, value.shape
            graph.outputs[index] = value = copied.outputs[0]
        for other in [made for node in graph for made in node.outputs if made.name == output.name]:
            other.name = f"{output.name}.inner"  # of the first block, where the last of a run of them is the output
        value.name = output.name


def _runs(model: nn.Module, example: Tensor) -> list[Run]:
    """The runs of equal blocks; looking for them may be the first time that the network sees several images."""
    try:
        return find_runs(model, example)
    except Exception as error:  # the network's own code may fail in any way
        headline = f"The network cannot run on a batch of {len(example)}, shape {tuple(example.shape)}"
        raise running_error(model, error, headline) from error


def _export_unrolled(
    model: nn.Module, example: Tensor, batch: BatchRange, runs: list[Run], outputs: tuple[OutputSpec, ...]
) -> Any:
    """Export one block of each run and unroll; the whole network where its blocks cannot be repeated."""
    program = _export(keep_first(model, runs), example, batch, outputs)
    fold_shapes(program.model)
    try:
        for run in runs:
            unroll(program.model.graph, model, run)
    except ModelError as error:
        log.debug("Every block is exported on its own: %s", error)
        return _export_unrolled(model, example, batch, [], outputs)
    return program


def _check_deterministic(model: nn.Module, graph: ir.Graph) -> None:
    """Refuse a graph that draws random numbers; rare ones do not show when a network is run a few times."""
    for node in graph:
        if node.op_type.startswith("Random") or node.op_type in {"Bernoulli", "Multinomial"}:
            modules = dict(model.named_modules())
            scopes = [path for path in ast.literal_eval(node.metadata_props.get(SCOPES, "[]")) if path in modules]
            place = place_of_module(scopes[-1], modules[scopes[-1]]) if scopes else None
            reason = f"forward draws random numbers in evaluation too (the graph has a {node.op_type})."
            raise obstacle(HEADLINE, place, reason, "draw them only if self.training.")


def _export(model: nn.Module, example: Tensor, batch: BatchRange, outputs: tuple[OutputSpec, ...]) -> Any:
    trace = partial(export_program, model, example, batch)
    try:
        return torch.onnx.export(
            trace(),
            dynamo=True,
            opset_version=OPSET,
            input_names=[INPUT_NAME],
            output_names=[output.name for output in outputs],
            optimize=False,
            verbose=False,
            custom_translation_table=translations(),
        )
    except Exception as error:  # the exporter wraps whatever the network's code raises
        raise export_error(model, error, trace) from error


def serialise(model: ir.Model) -> bytes:
    """Serialise a graph with its weights inside, without the exporter's notes.

    Raises:
        ModelError: If it exceeds the 2 GiB that one ONNX file may hold.
    """
    ClearMetadataAndDocStringPass()(model)
    try:
        data: bytes = ir.to_proto(model).SerializeToString()
    except ValueError as error:
        held = [value.const_value for value in model.graph.initializers.values() if value.const_value is not None]
        wide = sum(tensor.nbytes for tensor in held if tensor.dtype == ir.DataType.FLOAT)
        smaller = "Build it with --precision fp16 or int8." if 2 * wide > sum(tensor.nbytes for tensor in held) else ""
        msg = f"The ONNX graph does not fit into one file: {error}. {smaller or 'Its weights are not FP32 any more.'}"
        raise ModelError(msg) from error
    return data


def release_weights(model: ir.Model) -> None:
    """Let go of the weights of a graph that is no longer needed: the optimiser's rules keep the last graph they saw."""
    for value in model.graph.initializers.values():
        value.const_value = None


def engine_spec(model: ir.Model, batch: BatchRange, outputs: tuple[OutputSpec, ...] = ()) -> EngineSpec:
    """Read the interface of an exported graph.

    Args:
        model: The graph.
        batch: The batch sizes it takes.
        outputs: What its outputs mean, in order; by default what their names say.
    """
    roles = [output.role for output in outputs] or [usual_role(str(value.name)) for value in model.graph.outputs]
    return EngineSpec(
        inputs=tuple(_spec(value, IMAGE, _IMAGE_AXES) for value in model.graph.inputs),
        outputs=tuple(
            _spec(value, role, get_role(role).axes) for value, role in zip(model.graph.outputs, roles, strict=True)
        ),
        batch=batch,
    )


def _spec(value: ir.Value, role: str, axes: tuple[str, ...]) -> TensorSpec:
    if value.shape is None or value.dtype is None or value.name is None:
        msg = f"The exporter left {value.name!r} without a shape or type."
        raise ModelError(msg)
    dims = [BATCH_AXIS if not isinstance(dim, int) else dim for dim in value.shape]
    dtype = value.dtype.numpy().name
    return TensorSpec(name=value.name, dtype=dtype, shape=tuple(dims), role=role, axes=axes)


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Silence the exporter's own notes."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.fx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
