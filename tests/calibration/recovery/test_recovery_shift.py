"""Equalisation and SmoothQuant: the float function stays, outlier channels stop costing accuracy."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from recovery_networks import SHAPE, AugmentedPair, TwoReaders, images, logits_sqnr, prepared, source
from torch import Tensor, nn

from pcn_deploy.calibration.recovery import apply_before
from pcn_deploy.calibration.recovery.links import Link, find_links
from pcn_deploy.calibration.recovery.shift import reader_range
from pcn_deploy.models.layers import LayerNorm2d, ResidualAdd
from pcn_deploy.models.patchconvnet import PatchConvNet
from pcn_deploy.network.deploy import to_deploy


def with_outliers(net: nn.Sequential, factors: tuple[float, ...] = (100.0, 30.0)) -> nn.Sequential:
    """Some channels of the first producer are blown up, and undone in their reader."""
    layers = [layer for layer in net if isinstance(layer, nn.Conv2d | nn.LayerNorm)]
    first, second = layers[-2], layers[-1]
    with torch.no_grad():
        for channel, factor in enumerate(factors):
            first.weight[channel] *= factor
            if first.bias is not None:
                first.bias[channel] *= factor
            second.weight[:, channel] /= factor
    return net


def pooled(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()


def relu_net() -> nn.Sequential:
    torch.manual_seed(0)
    return with_outliers(pooled(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 16, 1)))


def norm_net() -> nn.Sequential:
    torch.manual_seed(0)
    return with_outliers(pooled(nn.Conv2d(3, 16, 3), nn.GELU(), LayerNorm2d(16), nn.Conv2d(16, 16, 1)))


def depthwise_net() -> nn.Sequential:
    torch.manual_seed(0)
    middle = nn.Conv2d(16, 16, 3, groups=16)
    return with_outliers(pooled(nn.Conv2d(3, 16, 3), nn.ReLU(), middle, nn.ReLU(), nn.Conv2d(16, 16, 1)))


@pytest.mark.parametrize(
    ("name", "make", "gain"),
    [
        ("equalisation", relu_net, 6.0),
        ("equalisation", depthwise_net, 6.0),
        ("smoothquant", relu_net, 6.0),
        ("smoothquant", norm_net, 6.0),
    ],
)
def test_outlier_channels_stop_costing(name: str, make: Callable[[], nn.Sequential], gain: float) -> None:
    net = make()
    before, after = logits_sqnr(net, ()), logits_sqnr(net, (name,))
    assert after > before + gain


@pytest.mark.parametrize("name", ["equalisation", "smoothquant"])
@pytest.mark.parametrize("make", [relu_net, norm_net, depthwise_net, AugmentedPair, TwoReaders])
def test_the_function_stays(name: str, make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(1)
    net, _ = to_deploy(make().eval(), torch.rand(1, 3, 32, 32))
    state = {key: tensor.clone() for key, tensor in net.state_dict().items()}
    layers = [path for path, layer in net.named_modules() if isinstance(layer, nn.Conv2d) and layer.groups == 1]
    changed, counts = apply_before(net, layers, source(), (name,))
    x = torch.from_numpy(images())
    with torch.inference_mode():
        expected, found = net(x), changed(x)
    assert float((found - expected).abs().max()) <= 1e-5 * float(expected.abs().max())
    assert all(torch.equal(tensor, state[key]) for key, tensor in net.state_dict().items()), "the network given"
    differs = any(not torch.equal(tensor, state[key]) for key, tensor in changed.state_dict().items())
    assert differs == (counts[name] > 0)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_every_input_channel_of_a_reader_has_its_range(groups: int) -> None:
    layer, plain = nn.Conv2d(8, 12, 3, groups=groups), nn.Conv2d(8, 4, 1)
    expected = [0.0] * 8
    for each, count in ((layer, groups), (plain, 1)):
        for output, rows in enumerate(each.weight.detach()):
            first = output // (len(each.weight) // count) * len(rows)
            for index, row in enumerate(rows):
                expected[first + index] = max(expected[first + index], float(row.abs().max()))
    assert reader_range([layer, plain]).tolist() == pytest.approx(expected)


def test_both_sides_of_an_augmented_convolution_are_linked() -> None:
    links = find_links(to_deploy(AugmentedPair().eval(), torch.rand(1, 3, 32, 32))[0], SHAPE)
    inner = ("augmented.conv_out", "augmented.attention.conv_qkv")
    assert Link(("before",), inner) in links
    assert Link(("augmented.conv_out", "augmented.attention.attn_out"), ("after",)) in links


def test_every_reader_counts() -> None:
    assert Link(("first",), ("left", "right")) in find_links(TwoReaders().eval(), SHAPE)


class Between(nn.Module):
    """Two convolutions with anything in between."""

    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.between = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 16, 1), between
        self.add = ResidualAdd()

    def forward(self, x: Tensor) -> Tensor:
        pooled: Tensor = self.second(self.between(self.first(x))).mean((2, 3))
        return pooled


@pytest.mark.parametrize(
    "between",
    [nn.functional.gelu, nn.functional.relu6, lambda x: x + 1, lambda x: x.flip(1), lambda x: (x, x.sum())[0] * x],
)
def test_nothing_moves_where_it_would_not_be_exact(between: Callable[[Tensor], Tensor]) -> None:
    assert find_links(Between(between).eval(), SHAPE) == []


def test_nothing_moves_through_shared_read_or_foreign_weights() -> None:
    shared = nn.Conv2d(16, 16, 1)
    assert find_links(nn.Sequential(shared, nn.ReLU(), shared), SHAPE) == []
    tied = Between(nn.functional.relu)
    tied.second = nn.Conv2d(16, 16, 1)
    tied.register_module("other", nn.Conv2d(16, 16, 1))
    tied.other.weight = tied.second.weight  # type: ignore[union-attr]
    assert find_links(tied, SHAPE) == []

    class Own(nn.Conv2d):
        pass

    assert find_links(nn.Sequential(Own(3, 16, 1), nn.ReLU(), nn.Conv2d(16, 16, 1)), SHAPE) == []
    # the channels of the first are not those of the second
    assert find_links(nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Conv2d(16, 16, 1)), SHAPE) == []
    assert find_links(nn.Sequential(nn.LayerNorm(16), nn.Conv2d(16, 16, 1)), SHAPE) == []


def test_a_network_that_checks_shapes_has_links() -> None:
    class Checked(TwoReaders):
        def forward(self, x: Tensor) -> Tensor:
            batch, channels, height, width = x.shape
            if channels != 3 or height < 5 or width < 5:
                raise ValueError
            return super().forward(x).reshape(batch, -1)

    assert find_links(Checked().eval(), SHAPE) == [Link(("first",), ("left", "right"))]


def test_a_network_that_cannot_be_traced_stays() -> None:
    class Loop(Between):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x if float(x.sum()) > 0 else -x)

    net = Loop(nn.functional.relu).eval()
    assert apply_before(net, ["second"], source(), ("equalisation", "smoothquant"))[1] == {
        "equalisation": 0,
        "smoothquant": 0,
    }


def test_the_norm_of_each_trunk_block_is_linked(make_net: Callable[..., PatchConvNet]) -> None:
    links = find_links(to_deploy(make_net(depth=2), torch.rand(1, 3, 32, 48))[0], (3, 32, 48))
    assert [link for link in links if "norm1" in link.producers[0]] == [
        Link((f"blocks.{index}.norm1",), (f"blocks.{index}.attn.qkv_pos.0",)) for index in range(2)
    ]


@pytest.mark.parametrize("make", [relu_net, norm_net])
@pytest.mark.parametrize("given", [np.zeros((4, *SHAPE), np.float32), np.ones((1, *SHAPE), np.float32)])
def test_dead_channels_and_constant_images(
    make: Callable[[], nn.Sequential], given: np.ndarray[tuple[int, ...], np.dtype[np.float32]]
) -> None:
    net = make()
    with torch.no_grad():
        for layer in net:
            if isinstance(layer, nn.Conv2d | LayerNorm2d):
                layer.weight[3] = 0
                layer.bias[3] = 0  # type: ignore[index]
    for recovery in (("equalisation",), ("smoothquant",)):
        found = prepared(net, recovery, given)
        assert all(tensor.isfinite().all() for tensor in found.deployed.state_dict().values())
        assert all(scale.input > 0 and (scale.weight > 0).all() for scale in found.scales.values())
