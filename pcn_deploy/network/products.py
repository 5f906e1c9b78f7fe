"""Turn the products in a traced forward into layers: whatever multiplies an activation by a constant.

A constant is what follows from parameters and buffers alone; it is computed once. Convolutions become `nn.Conv2d`;
linear functions, matrix products with a constant on either side and sums of products become `nn.Linear`, with the
transpositions that this takes; an attention function becomes `SeparateAttention`, a batch normalisation
`nn.BatchNorm2d`, so that it can be folded.
"""

from __future__ import annotations

import itertools
import keyword
import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from pcn_deploy.network.calls import CallTrace
from pcn_deploy.network.multihead import SeparateAttention, as_parameter, linear_of

_SUFFIXES = ("weight", "kernel", "matrix")


class Separation:
    """The forward of one module, whose products become layers of it.

    Args:
        module: The module.
        trace: Its trace; changed in place.

    Attributes:
        layers: The layers, by the names that they will have in the module.
    """

    def __init__(self, module: nn.Module, trace: CallTrace) -> None:
        self.layers: dict[str, nn.Module] = {}
        self.graph = trace.graph
        self._module, self._held = module, trace.held
        self._constants: dict[fx.Node, Any] = {}
        for node in list(self.graph.nodes):
            self._note_constant(node)

    def separate_products(self) -> None:
        """Put a layer in the place of each product of an activation with a constant."""
        for node in list(self.graph.nodes):
            product = _PRODUCTS.get(node.target) if node.op in ("call_function", "call_method") else None
            if product is None or node in self._constants:
                continue
            arguments = _bind(node, product[0])
            if arguments is not None:
                with self.graph.inserting_before(node):
                    result = product[1](self, **arguments)
                if result is not None:
                    node.replace_all_uses_with(result)
                    self.graph.erase_node(node)
        self._drop_unused()

    def constant(self, value: Any, *axes: int) -> Tensor | None:
        """The tensor that an argument always is, if it is one of so many axes."""
        tensor = self._constants.get(value) if isinstance(value, fx.Node) else None
        if isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.ndim in axes:
            return tensor
        return None

    def is_activation(self, value: Any, least: int, most: int = 99) -> bool:
        """Whether an argument is a tensor of so many axes that is no constant."""
        if not isinstance(value, fx.Node) or value in self._constants:
            return False
        values = value.meta.get("values", [])
        return bool(values) and isinstance(values[0], Tensor) and least <= values[0].ndim <= most

    def call(self, layer: nn.Module, kind: str, weight: Any, *inputs: fx.Node) -> fx.Node:
        """Call a new layer, named after the parameter that its weight comes from."""
        name = self.name_for(kind, weight)
        self.layers[name] = layer.eval()
        return self.graph.call_module(name, inputs)

    def name_for(self, kind: str, weight: Any = None) -> str:
        """A name that says what the layer is: that of its weight, or of its kind."""
        target = self._parameter(weight) if isinstance(weight, fx.Node) else ""
        owner, _, last = target.rpartition(".")
        for suffix in _SUFFIXES:
            last = last.removesuffix(suffix).removesuffix("_")
        stem = "_".join(part for part in (*owner.split("."), last) if part) or kind
        if not stem.isidentifier() or keyword.iskeyword(stem) or hasattr(nn.Module, stem):
            stem = kind
        called = {str(node.target).split(".")[0] for node in self.graph.nodes if node.op == "call_module"}
        free = owner == stem and stem not in called  # a layer whose weight only is used takes its own place
        names = {*self._module._modules, *self._module._parameters, *self._module._buffers, *vars(self._module)}
        taken = {*called, *self.layers, *(names - {stem} if free else names)}
        first = [stem] if stem == kind else [stem, f"{stem}_{kind}"]
        numbered = (f"{stem}_{number}" for number in itertools.count(2))
        return next(name for name in itertools.chain(first, numbered) if name not in taken)

    def _parameter(self, node: fx.Node) -> str:
        """The parameter that a constant is made from, the first of several."""
        if node.op == "get_attr":
            return "" if str(node.target).startswith("_tensor_constant") else str(node.target)
        return next((name for each in node.all_input_nodes if (name := self._parameter(each))), "")

    def _note_constant(self, node: fx.Node) -> None:
        """Compute a node that depends on parameters and buffers only."""
        if node.op == "get_attr":
            self._constants[node] = self._held[str(node.target)]
            return
        read = node.all_input_nodes
        if node.op == "output" or not read or not all(each in self._constants for each in read):
            return
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), self._constants.__getitem__)
        target: Any = node.target
        if node.op == "call_method":
            target, args = getattr(args[0], target), args[1:]
        elif node.op == "call_module":
            target = self._held[target]
        self._constants[node] = target(*args, **kwargs)

    def _drop_unused(self) -> None:
        for node in reversed(list(self.graph.nodes)):
            reads = node.target in ("size", "dim", operator.getitem, getattr)  # what settled a shape
            if not node.users and (node in self._constants or reads):
                self.graph.erase_node(node)


def _bind(node: fx.Node, names: tuple[str, ...]) -> dict[str, Any] | None:
    """The arguments of a node by name; None if there are others than these."""
    if len(node.args) > len(names) or not set(node.kwargs) <= set(names):
        return None
    return dict(zip(names, node.args, strict=False)) | dict(node.kwargs)


def _is_plain(*values: Any) -> bool:
    """Whether settings are values, not computed in the trace."""
    return not any(isinstance(leaf, fx.Node) for value in values for leaf in torch.utils._pytree.tree_leaves(value))


def _conv2d(
    at: Separation,
    input: fx.Node,  # noqa: A002 - torch's name
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: Any = 1,
) -> fx.Node | None:
    kernel, shift = at.constant(weight, 4), at.constant(bias, 1)
    if kernel is None or not at.is_activation(input, 4, 4) or (bias is not None and shift is None):
        return None
    if not _is_plain(stride, padding, dilation, groups):
        return None
    settings: list[Any] = [each if isinstance(each, str) else _pair(each) for each in (stride, padding, dilation)]
    layer = nn.Conv2d(
        kernel.shape[1] * groups,
        kernel.shape[0],
        (kernel.shape[2], kernel.shape[3]),
        settings[0],
        settings[1],
        settings[2],
        groups,
        shift is not None,
        device="meta",
    )
    layer.weight = as_parameter(kernel)
    layer.bias = None if shift is None else as_parameter(shift)
    return at.call(layer, "conv", weight, input)


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[-1])


def _linear(at: Separation, input: fx.Node, weight: Any, bias: Any = None) -> fx.Node | None:  # noqa: A002
    matrix = at.constant(weight, 2)
    if matrix is None or not at.is_activation(input, 2):
        return None
    shift = at.constant(bias, 1)
    made = at.call(linear_of(matrix, shift), "linear", weight, input)
    return made if bias is None or shift is not None else at.graph.call_function(torch.add, (made, bias))


def _matmul(at: Separation, input: Any, other: Any) -> fx.Node | None:  # noqa: A002
    right, left = at.constant(other, 2), at.constant(input, 2)
    if right is not None and at.is_activation(input, 2):
        return at.call(linear_of(right.t().contiguous(), None), "linear", other, input)
    if left is not None and at.is_activation(other, 2):
        swapped = at.graph.call_method("transpose", (other, -1, -2))
        return at.graph.call_method("transpose", (at.call(linear_of(left, None), "linear", input, swapped), -1, -2))
    return None


def _addmm(at: Separation, input: Any, mat1: Any, mat2: Any) -> fx.Node | None:  # noqa: A002
    matrix = at.constant(mat2, 2)
    if matrix is None or not at.is_activation(mat1, 2):
        return None
    shift = at.constant(input, 1)
    if shift is not None and len(shift) != matrix.shape[1]:
        shift = None
    made = at.call(linear_of(matrix.t().contiguous(), shift), "linear", mat2, mat1)
    return made if shift is not None else at.graph.call_function(torch.add, (made, input))


def _einsum(at: Separation, equation: str, *operands: Any) -> fx.Node | None:
    """A sum of products over axes that the constant does not share with the result: a linear layer."""
    operands = tuple(operands[0]) if len(operands) == 1 and isinstance(operands[0], tuple | list) else operands
    if not isinstance(equation, str) or len(operands) != 2 or "." in equation or "->" not in equation:
        return None
    terms, result = equation.replace(" ", "").split("->")
    parts = terms.split(",")
    if at.is_activation(operands[1], 1):
        operands, parts = operands[::-1], parts[::-1]
    x, constant = operands
    of_x, of_constant = parts
    weight = at.constant(constant, len(of_constant))
    summed = [axis for axis in of_constant if axis in of_x and axis not in result]
    made = [axis for axis in of_constant if axis not in of_x]
    kept = [axis for axis in of_x if axis not in summed]
    plain = all(len(set(part)) == len(part) for part in (*parts, result)) and bool(summed)
    if weight is None or not plain or not at.is_activation(x, len(of_x), len(of_x)):
        return None
    if set(kept) | set(made) != set(result) or len(kept) + len(made) != len(result) or len(summed) == len(of_x):
        return None
    if set(of_constant) != {*summed, *made}:
        return None  # a product for each index of an axis
    ordered = weight.permute([of_constant.index(axis) for axis in (*made, *summed)])
    sizes = list(ordered.shape[: len(made)])
    matrix = ordered.reshape(max(1, torch.Size(sizes).numel()), -1).contiguous()
    moved = at.graph.call_method("permute", (x, *(of_x.index(axis) for axis in (*kept, *summed))))
    if len(summed) > 1:
        moved = at.graph.call_method("flatten", (moved, len(kept)))
    y = at.call(linear_of(matrix, None), "linear", constant, moved)
    if len(made) != 1:
        y = at.graph.call_method("unflatten", (y, -1, sizes)) if made else at.graph.call_method("squeeze", (y, -1))
    axes = (*kept, *made)
    return at.graph.call_method("permute", (y, *(axes.index(axis) for axis in result)))


def _batch_norm(
    at: Separation,
    input: fx.Node,  # noqa: A002
    running_mean: Any,
    running_var: Any,
    weight: Any = None,
    bias: Any = None,
    training: Any = False,
    momentum: Any = 0.1,
    eps: Any = 1e-5,
) -> fx.Node | None:
    mean, variance = at.constant(running_mean, 1), at.constant(running_var, 1)
    gain, shift = at.constant(weight, 1), at.constant(bias, 1)
    if training or mean is None or variance is None or not at.is_activation(input, 4, 4) or not _is_plain(eps):
        return None
    if (weight is None) != (gain is None) or (bias is None) != (shift is None) or (gain is None) != (shift is None):
        return None
    norm = nn.BatchNorm2d(len(mean), eps, affine=gain is not None)
    norm.running_mean, norm.running_var = mean, variance
    if gain is not None and shift is not None:
        norm.weight, norm.bias = as_parameter(gain), as_parameter(shift)
    return at.call(norm, "norm", None, input)


def _attention(
    at: Separation,
    query: fx.Node,
    key: fx.Node,
    value: fx.Node,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Any,
    in_proj_bias: Any,
    bias_k: Any,
    bias_v: Any,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Any,
    out_proj_bias: Any,
    training: bool = True,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Any = None,
    k_proj_weight: Any = None,
    v_proj_weight: Any = None,
    static_k: Any = None,
    static_v: Any = None,
    **masks: Any,
) -> fx.Node | None:
    separate = (q_proj_weight, k_proj_weight, v_proj_weight) if use_separate_proj_weight else (in_proj_weight,)
    matrices = [at.constant(weight, 2) for weight in (*separate, out_proj_weight)]
    vectors = [bias for bias in (in_proj_bias, out_proj_bias, bias_k, bias_v) if bias is not None]
    if any(matrix is None for matrix in matrices) or any(at.constant(each, 1, 3) is None for each in vectors):
        return None
    if static_k is not None or static_v is not None or not at.is_activation(query, 2, 3):
        return None
    tensors: list[Any] = matrices if use_separate_proj_weight else [*matrices[0].chunk(3), matrices[1]]  # type: ignore[union-attr]
    bias = at.constant(in_proj_bias, 1)
    biases = [None, None, None] if bias is None else list(bias.chunk(3))
    query_, key_, value_, out = zip(tensors, [*biases, at.constant(out_proj_bias, 1)], strict=True)
    layer = SeparateAttention(
        query_,
        key_,
        value_,
        out,
        num_heads,
        batch_first=False,
        extra_key=at.constant(bias_k, 3),
        extra_value=at.constant(bias_v, 3),
        zero_position=add_zero_attn,
    )
    made = at.call(layer, "attention", None, query, key, value)
    made.kwargs = masks
    return made


_MASKS = ("key_padding_mask", "need_weights", "attn_mask", "average_attn_weights", "is_causal")
_ATTENTION_NAMES = (
    *("query", "key", "value", "embed_dim_to_check", "num_heads", "in_proj_weight", "in_proj_bias", "bias_k"),
    *("bias_v", "add_zero_attn", "dropout_p", "out_proj_weight", "out_proj_bias", "training"),
    *(*_MASKS[:3], "use_separate_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"),
    *("static_k", "static_v", *_MASKS[3:]),
)
_CONV = (("input", "weight", "bias", "stride", "padding", "dilation", "groups"), _conv2d)
_NORM_NAMES = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
_MATMUL = (("input", "other"), _matmul)
_MM = (("input", "mat2"), lambda at, input, mat2: _matmul(at, input, mat2))  # noqa: A006
_EINSUM = (("equation", "a", "b"), lambda at, equation, a=None, b=None: _einsum(at, equation, *_given(a, b)))


def _given(*operands: Any) -> list[Any]:
    return [operand for operand in operands if operand is not None]


_PRODUCTS: dict[Any, tuple[tuple[str, ...], Callable[..., fx.Node | None]]] = {
    F.conv2d: _CONV,
    torch.conv2d: _CONV,
    F.linear: (("input", "weight", "bias"), _linear),
    **dict.fromkeys((torch.matmul, operator.matmul, operator.imatmul, "matmul", "__matmul__"), _MATMUL),
    **dict.fromkeys((torch.mm, "mm"), _MM),
    torch.addmm: (("input", "mat1", "mat2"), _addmm),
    "addmm": (("input", "mat1", "mat2"), _addmm),
    torch.einsum: _EINSUM,
    F.batch_norm: (_NORM_NAMES, _batch_norm),
    F.multi_head_attention_forward: (_ATTENTION_NAMES, _attention),
}
