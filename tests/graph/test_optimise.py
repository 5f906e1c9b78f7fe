"""What simplifies a graph is exact: constants near 0 and 1 count, and nothing else is taken for something simpler."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnxscript.rewriter.rules import common
from torch import Tensor, nn

from pcn_deploy.graph.export import serialise, to_onnx
from pcn_deploy.graph.optimise import EXACT_RULES
from pcn_deploy.specs import BatchRange

Function = Callable[[Tensor], Tensor]
ONE = BatchRange(min=1, opt=1, max=1)


class Computes(nn.Module):
    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def graph_of(net: nn.Module, shape: tuple[int, int, int], batch: BatchRange = ONE) -> bytes:
    return serialise(to_onnx(net.eval(), shape, batch, {}))


def operators(data: bytes) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load_from_string(data).graph.node)


def run_plainly(data: bytes, images: np.ndarray[tuple[int, ...], np.dtype[np.float32]]) -> Tensor:
    """The graph without any optimisation of the runtime's own."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return torch.from_numpy(ort.InferenceSession(data, options).run(None, {"images": images})[0])


def every_row_once_more(x: Tensor) -> Tensor:
    return x.flatten(1)[0].index_put((torch.arange(48),), torch.ones(48), accumulate=True)[None]


INEXACT: dict[str, Function] = {
    "sum + 1e-8": lambda x: x / (x.abs().sum(1, keepdim=True) + 1e-8),
    "rsqrt + 1e-8": lambda x: torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-8),
    "sqrt + 1e-12": lambda x: x / torch.sqrt((x * x).sum(1, keepdim=True) + 1e-12),
    "log + 1e-10": lambda x: torch.log(x.abs() + 1e-10),
    "minus 1e-9": lambda x: torch.sqrt(x.abs() - 1e-9),
    "times 1 + 1e-6": lambda x: (x * (1 + 1e-6) - x) * 1e6,
    "by 1 + 1e-6": lambda x: (x / (1 + 1e-6) - x) * 1e6,
    "disjoint clips": lambda x: x.clamp(0, 1).clamp(2, 3),
    "clip, relu": lambda x: x.clamp(-2, -1).relu() + x,
    "two clips of one tensor": lambda x: x.clamp(min=0).clamp(max=0.5) + x.clamp(min=-1).clamp(max=2),
    "two minima of maxima": lambda x: (
        torch.minimum(torch.maximum(x, torch.tensor(0.1)), torch.tensor(0.2))
        - torch.minimum(torch.maximum(x, torch.tensor(-3.0)), torch.tensor(2.0))
    ),
    "every row added to": every_row_once_more,
    "a product spelt as a matrix product": lambda x: (x.reshape(-1, 1, 1) @ (x + 1).reshape(-1, 1, 1)).reshape(x.shape),
    "padding with a small number": lambda x: torch.nn.functional.conv2d(
        torch.nn.functional.pad(x, (1, 1, 1, 1), value=1e-9), torch.full((1, 3, 3, 3), 1e9)
    ),
}


@pytest.mark.parametrize("name", INEXACT)
def test_what_looks_simpler_within_a_tolerance_stays(name: str) -> None:
    data = graph_of(Computes(INEXACT[name]), (3, 4, 4))
    random = np.random.default_rng(0).standard_normal((1, 3, 4, 4)).astype(np.float32)
    for images in (random, np.zeros_like(random)):
        expected = INEXACT[name](torch.from_numpy(images))
        torch.testing.assert_close(run_plainly(data, images), expected, rtol=1e-5, atol=1e-6, equal_nan=True)


def test_what_changes_nothing_is_gone() -> None:
    data = graph_of(Computes(lambda x: ((x * 1.0 / 1.0) - 0.0).relu()), (3, 4, 4))
    assert operators(data) == {"Relu": 1}
    data = graph_of(Computes(lambda x: x.transpose(1, 2).transpose(1, 2).reshape(x.shape)[:, :].relu()), (3, 4, 4))
    assert operators(data) == {"Relu": 1}
    assert operators(graph_of(Computes(lambda x: nn.functional.dropout(x, training=False).relu()), (3, 4, 4))) == {
        "Relu": 1
    }


def test_the_sign_of_a_zero_stays() -> None:
    data = graph_of(Computes(lambda x: 1 / (x + 0.0)), (3, 4, 4))
    zeros = -np.zeros((1, 3, 4, 4), np.float32)
    assert run_plainly(data, zeros).eq(float("inf")).all()


def test_padding_and_batch_norm_join_the_convolution() -> None:
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(4)
    for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
        assert tensor is not None
        nn.init.uniform_(tensor, 0.5, 2)
    net = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(3, 4, 3, bias=False), norm)
    data = graph_of(net, (3, 6, 6), BatchRange(max=4))
    assert operators(data) == {"Conv": 1}
    images = np.random.default_rng(0).standard_normal((2, 3, 6, 6)).astype(np.float32)
    with torch.inference_mode():
        exact = net.double()(torch.from_numpy(images).double()).float()
    torch.testing.assert_close(run_plainly(data, images), exact, rtol=1e-5, atol=1e-5)


def test_every_rule_is_one_of_the_rewriter() -> None:
    assert [name for name in EXACT_RULES if not hasattr(common, name)] == []
