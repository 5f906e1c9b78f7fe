"""The attention-augmented convolution against reference outputs and against a loop over pairs of pixels."""

from __future__ import annotations

import math
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
import pytest
import torch
from executors import EXECUTORS, Execute, eager
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pcn_deploy.errors import OptionError
from pcn_deploy.graph.export import serialise, to_onnx
from pcn_deploy.models.attention_conv import (
    AttentionAugmentedConv2d,
    RelativeSelfAttention2d,
    fit_table,
    note_stretched,
)
from pcn_deploy.models.augmentation import Augmentation
from pcn_deploy.specs import BatchRange

Array = npt.NDArray[np.float64]
VECTORS = Path(__file__).parents[1] / "fixtures" / "aaconv.npz"


def exact(dk: int, dv: int, conv: int, **choices: Any) -> Augmentation:
    """The augmentation that gives just these widths beside `conv` channels of the convolution."""
    out = conv + dv
    return Augmentation(kappa=dk / out, upsilon=dv / out, min_head_channels=1, **choices)


@pytest.mark.parametrize("run", EXECUTORS)
@pytest.mark.parametrize("case", ["square", "wide"])
def test_equals_the_reference_outputs(case: str, run: Execute) -> None:
    arrays = {name.partition("/")[2]: array for name, array in np.load(VECTORS).items() if name.startswith(f"{case}/")}
    given = {name: torch.from_numpy(array) for name, array in arrays.items()}
    x, dk, dv, conv = given["x"], *(len(given[f"{name}_weight"]) for name in ("q", "v", "conv"))
    augmentation = exact(dk, dv, conv, heads=int(given["heads"]), conv_bias=True)
    height, width = x.shape[2:]
    layer = AttentionAugmentedConv2d(x.shape[1], conv + dv, 3, augmentation, size=(height, width)).eval()
    names = {"conv_out": "conv", "attention.attn_out": "out"}
    state = {f"{ours}.{leaf}": given[f"{its}_{leaf}"] for ours, its in names.items() for leaf in ("weight", "bias")}
    for leaf in ("weight", "bias"):
        state[f"attention.conv_qkv.{leaf}"] = torch.cat([given[f"{name}_{leaf}"] for name in "qkv"])
    state |= {f"attention.key_rel_{axis}": given[f"rel_{axis}"] for axis in "hw"}
    layer.load_state_dict(state)
    assert np.abs(arrays["y"]).max() > 1, "the reference itself must not be trivial"
    np.testing.assert_allclose(run(layer, x).numpy(), arrays["y"], atol=1e-5, rtol=0)


def pooled(x: Array, *, count_padding: bool) -> Array:
    """Means over 3x3 neighbourhoods of every second pixel of `(C, H, W)`."""
    channels, height, width = x.shape
    out = np.zeros((channels, (height + 1) // 2, (width + 1) // 2))
    for row, column in np.ndindex(*out.shape[1:]):
        part = x[:, max(2 * row - 1, 0) : 2 * row + 2, max(2 * column - 1, 0) : 2 * column + 2]
        out[:, row, column] = part.sum((1, 2)) / (9 if count_padding else part[0].size)
    return out


def enlarged(x: Array, size: tuple[int, int]) -> Array:
    """Bilinear interpolation of `(C, H, W)` between the centres of pixels."""
    for axis, wanted in zip((1, 2), size, strict=True):
        have = x.shape[axis]
        centres = (np.arange(wanted) + 0.5) * have / wanted - 0.5
        lines = np.moveaxis(x, axis, 2).reshape(-1, have)
        stretched = np.stack([np.interp(centres, np.arange(have), line) for line in lines])
        x = np.moveaxis(stretched.reshape(len(x), -1, wanted), 2, axis)
    return x


def convolved(x: Array, weight: Array, bias: Array | None, stride: int) -> Array:
    """A convolution of `(C, H, W)`, padded with zeros by half its kernel, pixel by pixel."""
    side = weight.shape[2]
    padded = np.pad(x, ((0, 0), (side // 2, side // 2), (side // 2, side // 2)))
    out = np.zeros((len(weight), -(-x.shape[1] // stride), -(-x.shape[2] // stride)))
    for row, column in np.ndindex(*out.shape[1:]):
        part = padded[:, stride * row : stride * row + side, stride * column : stride * column + side]
        out[:, row, column] = np.tensordot(weight, part, 3)
    return out if bias is None else out + bias[:, None, None]


def fitted(table: Array, size: int) -> Array:
    """The centre rows for a side that is not longer than the table's, else the table stretched over `[-1, 1]`."""
    rows, wanted = len(table), 2 * size - 1
    if wanted <= rows:
        return np.array([table[rows // 2 + offset] for offset in range(1 - size, size)])
    at, known = np.linspace(-1, 1, wanted), np.linspace(-1, 1, rows) if rows > 1 else np.zeros(1)
    return np.stack([np.interp(at, known, column) for column in table.T], 1)


def slow_attention(layer: RelativeSelfAttention2d, x: Array, order: str, stride: int) -> Array:
    """Attention over `(C, H, W)` from the definition: a loop over heads and over pairs of pixels."""
    weights = {name: tensor.double().numpy() for name, tensor in layer.state_dict().items()}
    projected = convolved(x, weights["conv_qkv.weight"], weights["conv_qkv.bias"], stride)
    widths = {"q": layer.dk, "k": layer.dk, "v": layer.dv}
    parts = dict(zip(order, np.split(projected, np.cumsum([widths[name] for name in order])[:-1]), strict=True))
    height, width = projected.shape[1:]
    rows, columns = fitted(weights["key_rel_h"], height), fitted(weights["key_rel_w"], width)
    pixels = list(np.ndindex(height, width))
    heads = []
    for q, k, v in zip(*(np.split(parts[name], layer.heads) for name in "qkv"), strict=True):
        attended = np.zeros((len(pixels), len(v)))
        for i, (yi, xi) in enumerate(pixels):
            query = q[:, yi, xi] / math.sqrt(len(q))
            logits = [
                query @ (k[:, y, x_] + rows[y - yi + height - 1] + columns[x_ - xi + width - 1]) for y, x_ in pixels
            ]
            share = np.exp(logits) / np.exp(logits).sum()
            attended[i] = sum(part * v[:, yj, xj] for part, (yj, xj) in zip(share, pixels, strict=True))
        heads.append((attended if layer.transposed_heads else attended.T).reshape(len(v), height, width))
    return convolved(np.concatenate(heads), weights["attn_out.weight"], weights["attn_out.bias"], 1)


def slow(layer: AttentionAugmentedConv2d, x: Array, order: str, stride: int, pooling: str) -> Array:
    """The whole layer on `(C, H, W)`."""
    size = (-(-x.shape[1] // stride), -(-x.shape[2] // stride))
    if pooling == "layer":
        x = pooled(x, count_padding=True)
    bias = None if layer.conv_out.bias is None else layer.conv_out.bias.detach().double().numpy()
    conv = convolved(x, layer.conv_out.weight.detach().double().numpy(), bias, stride)
    attended = slow_attention(
        layer.attention, pooled(x, count_padding=False) if pooling == "attention" else x, order, stride
    )
    if pooling == "attention":
        attended = enlarged(attended, size)
    both = np.concatenate((conv, attended))
    return enlarged(both, size) if pooling == "layer" else both


SIDES = st.integers(1, 5)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    image=st.tuples(SIDES, SIDES),
    table=st.tuples(SIDES, SIDES),
    heads=st.integers(1, 3),
    per_head=st.tuples(st.integers(1, 3), st.integers(1, 2)),
    kernel=st.sampled_from([1, 3]),
    stride=st.sampled_from([1, 2]),
    order=st.sampled_from(["qkv", "kqv"]),
    pooling=st.sampled_from(["none", "attention", "layer"]),
    transposed=st.booleans(),
)
def test_equals_a_loop_over_pairs_of_pixels(
    fill: ModuleType,
    image: tuple[int, int],
    table: tuple[int, int],
    heads: int,
    per_head: tuple[int, int],
    kernel: int,
    stride: int,
    order: str,
    pooling: str,
    transposed: bool,
) -> None:
    dk, dv = heads * per_head[0], heads * per_head[1]
    augmentation = exact(dk, dv, 2, heads=heads, order=order, transposed_heads=transposed, conv_bias=transposed)
    layer = AttentionAugmentedConv2d(3, 2 + dv, kernel, augmentation, size=table, stride=stride, pooling=pooling)
    fill.fill_(layer, 7)
    layer.double().eval()
    x = torch.from_numpy(fill.images_for((2, 3, *image), 1)).double()
    found = eager(layer, x).numpy()
    for one, y in zip(x.numpy(), found, strict=True):
        np.testing.assert_allclose(y, slow(layer, one, order, stride, pooling), atol=1e-9, rtol=0)


def attention(fill: ModuleType, size: tuple[int, int], **choices: Any) -> RelativeSelfAttention2d:
    layer = RelativeSelfAttention2d(6, dk=8, dv=4, heads=2, size=size, **choices)
    fill.fill_(layer, 3)
    return layer.eval()


@pytest.mark.parametrize("size", [(4, 6), (1, 9), (9, 1), (1, 1), (2, 7)])
def test_a_smaller_map_needs_only_the_centre_of_the_tables(fill: ModuleType, size: tuple[int, int]) -> None:
    """A layer made for 9 x 9 equals one made for the map, with those rows of the tables that its offsets reach."""
    large = attention(fill, (9, 9))
    small = attention(fill, size)
    state = large.state_dict()
    for name, side in zip(("key_rel_h", "key_rel_w"), size, strict=True):
        state[name] = state[name][[8 + offset for offset in range(1 - side, side)]]
    small.load_state_dict(state)
    x = torch.from_numpy(fill.images_for((2, 6, *size), 2))
    assert torch.equal(eager(large, x), eager(small, x))


def test_a_longer_side_stretches_the_table_and_keeps_its_ends_and_centre() -> None:
    table = torch.tensor([[-2.0, 5.0], [0.0, 1.0], [4.0, 3.0]])
    expected = [[-2, 5], [-1, 3], [0, 1], [2, 2], [4, 3]]
    torch.testing.assert_close(fit_table(table, 3), torch.tensor(expected, dtype=torch.float32))
    torch.testing.assert_close(fit_table(table[1:2], 2), table[1:2].expand(3, 2))


def test_key_first_order_is_a_permutation_of_the_weights(fill: ModuleType) -> None:
    queries_first, keys_first = attention(fill, (5, 7)), attention(fill, (5, 7), order="kqv")
    x = torch.from_numpy(fill.images_for((2, 6, 5, 7), 2))
    assert not torch.allclose(eager(queries_first, x), eager(keys_first, x), atol=1e-3), "the order must matter"
    rows = [*range(8, 16), *range(8), *range(16, 20)]
    state = queries_first.state_dict()
    keys_first.load_state_dict(
        state | {f"conv_qkv.{leaf}": state[f"conv_qkv.{leaf}"][rows] for leaf in ("weight", "bias")}
    )
    torch.testing.assert_close(eager(keys_first, x), eager(queries_first, x), atol=1e-6, rtol=0)


def test_transposed_heads_leave_out_one_transposition(fill: ModuleType) -> None:
    """What the public AA-ResNet-50 computes: `(positions, channels)` of each head is read as if it were transposed."""
    right, faulty = attention(fill, (3, 4)), attention(fill, (3, 4), transposed_heads=True)
    seen: list[Tensor] = []
    for layer in (right, faulty):
        layer.attn_out.register_forward_hook(lambda _module, inputs, _output: seen.append(inputs[0]))
        eager(layer, torch.from_numpy(fill.images_for((2, 6, 3, 4), 2)))
    per_head = seen[0].reshape(2, 2, 2, 12)
    scrambled = torch.stack([torch.stack([head.t().reshape(2, 12) for head in image]) for image in per_head])
    assert torch.equal(seen[1], scrambled.reshape(2, 4, 3, 4))
    assert not torch.allclose(seen[0], seen[1], atol=1e-3)


@pytest.mark.parametrize(("size", "pooling"), [((1, 13), "none"), ((13, 1), "attention"), ((6, 5), "layer")])
def test_any_height_width_and_batch(fill: ModuleType, size: tuple[int, int], pooling: str) -> None:
    layer = AttentionAugmentedConv2d(6, 8, 3, exact(8, 4, 4, heads=2), size=(4, 6), pooling=pooling)
    fill.fill_(layer, 5)
    layer.eval()
    graph = serialise(to_onnx(layer, (6, *size), BatchRange(), {}))
    session = ort.InferenceSession(graph, providers=["CPUExecutionProvider"])
    for batch in (1, 5):
        x = torch.from_numpy(fill.images_for((batch, 6, *size), 2))
        expected = eager(layer, x)
        assert expected.shape == (batch, 8, *size)
        np.testing.assert_allclose(session.run(None, {"images": x.numpy()})[0], expected.numpy(), atol=1e-5)


@pytest.mark.parametrize(("size", "pooling"), [((7, 7), "none"), ((9, 12), "none"), ((17, 24), "attention")])
def test_no_table_of_all_pairs_is_made(size: tuple[int, int], pooling: str) -> None:
    """Positions cost two products along one axis each; only sums of logits have as many elements as there are pairs."""
    layer = AttentionAugmentedConv2d(8, 16, 3, exact(8, 4, 12, heads=2), size=(7, 7), pooling=pooling).eval()
    graph = to_onnx(layer, (8, *size), BatchRange(), {}).graph
    height, width = size if pooling == "none" else ((size[0] + 1) // 2, (size[1] + 1) // 2)
    pairs = (height * width) ** 2
    made: dict[str, int] = {}
    for node in graph:
        for value in node.outputs:
            assert value.shape is not None
            elements = math.prod(dim for dim in value.shape if isinstance(dim, int))
            made[node.op_type] = max(made.get(node.op_type, 0), elements)
    assert made["Softmax"] == 2 * pairs, "sizes are counted right"
    assert not {"Gather", "GatherND", "GatherElements", "Tile", "Expand"} & {op for op, n in made.items() if n >= pairs}
    assert max(math.prod(value.shape.numpy()) for value in graph.initializers.values() if value.shape) < pairs
    products = [node for node in graph if node.op_type == "MatMul"]
    assert len(products) == 4, "queries with keys, with rows and with columns; weights with values"
    assert sum(any(value is not None and value.is_initializer() for value in node.inputs) for node in products) == 2


@pytest.mark.parametrize(
    "choices",
    [{"dk": 9}, {"heads": 0}, {"dv": 5}, {"dk": 0}, {"order": "vkq"}, {"dv": 4.0}],
)
def test_widths_that_do_not_fit_are_refused(choices: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match="multiples of the heads"):
        RelativeSelfAttention2d(6, **{"dk": 8, "dv": 4, "heads": 2, "size": (3, 3), **choices})


def test_unknown_pooling_is_refused() -> None:
    with pytest.raises(OptionError, match=r"'max'.*'attention'"):
        AttentionAugmentedConv2d(6, 16, 3, exact(8, 4, 12, heads=2), size=(3, 3), pooling="max")


@pytest.mark.parametrize(
    ("choices", "words"),
    [
        ({"kernel_size": 2}, r"kernel_size=2.*odd kernel\. Give 1 or 3"),
        ({"kernel_size": (3, 5)}, r"kernel_size=\(3, 5\): height and width must have the same"),
        ({"kernel_size": 3.0}, r"kernel_size=3\.0: expected a whole number"),
        ({"stride": (2, 1)}, r"stride=\(2, 1\): .*such as stride=2"),
        ({"stride": 0}, "stride=0: expected a whole number"),
        ({"size": (0, 3)}, r"size=\(0, 3\): .*a pair of them, height and width"),
        ({"size": (3, 3, 3)}, r"size=\(3, 3, 3\)"),
        ({"size": 7.5}, r"size=7\.5"),
        ({"out_channels": 16.0}, r"out_channels=16\.0"),
    ],
)
def test_what_is_no_size_is_refused(choices: dict[str, Any], words: str) -> None:
    given = {"out_channels": 16, "kernel_size": 3, "size": (3, 3), **choices}
    with pytest.raises(OptionError, match=words):
        AttentionAugmentedConv2d(6, augmentation=exact(8, 4, 12, heads=2), **given)


def test_one_number_or_an_equal_pair() -> None:
    """Sizes, strides and kernels as PyTorch's own convolutions take them."""
    torch.manual_seed(0)
    one = AttentionAugmentedConv2d(6, 16, 3, exact(8, 4, 12, heads=2), size=5, stride=2)
    pairs: Any = {"kernel_size": (3, 3), "stride": (2, 2)}
    other = AttentionAugmentedConv2d(6, 16, augmentation=exact(8, 4, 12, heads=2), size=(5, 5), **pairs)
    other.load_state_dict(one.state_dict())
    x = torch.rand(2, 6, 9, 7)
    assert one(x).shape == (2, 16, 5, 4)
    assert torch.equal(one(x), other(x))


def test_stretched_tables_are_noted() -> None:
    """A side longer than the tables were made for; a smaller map takes their centre rows, which is exact."""
    net = torch.nn.Sequential(
        AttentionAugmentedConv2d(3, 16, 3, exact(8, 4, 12, heads=2), size=(6, 4), stride=2),
        AttentionAugmentedConv2d(16, 16, 3, exact(8, 4, 12, heads=2), size=(8, 8)),
    )
    assert note_stretched(net, (3, 12, 8)) == ()
    assert note_stretched(net, (3, 7, 5)) == ()
    (note,) = note_stretched(net, (3, 12, 10))
    assert note.startswith(
        "1 of 2 tables of relative positions are stretched, such as that of 0.attention: "
        "made for a map of 6x4, used on 6x5."
    )
    (note,) = note_stretched(net, (3, 18, 8))
    assert note.startswith("2 of 2 tables")
    assert note_stretched(torch.nn.Conv2d(3, 4, 1), (3, 99, 99)) == ()
    assert not any(module._forward_hooks for module in net.modules())
