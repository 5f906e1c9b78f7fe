"""How large the tensors of an exported graph become on a few images, and which nodes FP16 cannot compute for that."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
from onnx import helper

from pcn_deploy.calibration.plan.half import LARGEST, MARGIN, SMALLEST_STEP, WORST_ERROR
from pcn_deploy.graph.delicate import MOVES, follow
from pcn_deploy.memory import large_blocks_returned

_INSIDE = 1024
"""Numbers of an initialiser that are written into the graph; larger ones are handed over without a copy."""

_QDQ = frozenset({"QuantizeLinear", "DequantizeLinear"})
_SHRINKING = MOVES | _QDQ | {"Relu", "MaxPool", "Where", "Cast", "Clip", "Abs", "Neg"}
"""What they make is no larger than what they read."""

_UNOBSERVED = _SHRINKING | {"Sigmoid", "Softmax", "Tanh", "Erf", "HardSigmoid"}
"""Those, and what makes nothing larger than 1: constants are judged by `graph/delicate.py`."""


def observe_graph(model: ir.Model, images: npt.NDArray[np.float32]) -> dict[ir.Value, float]:
    """Run images through a float32 graph and note the largest finite magnitude of every tensor that it computes.

    Each is reduced to its least and greatest value inside the graph, so memory is that of one run on one image. Weights
    are shared with the graph, not copied.

    Args:
        model: A float32 graph, Q/DQ allowed.
        images: float32 `(N, C, H, W)`; N is a multiple of the batch of a graph that has a fixed one.

    Returns:
        Magnitudes by tensor, without those that an operator cannot make larger than what it reads.
    """
    watched = [
        value
        for node in model.graph
        if node.op_type not in _UNOBSERVED
        for value in node.outputs
        if value.dtype == ir.DataType.FLOAT and isinstance(value.type, ir.TensorType)
    ]
    magnitudes = _observe(model, images, watched, plainly=True)
    infinite = [value for value in watched if not np.isfinite(magnitudes[value])]
    if infinite:
        magnitudes |= _observe(model, images, infinite, plainly=False)
    return magnitudes


def _observe(
    model: ir.Model, images: npt.NDArray[np.float32], watched: list[ir.Value], *, plainly: bool
) -> dict[ir.Value, float]:
    """Largest magnitudes of the values, or of what is finite of them."""
    with _without_weights(model) as weights:
        proto = ir.to_proto(model)
    batch = model.graph.inputs[0].shape[0]  # type: ignore[index]
    size = batch if isinstance(batch, int) else 1
    prefixes = {value.name: f"observed.{index}" for index, value in enumerate(watched)}
    nodes, outputs = [], []
    for node in proto.graph.node:
        nodes.append(node)
        for name in node.output:
            if name in prefixes:  # next to what makes it, so that it is not kept for long
                reducing, names = _reduced(name, prefixes[name], plainly)
                nodes += reducing
                outputs += names
    del proto.graph.output[:], proto.graph.node[:]
    proto.graph.node.extend(nodes)
    proto.graph.output.extend(helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in outputs)
    session = _session(proto.SerializeToString(), weights)
    name = proto.graph.input[0].name
    largest = np.zeros(len(watched))
    for start in range(0, len(images), size):
        extremes = np.abs(np.array(session.run(outputs, {name: images[start : start + size]}), np.float64))
        largest = np.maximum(largest, np.nan_to_num(extremes, nan=0, posinf=np.inf).reshape(len(watched), -1).max(1))
    order = [name.split(".")[1] for name in outputs[:: len(outputs) // max(len(watched), 1)]]
    return {watched[int(index)]: amax for index, amax in zip(order, largest.tolist(), strict=True)}


def _reduced(name: str, prefix: str, plainly: bool) -> tuple[list[onnx.NodeProto], list[str]]:
    """Nodes that reduce a tensor to its extremes, and the names of those."""
    if plainly:
        made = [f"{prefix}.max", f"{prefix}.min"]
        return [
            helper.make_node("ReduceMax", [name], made[:1], keepdims=0),
            helper.make_node("ReduceMin", [name], made[1:], keepdims=0),
        ], made
    steps = [f"{prefix}.{step}" for step in ("infinite", "nan", "wild", "magnitude", "zero", "finite", "max")]
    infinite, nan, wild, magnitude, zero, finite, made_max = steps
    return [
        helper.make_node("IsInf", [name], [infinite]),
        helper.make_node("IsNaN", [name], [nan]),
        helper.make_node("Or", [infinite, nan], [wild]),
        helper.make_node("Abs", [name], [magnitude]),
        helper.make_node("Constant", [], [zero], value_float=0.0),
        helper.make_node("Where", [wild, zero, magnitude], [finite]),
        helper.make_node("ReduceMax", [finite], [made_max], keepdims=0),
    ], [made_max]


@contextmanager
def _without_weights(model: ir.Model) -> Iterator[dict[str, npt.NDArray[Any]]]:
    """Take large weights out of a graph while it is serialised; yields them by name."""
    taken: dict[str, npt.NDArray[Any]] = {}
    kept: dict[ir.Value, Any] = {}
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if tensor is None or tensor.size <= _INSIDE or tensor.dtype not in (ir.DataType.FLOAT, ir.DataType.INT8):
            continue
        taken[name] = np.ascontiguousarray(tensor.numpy())
        kept[value] = tensor
        value.const_value = ir.ExternalTensor(
            "weights", None, None, tensor.dtype, shape=ir.Shape(taken[name].shape), name=name, base_dir=""
        )
    try:
        yield taken
    finally:
        for value, tensor in kept.items():
            value.const_value = tensor


def _session(data: bytes, weights: dict[str, npt.NDArray[Any]]) -> Any:
    """A session that executes every node as it stands, on weights that it does not copy."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    options.execution_order = onnxruntime.ExecutionOrder.PRIORITY_BASED  # in the order of the nodes: reduced at once
    options.enable_mem_pattern = options.enable_cpu_mem_arena = False
    options.add_session_config_entry("session.disable_prepacking", "1")
    values = [onnxruntime.OrtValue.ortvalue_from_numpy(array) for array in weights.values()]
    options.add_external_initializers(list(weights), values)
    with large_blocks_returned():
        return onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])


_NORMALISING = frozenset({"InstanceNormalization", "GroupNormalization"})
"""They square inside, and unlike LayerNormalization name no type for it."""


def beyond_range(model: ir.Model, seen: dict[ir.Value, float]) -> dict[ir.Node, str]:
    """The nodes that FP16 cannot compute on images like those observed.

    Args:
        model: The graph observed.
        seen: What `observe_graph` returned.

    Returns:
        The nodes that read or make too large a magnitude, and those whose result is subnormal with whatever needs it;
        with the reason and the figure.
    """
    fp32_nodes: dict[ir.Node, str] = {}
    seen = dict(seen)
    for node in model.graph:
        read = max((seen.get(value, 0.0) for value in node.inputs if value is not None), default=0.0)
        if node.op_type in _SHRINKING:
            seen |= dict.fromkeys(node.outputs, read)
        if node.op_type in _QDQ | {"Shape", "Size"}:
            continue
        made = max((seen.get(value, 0.0) for value in node.outputs), default=0.0)
        largest = max(read, made)
        if largest > LARGEST / MARGIN:
            fp32_nodes[node] = f"reaches {largest:.3g}, above {LARGEST / MARGIN:.0f} = FP16's largest / {MARGIN:.0f}"
        elif node.op_type in _NORMALISING and read**2 > LARGEST / MARGIN:
            fp32_nodes[node] = (
                f"squares {read:.3g} inside, above {LARGEST / MARGIN:.0f} = FP16's largest / {MARGIN:.0f}"
            )
        elif 0 < made < SMALLEST_STEP / 2 / WORST_ERROR and node.op_type not in MOVES:
            reason = f"reaches only {made:.2g}, subnormal in FP16"
            for each in (node, *follow(node)):
                fp32_nodes.setdefault(each, reason)
    return fp32_nodes
