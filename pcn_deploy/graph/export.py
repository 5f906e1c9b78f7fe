"""Export a module to one ONNX graph: named input and outputs, optional dynamic batch, INT8 weights stored as INT8."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.passes.common import ClearMetadataAndDocStringPass
from torch import Tensor, nn

from pcn_deploy.errors import ModelError
from pcn_deploy.progress import Progress, silent
from pcn_deploy.specs import BATCH_AXIS, BatchRange, EngineSpec, TensorSpec

OPSET = 20
"""First opset with native Gelu; LayerNormalization is native since 17."""

INPUT_NAME = "images"
OUTPUT_NAME = "logits"


def to_onnx(
    model: nn.Module,
    image_shape: tuple[int, int, int],
    batch: BatchRange,
    weight_scales: dict[str, Tensor],
    progress: Progress = silent,
) -> ir.Model:
    """Export a module in evaluation mode.

    Args:
        model: The quantised module, or the deploy form.
        image_shape: Shape of one input image, `(C, H, W)`.
        batch: The batch sizes the graph must take; the batch axis is symbolic if it is a true range.
        weight_scales: Per quantised weight tensor its scales, as `quantized.quantized_weights` returns them.
        progress: Told the stages done.

    Returns:
        The graph, float32 apart from Q/DQ.

    Raises:
        ModelError: If the module cannot be exported, with the exporter's words.
    """
    example = torch.zeros((batch.min if not batch.is_dynamic else 2, *image_shape))
    axes = {0: torch.export.Dim(BATCH_AXIS, min=1, max=max(batch.max, 2))}
    progress("Exporting to ONNX", 0, 3)
    with _quiet_exporter(), torch.no_grad():
        try:
            exported = torch.export.export(
                model, (example,), strict=False, dynamic_shapes=(axes,) if batch.is_dynamic else None
            )
            progress("Exporting to ONNX", 1, 3)
            program = torch.onnx.export(
                exported,
                dynamo=True,
                opset_version=OPSET,
                input_names=[INPUT_NAME],
                output_names=[OUTPUT_NAME],
                optimize=False,
                verbose=False,
            )
        except Exception as error:  # the exporter wraps whatever the network's code raises
            msg = f"The network cannot be exported to ONNX:\n{_first_lines(error)}"
            raise ModelError(msg) from error
    if program is None:
        msg = "torch.onnx.export returned nothing for this network."
        raise ModelError(msg)
    graph_model = program.model
    progress("Exporting to ONNX", 2, 3)
    store_int8_weights(graph_model, weight_scales)  # before optimising: it folds transpositions into float weights
    program.optimize()
    ClearMetadataAndDocStringPass()(graph_model)
    progress("Exporting to ONNX", 3, 3)
    return graph_model


def serialise(model: ir.Model) -> bytes:
    """Serialise a graph with its weights inside.

    Raises:
        ModelError: If it exceeds the 2 GiB that one ONNX file may hold.
    """
    try:
        return ir.to_proto(model).SerializeToString()
    except ValueError as error:
        msg = f"The ONNX graph does not fit into one file: {error}. Build it with --precision fp16 or int8."
        raise ModelError(msg) from error


def store_int8_weights(model: ir.Model, scales: dict[str, Tensor]) -> None:
    """Replace quantised float weights by INT8 initialisers and DequantizeLinear along the output channels.

    A Transpose between a weight and its reader is applied to the codes, so that DequantizeLinear is the last step.

    Raises:
        ModelError: If a quantised weight is not found in the graph under its name.
    """
    graph = model.graph
    for name, scale in scales.items():
        weight = graph.initializers.get(name)
        if weight is None or weight.const_value is None:
            msg = f"The exporter lost the quantised weight {name}; the graph would not be INT8."
            raise ModelError(msg)
        values, step = weight.const_value.numpy(), scale.numpy()
        codes = np.rint(values / step.reshape(-1, *[1] * (values.ndim - 1))).astype(np.int8)
        axis, replaced = 0, weight
        reader = next(iter(weight.uses())).node
        if reader.op_type == "Transpose" and len(weight.uses()) == 1:
            order = list(reader.attributes["perm"].as_ints())
            codes, axis, replaced = np.ascontiguousarray(codes.transpose(order)), order.index(0), reader.outputs[0]
        stored = [
            _initializer(graph, f"{name}.int8", codes),
            _initializer(graph, f"{name}.scale", step),
            _initializer(graph, f"{name}.zero_point", np.zeros(step.shape, np.int8)),
        ]
        node = ir.node("DequantizeLinear", stored, attributes={"axis": axis}, name=f"{name}.dequantize")
        node.outputs[0].shape, node.outputs[0].type = ir.Shape(codes.shape), weight.type
        graph.insert_before(reader, node)
        ir.convenience.replace_all_uses_with(replaced, node.outputs[0])
        if replaced is not weight:
            graph.remove(reader, safe=True)
        del graph.initializers[name]


def _initializer(graph: ir.Graph, name: str, array: np.ndarray[Any, Any]) -> ir.Value:
    tensor = ir.tensor(array, name=name)
    value = ir.Value(name=name, const_value=tensor, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype))
    graph.register_initializer(value)
    return value


def engine_spec(model: ir.Model, batch: BatchRange) -> EngineSpec:
    """Read the interface of an exported graph."""
    return EngineSpec(
        inputs=tuple(_spec(value, batch) for value in model.graph.inputs),
        outputs=tuple(_spec(value, batch) for value in model.graph.outputs),
        batch=batch,
    )


def _spec(value: ir.Value, batch: BatchRange) -> TensorSpec:
    if value.shape is None or value.dtype is None or value.name is None:
        msg = f"The exporter left {value.name!r} without a shape or type."
        raise ModelError(msg)
    dims = [BATCH_AXIS if not isinstance(dim, int) else dim for dim in value.shape]
    return TensorSpec(name=value.name, dtype=value.dtype.numpy().name, shape=tuple(dims))


def _first_lines(error: BaseException, count: int = 12) -> str:
    """The root cause, shortened."""
    while error.__cause__ is not None:
        error = error.__cause__
    return "\n".join(f"{type(error).__name__}: {error}".splitlines()[:count])


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Silence the exporter's own notes and give torch the one shape function it lacks."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    library = torch.library.Library("aten", "IMPL", "Meta")
    operator = "fake_quantize_per_tensor_affine_cachemask"
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{operator}", "Meta"):
        # torch (2.13) cannot export fake quantisation with a symbolic batch: the operator has no Meta kernel.
        library.impl(operator, _fake_quantize_shape)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        library._destroy()


def _fake_quantize_shape(
    x: Tensor, _scale: float, _zero_point: int, _qmin: int, _qmax: int
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(x, dtype=torch.bool)
