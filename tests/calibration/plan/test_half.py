"""What FP16 cannot hold stays FP32, and what it can hold does not."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pcn_deploy.calibration.plan.facts import inspect_layers
from pcn_deploy.calibration.plan.half import keep_in_range
from pcn_deploy.calibration.plan.magnitudes import MAX_IMAGES, affordable_images, observe_magnitudes
from pcn_deploy.calibration.plan.rules import LayerFacts, PlanEntry, make_plan
from pcn_deploy.models.layers import ResidualAdd
from pcn_deploy.models.patchconvnet import PatchConvNet
from pcn_deploy.network.deploy import to_deploy

MakeNet = Callable[..., PatchConvNet]
IMAGES = np.random.default_rng(0).standard_normal((2, 16, 8, 8)).astype(np.float32)


class Block(nn.Module):
    """x + gamma * conv(x), the sum done by the block itself."""

    def __init__(self, gamma: float) -> None:
        super().__init__()
        self.conv = nn.Conv2d(16, 16, 1, bias=False)
        nn.init.eye_(self.conv.weight.data.view(16, 16))
        self.conv.weight.data *= gamma

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.conv(x)
        return y


class Net(nn.Module):
    def __init__(self, *gammas: float) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(Block(gamma) for gamma in gammas))
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(x)
        y: Tensor = self.head(self.norm(x.mean((2, 3))))
        return y


def moved(net: nn.Module, precision: str = "fp16", decided: tuple[str, ...] = ()) -> dict[tuple[str, bool], PlanEntry]:
    net = net.eval()
    images = torch.from_numpy(IMAGES[:1])
    layers = inspect_layers(net, images)
    plan = make_plan(layers, precision)
    found = keep_in_range(plan, net, observe_magnitudes(net, IMAGES), layers, decided)
    return {(entry.op, entry.operations): entry for entry in found.entries if entry not in plan.entries}


def test_ordinary_networks_are_left_as_they_are(make_net: MakeNet) -> None:
    assert moved(Net(1.0, 100.0)) == {}
    net, _ = to_deploy(make_net(width=64, depth=2), torch.rand(1, 3, 64, 64))
    layers = inspect_layers(net, torch.zeros(1, 3, 64, 64))
    images = np.random.default_rng(0).standard_normal((2, 3, 64, 64)).astype(np.float32)
    for precision in ("fp16", "int8"):
        plan = make_plan(layers, precision)
        assert keep_in_range(plan, net, observe_magnitudes(net, images), layers) == plan


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_layers_and_sums_that_would_overflow_stay_fp32(precision: str) -> None:
    found = moved(Net(1.0, 1e4), precision)
    # the mean over the positions is done by the network itself
    assert set(found) == {("blocks.1.conv", False), ("blocks.1", True), ("", True)}
    assert {entry.precision for entry in found.values()} == {"fp32"}
    assert all("activations reach" in entry.reason and "8188" in entry.reason for entry in found.values())
    assert found["blocks.1", True].kind == "Block"


def test_a_weight_beyond_fp16_stays_fp32() -> None:
    net = Net(1.0)
    net.norm.weight.data[0] = 7e4
    net.head.weight.data[:, 0] = 0
    found = moved(net)
    assert "weight reaches 7e+04, FP16 ends at 65504" in found["norm", False].reason


def test_a_layer_scale_of_a_millionth_stays_fp32() -> None:
    (op, _), entry = next(iter(moved(Net(1e-6)).items()))
    assert (op, entry.precision) == ("blocks.0.conv", "fp32")
    assert entry.reason.startswith("weight goes down to 1e-06, subnormal in FP16, which loses ")


def test_subnormal_weights_stay_fp32() -> None:
    net = Net(1.0)
    net.norm.weight.data[:] = torch.linspace(1e-7, 1e-6, 16)
    entry = moved(net)["norm", False]
    assert entry.precision == "fp32"
    assert entry.reason.startswith("weight goes down to 1e-07, subnormal in FP16, which loses ")
    assert ("norm", False) not in moved(net, decided=("norm",))


def test_tiny_biases_are_terms_of_a_sum() -> None:
    net = Net(1.0)
    net.head.bias.data[:] = 1e-7
    assert moved(net) == {}


def test_outputs_that_are_all_subnormal_stay_fp32() -> None:
    net = Net(1.0)
    net.norm.weight.data[:] = 2.0**-18
    net.norm.bias.data[:] = 0
    assert moved(net)["norm", False].reason.startswith("outputs reach only")


def test_an_addition_leaves_int8_with_its_branch() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(16, 16, 1, bias=False)
            self.more = nn.Conv2d(16, 16, 1)
            self.add = ResidualAdd()

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.add(self.conv(x), self.more(x)).mean((2, 3))
            return y

    net = Residual()
    with torch.no_grad():
        net.conv.weight.fill_(7e4)
    assert {op: entry.precision for (op, _), entry in moved(net, "int8").items()}["add"] != "int8"


def test_a_mask_of_infinity_counts_as_nothing() -> None:
    class Masked(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.masked_fill(x > 0.5, float("-inf")).softmax(-1)

    seen = observe_magnitudes(Masked().eval(), IMAGES)
    assert seen[""].activation == pytest.approx(float(np.abs(IMAGES).max()))


def test_the_observation_leaves_the_network_as_it_is() -> None:
    net = Net(1.0).eval()
    observe_magnitudes(net, IMAGES)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())


def test_large_networks_are_observed_on_fewer_images() -> None:
    def one(rows: int) -> list[LayerFacts]:
        return [LayerFacts(path="a", kind="Conv2d", rows=rows, in_channels=1000, out_channels=1000)]

    assert affordable_images([]) == affordable_images(one(1)) == MAX_IMAGES
    assert affordable_images(one(2000)) == 4
    assert affordable_images(one(10**6)) == 1
