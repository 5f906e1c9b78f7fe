"""Weights that are computed in every run."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

from pcn_deploy.network.deploy import to_deploy
from pcn_deploy.network.reparametrization import fuse_reparametrizations
from pcn_deploy.network.sharing import share_weights

IMAGES = torch.rand(2, 3, 8, 8)


def pruned_twice(layer: nn.Module) -> nn.Module:
    prune.random_unstructured(layer, "weight", 0.3)  # type: ignore[no-untyped-call]
    return prune.l1_unstructured(layer, "weight", 0.3)  # type: ignore[no-untyped-call, no-any-return]


class Symmetric(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return (weight + weight.flip(-1)) / 2


def own(layer: nn.Module) -> nn.Module:
    return nn.utils.parametrize.register_parametrization(layer, "weight", Symmetric())


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize(
    "computed",
    [weight_norm, spectral_norm, pruned_twice, parametrizations.weight_norm, parametrizations.spectral_norm, own],
)
def test_fused_weights_compute_the_same(computed: Callable[[nn.Module], nn.Module]) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 5, 3)).eval()
    computed(net[0])
    computed(net[2])
    names = sorted(net.state_dict())
    with torch.no_grad():
        expected = net(IMAGES)
        deployed, rewrites = to_deploy(net, IMAGES)
        torch.testing.assert_close(deployed(IMAGES), expected, atol=1e-4, rtol=1e-4)
        assert torch.equal(net(IMAGES), expected) and sorted(net.state_dict()) == names, "the original is left alone"
    assert rewrites["fuse_reparametrizations"] == 2
    assert rewrites["fold_batch_norm"] == 1, "nothing hides the weight any more"
    assert {type(layer) for layer in deployed.children()} == {nn.Conv2d, nn.Identity}
    assert sorted(dict(deployed.named_parameters())) == ["0.bias", "0.weight", "2.bias", "2.weight"]
    assert not any(parameter.requires_grad for parameter in deployed.parameters())
    assert not any(layer._forward_pre_hooks for layer in deployed.children())


def test_other_hooks_stay() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3))
    net[0].register_forward_pre_hook(lambda _module, inputs: (inputs[0] * 2,))
    copy = share_weights(net)
    assert fuse_reparametrizations(copy) == 0
    assert len(copy.get_submodule("0")._forward_pre_hooks) == 1
