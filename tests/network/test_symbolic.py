"""A symbolic trace knows the shapes of one image, and nothing that depends on the number of images."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from pcn_deploy.network.symbolic import trace

SHAPE = (3, 5, 7)


class Padded(nn.Module):
    """The number of images after operations that fix it in a graph of torch.export."""

    def forward(self, x: Tensor) -> Tensor:
        y = F.pad(F.interpolate(F.pad(x, [0, 1]), scale_factor=2.0), [1, 1])
        batch, channels, height, width = y.shape
        if height * width != y[0, 0].numel():
            raise ValueError
        return y.reshape(batch, channels, height * width).mean(2)


class Split(nn.Module):
    """Iterates over parts whose number is known."""

    def forward(self, x: Tensor) -> Tensor:
        parts = [F.relu(part) for part in x.chunk(3, 1)]
        total: Tensor = sum(torch.split(torch.cat(parts, 1), 1, dim=1))  # type: ignore[assignment]
        return total.mean((2, 3))


class Guarded(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if len(x.shape) != 4 or x.dim() != 4 or x.shape[1] != 3 or x.shape[-2:] != (5, 7):
            raise ValueError
        return x.mean((2, 3)) * x.shape[2]


class Generic(nn.Module):
    """Everyday questions about a tensor, and settings made with NumPy."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.parts = np.power(4, -0.5), np.int64(2)

    def forward(self, x: Tensor) -> Tensor:
        y = x * self.scale * np.sqrt(x.shape[1]) + torch.finfo(x.dtype).eps
        axes = {4: [2, 3]}[y.ndim] if not y.is_cuda else []
        side = min(y.shape[-2:]) + math.prod(y.shape[2:]) + sum(size // 2 for size in y.shape[-2:])
        for axis in range(2, y.ndim):
            y = y.roll(int(self.parts), axis)
        z: Tensor = y.mean(axes) * side
        return z


@pytest.mark.parametrize("kind", [Padded, Split, Guarded, Generic])
@pytest.mark.parametrize("batch", [1, 2, 5])
def test_the_trace_computes_the_same_for_every_batch(kind: Callable[[], nn.Module], batch: int) -> None:
    images = torch.rand(batch, *SHAPE)
    torch.testing.assert_close(trace(kind(), SHAPE)(images), kind()(images))


class Decides(nn.Module):
    def __init__(self, on: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.on = on

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3)) if self.on(x) else x.amax((2, 3))


@pytest.mark.parametrize(
    "on",
    [
        lambda x: x.shape[0] > 1,
        lambda x: x.shape[0] > 8,
        lambda x: x.shape[0] % 2,
        lambda x: x.shape[0] // 2 == 1,
        lambda x: F.pad(x, [1, 1]).squeeze().dim() == 4,
        lambda x: x.sum() > 0,
        lambda x: x.nonzero().shape[0] > 3,
    ],
)
def test_what_depends_on_the_batch_or_the_image_is_not_decided(on: Callable[[Tensor], object]) -> None:
    with pytest.raises(fx.proxy.TraceError):
        trace(Decides(on), SHAPE)


class IntsForFloats(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (0, 0, 0, 0, 1, 1), "constant", 0)
        return F.leaky_relu(F.layer_norm(x, [x.shape[-1]], None, None, 1), 2).clamp(min=0)


@pytest.mark.filterwarnings("ignore:The TorchScript type system")
def test_ints_where_floats_belong_are_written_as_floats() -> None:
    """TorchScript refuses them; what takes any number, or an int, stays as it is."""
    graph = trace(IntsForFloats(), (3, 4, 4))
    found = {str(node.target): (node.args, node.kwargs) for node in graph.graph.nodes if node.op.startswith("call_")}
    numbers = [value for args, kwargs in found.values() for value in (*args, *kwargs.values())]
    assert [value for value in numbers if type(value) is float] == [0.0, 1.0, 2.0]
    assert found["clamp"][1] == {"min": 0}
    assert type(found["clamp"][1]["min"]) is int
    torch.jit.script(graph)
    x = torch.rand(2, 3, 4, 4)
    assert torch.equal(graph(x), IntsForFloats()(x))
