"""What simplifies an exported graph: only passes that leave the function as it is, each with the reason why.

Everything else that an optimiser can do (fusions, layouts) is left to the engines, which do it for their own kernels.
The exporter's `optimize` is not used: its rules take a constant for 0 or 1 within a tolerance of 1e-8, so that
`x / (norm + 1e-8)` loses its epsilon, and some are wrong beyond that (docs/graph.md).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common as passes
from onnxscript.optimizer import fold_constants
from onnxscript.rewriter import RewritePass
from onnxscript.rewriter.rules import common as rules

from pcn_deploy.graph.stable import keep_small

EXACT_RULES = {
    "collapse_slice_rule": "a slice from 0 to the end, step 1, hands on its input",
    "collapse_slice2_rule": "a slice of step 1 and of its input's shape hands on its input",
    "materialize_reshape_shape_rule": "the inferred shape, with -1 for the one symbolic size, is the computed one",
    "no_op_cast_rule": "a cast to the type that its input has",
    "no_op_expand_rule": "an expansion to the shape that its input has",
    "reshape_reshape_rule": "a reshape keeps the order of the values, so the last one decides",
    "no_op_transpose_rule": "the identical permutation",
    "transpose_transpose_rule": "permutations are composed",
    "unsqueeze_unsqueeze_rule": "both axes are inserted at once",
    "squeeze_reshape_1d_rule": "a vector squeezed and made a vector again",
    "no_op_dynamic_scatter_nd_rule": "an update of every row, without reduction, is the update",
    "remove_optional_bias_from_conv_rule": "a bias of zeros, compared exactly",
    "remove_optional_bias_from_conv_transpose_rule": "a bias of zeros, compared exactly",
    "remove_optional_bias_from_gemm_rule": "a bias of zeros, compared exactly",
    "fuse_batchnorm_into_conv_rule": "weight times scale, rounded once in FP32",
    "fuse_batchnorm_into_conv_transpose_rule": "weight times scale, rounded once in FP32",
    "fuse_batchnorm_into_gemm_rule": "weight times scale, rounded once in FP32",
    "fuse_pad_into_conv_rule": "zeros around the image, compared exactly, are what a convolution pads with",
}
"""The rules of onnxscript's rewriter that run, by name, and why each leaves the function as it is. A version of
onnxscript that lacks one runs without it."""

_NEUTRAL = {"Mul": (1, (0, 1)), "Div": (1, (1,)), "Sub": (0, (1,)), "Add": (0, (0, 1))}
"""Operators with the operand that changes nothing, to the bit, and where it may stand. Add counts for integers only:
as floating-point numbers, -0 + 0 is +0."""


def fold_shapes(model: ir.Model) -> None:
    """Compute what depends on no weight (shapes, paddings, absent biases), so that weights are read by layers only."""

    def keep_weights(node: ir.Node) -> bool | None:
        reads_weight = any(value is not None and value.is_initializer() for value in node.inputs)
        return False if reads_weight and node.op_type not in {"Shape", "Size"} else None

    fold_constants(model, should_fold=keep_weights)
    passes.RemoveUnusedNodesPass()(model)


def simplify_exactly(model: ir.Model) -> None:
    """Simplify a graph in place without changing what it computes.

    Constants are computed by the operators of ONNX's own reference, in the types that the graph declares.

    Args:
        model: The graph as exported, Q/DQ allowed.
    """
    passes.InlinePass()(model)
    fold_constants(model, onnx_shape_inference=True)
    _skip_neutral(model)
    *others, padding = [getattr(rules, name) for name in EXACT_RULES if hasattr(rules, name)]
    RewritePass(others)(model)
    RewritePass([padding])(model)  # on its own: a convolution that was rewritten takes in no BatchNormalization after
    keep_small(model.graph)
    for make in _CLEANING:
        make()(model)


_CLEANING: tuple[Callable[[], ir.passes.InPlacePass], ...] = (
    passes.RemoveUnusedNodesPass,
    passes.RemoveUnusedFunctionsPass,
    passes.RemoveUnusedOpsetsPass,
    lambda: passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
    passes.LiftSubgraphInitializersToMainGraphPass,
    passes.DeduplicateInitializersPass,  # by type, shape and bytes
    passes.CommonSubexpressionEliminationPass,  # the same operator, inputs and attributes
    passes.OutputFixPass,
    passes.NameFixPass,
    passes.IdentityEliminationPass,
)


def _skip_neutral(model: ir.Model) -> None:
    """Replace by Identity what multiplies or divides by exactly 1, subtracts exactly 0, or adds an integer 0."""
    for node in list(model.graph.all_nodes()):
        kept = _kept_operand(node)
        if kept is None or node.graph is None:
            continue
        identity = ir.node("Identity", [kept], metadata_props=dict(node.metadata_props))
        old, new = node.outputs[0], identity.outputs[0]
        new.shape, new.type = old.shape, old.type
        ir.convenience.replace_nodes_and_values(node.graph, node, [node], [identity], [old], [new])


def _kept_operand(node: ir.Node) -> ir.Value | None:
    """The operand that a node hands on as it is; None if it does not."""
    neutral, places = _NEUTRAL.get(node.op_type, (0, ()))
    for place in places:
        kept, operand = node.inputs[1 - place], node.inputs[place]
        allowed = {ir.DataType.INT64} if node.op_type == "Add" else {ir.DataType.INT64, ir.DataType.FLOAT}
        if operand is not None and operand.dtype in allowed and _is_scalar(operand, neutral):
            return kept
    return None


def _is_scalar(value: ir.Value, wanted: int) -> bool:
    """Whether a value is a constant of no dimensions that is exactly the number wanted; -0 is not 0."""
    tensor = None if value.is_graph_input() else ir.convenience.get_const_tensor(value)
    if tensor is None or tensor.shape.rank():
        return False
    number = tensor.numpy()
    return bool(number == wanted and not np.signbit(number))
