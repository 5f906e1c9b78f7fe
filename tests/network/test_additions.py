"""Residual additions of other people's networks: found however they are spelled, in INT8 where that costs nothing."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pcn_deploy.calibration.plan.facts import inspect_layers
from pcn_deploy.calibration.plan.rules import make_plan
from pcn_deploy.calibration.quantized import Quantization
from pcn_deploy.graph.export import to_onnx
from pcn_deploy.graph.torchscript import to_torchscript
from pcn_deploy.models.layers import ResidualAdd
from pcn_deploy.network.deploy import to_deploy
from pcn_deploy.specs import BatchRange

IMAGES = torch.rand(2, 16, 8, 8, generator=torch.Generator().manual_seed(0))


def conv(inputs: int = 16, outputs: int = 16, kernel: int = 3, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)


class Block(nn.Module):
    """As in the common ResNets; subclasses add in other ways."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1, self.conv2, self.bn2 = conv(), nn.BatchNorm2d(16), conv(), nn.BatchNorm2d(16)
        self.sum = nn.quantized.FloatFunctional()
        self.relu = nn.ReLU(inplace=True)

    def branch(self, x: Tensor) -> Tensor:
        y: Tensor = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return y

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.branch(x) + x)


class InPlace(Block):
    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.branch(x)
        out += identity
        y: Tensor = self.relu(out)
        return y


class IdentityFirst(Block):
    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(torch.add(x, self.branch(x)))


class Method(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.branch(x).add_(x).relu_()


class Functional(Block):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.relu(self.sum.add(self.branch(x), x))
        return y


class WithShortcut(Block):
    """A convolution on the way round, which is run before the branch."""

    def __init__(self) -> None:
        super().__init__()
        self.shortcut = nn.Sequential(conv(kernel=1), nn.BatchNorm2d(16))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.shortcut(x) + self.branch(x))


class LambdaLayer(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class PaddedShortcut(Block):
    """As in the ResNets for CIFAR of option A: every other pixel, and channels of zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = conv(stride=2)
        self.conv2, self.bn2 = conv(16, 32), nn.BatchNorm2d(32)
        self.shortcut = LambdaLayer(lambda x: F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 8, 8), "constant", 0))

    def forward(self, x: Tensor) -> Tensor:
        out = self.branch(x)
        out += self.shortcut(x)
        return F.relu(out)


class Stream(Block):
    """As in transformers: the stream is read by normalisations only."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(4, 16)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(self.norm(x))


class Depthwise(Block):
    """As in ConvNeXt: the stream is read by a depthwise convolution, which is not in INT8."""

    def __init__(self) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(self.depthwise(x))


class Scaled(Block):
    """What is added is no convolution's output."""

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.5 * self.branch(x)


class Network(nn.Module):
    def __init__(self, block: type[Block]) -> None:
        super().__init__()
        self.stem, self.block = conv(), block()
        self.head = nn.Linear(32 if block is PaddedShortcut else 16, 5)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.block(F.relu(self.stem(x))).mean((2, 3)))
        return y


def deployed(block: type[Block]) -> nn.Module:
    torch.manual_seed(3)
    net = Network(block).eval()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None and module.running_var is not None:
            module.running_mean.normal_(), module.running_var.uniform_(0.5, 2)
    found, _ = to_deploy(net, IMAGES)
    with torch.inference_mode():
        torch.testing.assert_close(found(IMAGES), net(IMAGES), atol=1e-5, rtol=1e-4)
    return found


@pytest.mark.parametrize("block", [Block, InPlace, IdentityFirst, Method, Functional, WithShortcut, PaddedShortcut])
def test_the_identity_is_in_int8_and_the_branch_is_not(block: type[Block]) -> None:
    net = deployed(block)
    layers = inspect_layers(net, IMAGES[:1])
    (addition,) = [layer for layer in layers if layer.kind == "ResidualAdd"]
    assert (addition.path, addition.branch) == ("block.add", "block.conv2")
    assert make_plan(layers, "int8").quantized_entries.keys() >= {"block.add", "block.conv1", "block.conv2"}
    to_torchscript(net, IMAGES[:1], BatchRange())
    graph = to_onnx(net, (16, 8, 8), BatchRange(), {"block.add": Quantization(0.1, np.empty(0, np.float32))}).graph
    (node,) = [node for node in graph if node.op_type == "Add"]
    makers = [value.producer() for value in node.inputs if value is not None]
    assert [maker.op_type for maker in makers if maker is not None] == ["Conv", "DequantizeLinear"]


@pytest.mark.parametrize("block", [Stream, Depthwise])
def test_a_residual_stream_stays_as_it_is(block: type[Block]) -> None:
    plan = make_plan(inspect_layers(deployed(block), IMAGES[:1]), "int8")
    (addition,) = [entry for entry in plan.entries if entry.op == "block.add"]
    assert (addition.precision, addition.reason) == (
        "fp16",
        "no INT8 layer makes or reads its identity: a residual stream, rounded nowhere else",
    )


def test_what_no_convolution_made_is_no_branch() -> None:
    assert not any(isinstance(module, ResidualAdd) for module in deployed(Scaled).modules())
