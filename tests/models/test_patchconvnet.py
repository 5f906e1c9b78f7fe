"""PatchConvNet against the official network's outputs, and against slow literal re-implementations."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from executors import EXECUTORS, Execute, eager
from torch import Tensor, nn

from pcn_deploy.errors import OptionError
from pcn_deploy.graph.export import to_onnx
from pcn_deploy.models.patchconvnet import PatchConvNet, TrunkBlock
from pcn_deploy.network.deploy import to_deploy
from pcn_deploy.specs import BatchRange

MakeNet = Callable[..., PatchConvNet]

VECTORS = Path(__file__).parents[1] / "fixtures" / "patchconvnet.npz"
CASES: dict[str, tuple[dict[str, Any], int, tuple[int, int, int, int]]] = {
    "tiny_64x64_seed1": ({"width": 64, "depth": 3, "num_classes": 10}, 1, (2, 3, 64, 64)),
    "s60_224_seed0": ({"width": 384, "depth": 60, "num_classes": 1000}, 0, (2, 3, 224, 224)),
}


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest, make_net: MakeNet, fill: ModuleType) -> Iterator[tuple[nn.Module, Any, Any]]:
    arguments, seed, shape = CASES[request.param]
    expected = np.load(VECTORS)[request.param]
    yield make_net(seed, **arguments), torch.from_numpy(fill.images_for(shape, seed)), expected


@pytest.mark.parametrize("run", EXECUTORS)
def test_equals_the_official_network(case: tuple[nn.Module, Tensor, Any], run: Execute) -> None:
    model, images, expected = case
    assert np.abs(expected).max() > 0.1, "the reference itself must not be trivial"
    np.testing.assert_allclose(run(model, images).numpy(), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("patch", [4, 16])
def test_features_of_the_stem_and_of_the_trunk(make_net: MakeNet, fill: ModuleType, patch: int) -> None:
    """What the first block reads and what the aggregation reads; the deploy form gives the same."""
    net = make_net(patch=patch)
    images = torch.from_numpy(fill.images_for((2, 3, 65, 35), 5))
    read: list[Tensor] = []
    first, token_block = net.blocks[0], net.blocks_token_only[0]
    hooks = [
        first.register_forward_pre_hook(lambda _module, inputs: read.append(inputs[0])),
        token_block.register_forward_pre_hook(lambda _module, inputs: read.append(inputs[1])),
    ]
    logits = eager(net, images)
    for hook in hooks:
        hook.remove()
    with torch.inference_mode():
        features = net.stage_features(images)
        deployed: Any = to_deploy(net, images)[0]
        torch.testing.assert_close(deployed.stage_features(images), features, atol=1e-4, rtol=1e-4)
    grid = (2, 32, math.ceil(65 / patch), math.ceil(35 / patch))
    assert [feature.shape for feature in features] == [grid, grid]
    assert all(torch.equal(found, wanted) for found, wanted in zip(features, read, strict=True))
    assert torch.equal(eager(net, images), logits)


def slow_trunk_block(block: TrunkBlock, x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """One trunk block on `(C, H, W)` in float64, pixel by pixel, from the description in the paper."""
    weights = {name: tensor.double().numpy() for name, tensor in block.state_dict().items()}
    gelu = np.vectorize(lambda value: 0.5 * value * (1 + math.erf(value / math.sqrt(2))))
    _channels, height, width = x.shape

    def conv1x1(name: str, map_: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        matrix = weights[f"{name}.weight"].reshape(-1, map_.shape[0])
        out: np.ndarray[Any, Any] = np.tensordot(matrix, map_, 1) + weights[f"{name}.bias"][:, None, None]
        return out

    y = np.empty_like(x)
    for row in range(height):
        for column in range(width):
            pixel = x[:, row, column]
            normal = (pixel - pixel.mean()) / math.sqrt(pixel.var() + 1e-6)
            y[:, row, column] = normal * weights["norm1.weight"] + weights["norm1.bias"]
    y = gelu(conv1x1("attn.qkv_pos.0", y))
    mixed = np.empty_like(y)
    for row in range(height):
        for column in range(width):
            total = weights["attn.qkv_pos.2.bias"].copy()
            for down in (-1, 0, 1):
                for right in (-1, 0, 1):
                    if 0 <= row + down < height and 0 <= column + right < width:
                        tap = weights["attn.qkv_pos.2.weight"][:, 0, down + 1, right + 1]
                        total += tap * y[:, row + down, column + right]
            mixed[:, row, column] = total
    y = gelu(mixed)
    squeezed = y.mean((1, 2))[:, None, None]
    reduced = np.maximum(conv1x1("attn.qkv_pos.4.conv_reduce", squeezed), 0)
    y = y / (1 + np.exp(-conv1x1("attn.qkv_pos.4.conv_expand", reduced)))
    update: np.ndarray[Any, Any] = conv1x1("attn.qkv_pos.5", y) * weights["gamma_1"][:, None, None]
    result: np.ndarray[Any, Any] = x + update
    return result


def test_non_square_map_keeps_its_geometry(make_net: MakeNet, fill: ModuleType) -> None:
    """112 x 448 makes 7 x 28 = 196 tokens, a square number: code that takes sqrt(N) scrambles it without an error."""
    net = make_net(width=16, depth=1)
    seen: list[tuple[Tensor, Tensor]] = []
    net.blocks[0].register_forward_hook(lambda _module, inputs, output: seen.append((inputs[0], output)))
    eager(net, torch.from_numpy(fill.images_for((1, 3, 112, 448), 3)))
    ((given, returned),) = seen
    assert given.shape == (1, 16, 7, 28)
    block = net.blocks[0]
    assert isinstance(block, TrunkBlock)
    slow = slow_trunk_block(block, given[0].double().numpy())
    np.testing.assert_allclose(returned[0].numpy(), slow, atol=1e-5, rtol=0)
    scrambled = slow_trunk_block(block, given[0].double().numpy().reshape(16, 14, 14)).reshape(16, 7, 28)
    assert np.abs(scrambled - slow).max() > 1e-2


@pytest.mark.parametrize("size", [(64, 64), (48, 80), (37, 61), (16, 16), (5, 100), (230, 17)])
def test_any_height_and_width(make_net: MakeNet, fill: ModuleType, size: tuple[int, int]) -> None:
    net = make_net()
    maps: list[torch.Size] = []
    net.blocks.register_forward_hook(lambda _module, _inputs, output: maps.append(output.shape))
    images = torch.from_numpy(fill.images_for((2, 3, *size), 5))
    logits = eager(net, images)
    assert maps[0] == (2, 32, math.ceil(size[0] / 16), math.ceil(size[1] / 16))
    assert logits.shape == (2, 10)
    torch.testing.assert_close(eager(net, images[1:]), logits[1:], atol=1e-5, rtol=0)
    assert not torch.allclose(logits[0], logits[1], atol=1e-3), "the logits depend on the image"


@pytest.mark.parametrize("patch", [2, 4, 8, 32])
def test_any_power_of_two_is_a_patch(make_net: MakeNet, patch: int) -> None:
    net = make_net(patch=patch, depth=1, in_channels=1)
    assert net.patch_embed(torch.zeros(1, 1, 64, 32)).shape == (1, 32, 64 // patch, 32 // patch)
    assert eager(net, torch.zeros(1, 1, 64, 32)).shape == (1, 10)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"patch": 12}, "power of two"),
        ({"patch": 1}, "power of two"),
        ({"width": 36}, "divisible"),
        ({"depth": 0}, "at least 1"),
        ({"num_classes": 0}, "at least 1"),
    ],
)
def test_an_impossible_shape_is_refused(arguments: dict[str, int], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        PatchConvNet(**{"width": 32, "depth": 1, **arguments})  # type: ignore[arg-type]


@pytest.mark.parametrize("classes", [1, 2, 10, 33])
def test_multi_class_token_equals_a_loop_over_classes(make_net: MakeNet, fill: ModuleType, classes: int) -> None:
    net = make_net(depth=1, num_classes=classes, multi_class_token=True)
    images = torch.from_numpy(fill.images_for((2, 3, 48, 80), 2))
    weights = net.state_dict()

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, (32,), weights[f"{name}.weight"], weights[f"{name}.bias"], 1e-6)

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    pool = "blocks_token_only.0"
    with torch.no_grad():
        patches = net.blocks(net.patch_embed(images)).flatten(2).transpose(1, 2)
        columns = []
        for index in range(classes):
            token = weights["cls_token"][0, index].expand(2, -1)
            keys = norm(patches, f"{pool}.norm1")
            query = linear(norm(token, f"{pool}.norm1"), f"{pool}.attn.q") / math.sqrt(32)
            share = torch.einsum("nc,nkc->nk", query, linear(keys, f"{pool}.attn.k")).softmax(1)
            pooled = torch.einsum("nk,nkc->nc", share, linear(keys, f"{pool}.attn.v"))
            token = token + weights[f"{pool}.gamma_1"] * linear(pooled, f"{pool}.attn.proj")
            hidden = F.gelu(linear(norm(token, f"{pool}.norm2"), f"{pool}.mlp.fc1"))
            token = norm(token + weights[f"{pool}.gamma_2"] * linear(hidden, f"{pool}.mlp.fc2"), "norm")
            columns.append(token @ weights["head.weight"][index] + weights["head.bias"][index])
    torch.testing.assert_close(eager(net, images), torch.stack(columns, 1), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("multi", "tokens"), [(False, 1), (True, 10)])
def test_final_norm_sees_class_tokens_only(make_net: MakeNet, multi: bool, tokens: int) -> None:
    net = make_net(multi_class_token=multi)
    shapes: list[torch.Size] = []
    net.norm.register_forward_hook(lambda _module, inputs, _output: shapes.append(inputs[0].shape))
    eager(net, torch.zeros(2, 3, 64, 64))
    assert shapes == [(2, tokens, 32)]


def test_the_per_class_head_is_one_product(make_net: MakeNet) -> None:
    """A product per class would make 1,000 nodes of the head."""
    kinds: list[list[str]] = []
    for classes in (2, 1000):
        net = make_net(depth=1, num_classes=classes, multi_class_token=True)
        graph = to_onnx(net, (3, 32, 32), BatchRange(), {}).graph
        kinds.append([node.op_type for node in graph])
    assert kinds[0] == kinds[1]
    (readers,) = [value.uses() for value in graph.initializers.values() if value.name == "head.weight"]
    assert [use.node.op_type for use in readers] == ["Mul"]
