"""Exact rewrites: each alone leaves the outputs as they are and changes the structure it is there to change."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pcn_deploy.models.aggregation import Aggregation, AttentionPool2d, TokenBlock
from pcn_deploy.models.attention_conv import AttentionAugmentedConv2d, RelativeSelfAttention2d
from pcn_deploy.models.augmentation import Augmentation
from pcn_deploy.models.mnasnet import MnasNet
from pcn_deploy.models.patchconvnet import PatchConvNet, TrunkBlock
from pcn_deploy.models.resnet import ResNet
from pcn_deploy.models.wide_resnet import WideResNet
from pcn_deploy.network.deploy import (
    AbsorbedAggregation,
    absorb_key_value,
    fold_attention_scale,
    fold_batch_norm,
    fold_layer_scale,
    to_deploy,
)

MakeNet = Callable[..., PatchConvNet]
FORMS: list[dict[str, Any]] = [{}, {"multi_class_token": True, "num_classes": 20}]


def check_equal(plain: nn.Module, rewritten: nn.Module, fill: ModuleType, channels: int = 3) -> None:
    images = torch.from_numpy(fill.images_for((2, channels, 48, 80), 4))
    with torch.inference_mode():
        expected, found = plain(images), rewritten(images)
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def apply(rewrite: Callable[[nn.Module, Tensor], int], model: nn.Module) -> tuple[Any, int]:
    rewritten = copy.deepcopy(model)
    with torch.no_grad():
        count = rewrite(rewritten, torch.rand(1, 3, 48, 80))
    return rewritten, count


@pytest.mark.parametrize("form", FORMS)
def test_layer_scale_is_folded(make_net: MakeNet, fill: ModuleType, form: dict[str, Any]) -> None:
    plain = make_net(**form)
    rewritten, count = apply(fold_layer_scale, plain)
    assert count == 3 + 2, "one per trunk block, two in the token block"
    assert not [name for name in rewritten.state_dict() if "gamma" in name]
    assert all(block.gamma_1 is None for block in rewritten.modules() if isinstance(block, TrunkBlock | TokenBlock))
    check_equal(plain, rewritten, fill)
    assert apply(fold_layer_scale, rewritten)[1] == 0, "a second time there is nothing left to fold"


@pytest.mark.parametrize("form", FORMS)
def test_attention_scale_is_folded(make_net: MakeNet, fill: ModuleType, form: dict[str, Any]) -> None:
    plain = make_net(**form)
    rewritten, count = apply(fold_attention_scale, plain)
    attn = rewritten.blocks_token_only[0].attn
    assert (count, attn.scale) == (1, 1.0)
    assert isinstance(attn, Aggregation)
    assert not torch.equal(attn.q.weight, plain.state_dict()["blocks_token_only.0.attn.q.weight"])
    check_equal(plain, rewritten, fill)


@pytest.mark.parametrize("scale_first", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_keys_and_values_are_absorbed(
    make_net: MakeNet, fill: ModuleType, form: dict[str, Any], scale_first: bool
) -> None:
    plain = make_net(**form)
    before = apply(fold_attention_scale, plain)[0] if scale_first else plain
    rewritten, count = apply(absorb_key_value, before)
    attn = rewritten.blocks_token_only[0].attn
    assert count == 1
    assert isinstance(attn, AbsorbedAggregation)
    assert attn.query.shape == ((20 if form else 1), 32)
    assert attn.project_first == bool(form)
    assert not [name for name in rewritten.state_dict() if name.startswith("blocks_token_only.0.attn.k")]
    check_equal(plain, rewritten, fill)


def conv_bn(fill: ModuleType) -> nn.Sequential:
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1), nn.BatchNorm2d(4)
    )
    fill.fill_(net, 1)
    return net.eval()


def test_batch_norm_is_folded_in_a_sequential(fill: ModuleType) -> None:
    plain = conv_bn(fill)
    rewritten, count = apply(fold_batch_norm, plain)
    assert count == 2
    assert [type(layer) for layer in rewritten] == [nn.Conv2d, nn.Identity, nn.ReLU, nn.Conv2d, nn.Identity]
    assert rewritten[0].bias is not None
    check_equal(plain, rewritten, fill)


class Residual(nn.Module):
    """A ResNet-like block; `stem` is read by two layers, `twice` runs two times, `loose` has no statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.bn0 = nn.BatchNorm2d(8)
        self.conv1 = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.twice = nn.Conv2d(8, 8, 1)
        self.bn2 = nn.BatchNorm2d(8)
        self.last = nn.Conv2d(8, 8, 1)
        self.loose = nn.BatchNorm2d(8, track_running_stats=False)

    def forward(self, x: Tensor) -> Tensor:
        stem = self.stem(x)
        y = self.bn1(self.conv1(torch.relu(self.bn0(stem)))) + stem
        y = self.twice(self.bn2(self.twice(torch.relu(y))))
        normalised: Tensor = self.loose(self.last(y))
        return normalised


def test_batch_norm_is_folded_along_the_data_flow(fill: ModuleType) -> None:
    plain = Residual()
    fill.fill_(plain, 2)
    plain.eval()
    rewritten, count = apply(fold_batch_norm, plain)
    assert count == 1
    assert isinstance(rewritten.bn1, nn.Identity)
    assert all(isinstance(norm, nn.BatchNorm2d) for norm in (rewritten.bn0, rewritten.bn2, rewritten.loose))
    check_equal(plain, rewritten, fill)


class Backwards(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        for layer in reversed(list(self)):
            x = layer(x)
        return x


class ActivatedNorm(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


class StandardisedConv(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight / self.weight.flatten(1).norm(dim=1)[:, None, None, None]
        y: Tensor = self._conv_forward(x, weight, self.bias)
        return y


@pytest.mark.parametrize(
    "make",
    [
        lambda: Backwards(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3)),
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), ActivatedNorm(4)),
        lambda: nn.Sequential(StandardisedConv(3, 4, 3), nn.BatchNorm2d(4)),
    ],
    ids=["own order", "norm with activation", "standardised weights"],
)
def test_look_alikes_are_not_folded(fill: ModuleType, make: Callable[[], nn.Module]) -> None:
    plain = make()
    fill.fill_(plain, 3)
    plain.eval()
    rewritten, count = apply(fold_batch_norm, plain)
    assert count == 0
    check_equal(plain, rewritten, fill)


@pytest.mark.parametrize("form", FORMS)
def test_to_deploy_leaves_the_given_model_alone(make_net: MakeNet, fill: ModuleType, form: dict[str, Any]) -> None:
    plain = make_net(**form).train()
    plain.head.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    needs = {name: parameter.requires_grad for name, parameter in plain.named_parameters()}
    deployed, applied = to_deploy(plain, torch.rand(1, 3, 48, 80))
    assert {rewrite: count for rewrite, count in applied.items() if count} == {
        "fold_layer_scale": 5,
        "fold_attention_scale": 1,
        "absorb_key_value": 1,
    }
    assert plain.training
    assert {name: parameter.requires_grad for name, parameter in plain.named_parameters()} == needs
    after = plain.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert not deployed.training
    assert not [name for name, parameter in deployed.named_parameters() if parameter.requires_grad]
    check_equal(plain.eval(), deployed, fill)


def test_to_deploy_shares_the_weights_it_does_not_change(make_net: MakeNet) -> None:
    plain = make_net()
    given, deployed = plain.state_dict(), to_deploy(plain, torch.rand(1, 3, 48, 80))[0].state_dict()
    shared = {name for name in given.keys() & deployed.keys() if given[name].data_ptr() == deployed[name].data_ptr()}
    folded = {f"blocks.{index}.attn.qkv_pos.5" for index in range(3)} | {"blocks_token_only.0.mlp.fc2"}
    own = {f"{layer}.{leaf}" for layer in folded for leaf in ("weight", "bias")}
    assert shared == {name for name in given.keys() & deployed.keys() if name not in own}
    assert {"patch_embed.proj.0.0.weight", "head.weight", "norm.bias"} <= shared


def test_to_deploy_folds_batch_norm_without_touching_its_statistics(fill: ModuleType) -> None:
    plain = conv_bn(fill)
    before = copy.deepcopy(plain.state_dict())
    deployed, applied = to_deploy(plain, torch.rand(1, 3, 48, 80))
    assert applied["fold_batch_norm"] == 2
    assert all(torch.equal(plain.state_dict()[name], tensor) for name, tensor in before.items())
    check_equal(plain, deployed, fill)


@pytest.mark.parametrize(("multi", "tokens"), [(False, 1), (True, 10)])
def test_final_norm_sees_class_tokens_only(make_net: MakeNet, multi: bool, tokens: int) -> None:
    deployed, _ = to_deploy(make_net(multi_class_token=multi), torch.rand(1, 3, 48, 80))
    shapes: list[torch.Size] = []
    deployed.get_submodule("norm").register_forward_hook(lambda _m, inputs, _o: shapes.append(inputs[0].shape))
    deployed(torch.zeros(2, 3, 64, 64))
    assert shapes == [(2, tokens, 32)]


class ByHand(nn.Module):
    """Walks through a Sequential itself and reads a convolution's output twice."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.body[0](x)
        z: Tensor = self.body[1](y) + y
        return z


def test_a_convolution_with_another_reader_is_not_folded(fill: ModuleType) -> None:
    relu = nn.ReLU()
    for plain in (
        ByHand(),
        nn.Sequential(nn.Conv2d(3, 4, 1), relu, nn.Conv2d(4, 4, 1), relu, nn.BatchNorm2d(4)),
    ):
        fill.fill_(plain, 4)
        rewritten, count = apply(fold_batch_norm, plain.eval())
        assert count == 0
        check_equal(plain, rewritten, fill)


def augmented(fill: ModuleType, *, pooling: str = "none", order: str = "qkv", conv_bias: bool = False) -> nn.Sequential:
    """An augmented convolution, 3 to 7 + 4 channels, with a BatchNorm after it."""
    choices = Augmentation(heads=2, kappa=6 / 11, upsilon=4 / 11, min_head_channels=1, order=order, conv_bias=conv_bias)
    conv = AttentionAugmentedConv2d(3, 11, 3, choices, size=(48, 80), stride=4, pooling=pooling)
    assert (conv.attention.dk, conv.attention.dv) == (6, 4)
    net = nn.Sequential(conv, nn.BatchNorm2d(11))
    fill.fill_(net, 6)
    return net.eval()


@pytest.mark.parametrize("conv_bias", [False, True])
@pytest.mark.parametrize("pooling", ["none", "attention", "layer"])
def test_batch_norm_is_folded_into_both_branches(fill: ModuleType, pooling: str, conv_bias: bool) -> None:
    plain = augmented(fill, pooling=pooling, conv_bias=conv_bias)
    rewritten, count = apply(fold_batch_norm, plain)
    assert count == 1
    assert [type(layer) for layer in rewritten] == [AttentionAugmentedConv2d, nn.Identity]
    images = torch.from_numpy(fill.images_for((2, 3, 48, 80), 4))
    with torch.inference_mode():
        expected, found = plain(images), rewritten(images)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert all(part.abs().max() > 0.1 for part in expected.split([7, 4], 1)), "both branches matter"


def test_batch_norm_without_weights_is_folded_into_both_branches(fill: ModuleType) -> None:
    plain = augmented(fill)
    plain[1] = nn.BatchNorm2d(11, affine=False, eps=0.1)
    fill.fill_(plain, 8)
    rewritten, count = apply(fold_batch_norm, plain.eval())
    assert count == 1
    check_equal(plain, rewritten, fill)


@pytest.mark.parametrize("order", ["qkv", "kqv"])
def test_scale_of_relative_attention_is_folded(fill: ModuleType, order: str) -> None:
    """Into the queries alone, which the terms of position read too."""
    plain = augmented(fill, order=order)
    rewritten, count = apply(fold_attention_scale, plain)
    before, after = (net.get_submodule("0.attention.conv_qkv").state_dict() for net in (plain, rewritten))
    assert count == 1
    assert rewritten[0].attention.scale == 1.0
    changed = [row for row in range(16) if not torch.equal(before["weight"][row], after["weight"][row])]
    assert changed == [row for row in range(16) if not torch.equal(before["bias"][row], after["bias"][row])]
    assert changed == list(range(6) if order == "qkv" else range(6, 12))
    images = torch.from_numpy(fill.images_for((2, 3, 48, 80), 4))
    with torch.inference_mode():
        torch.testing.assert_close(rewritten(images), plain(images), atol=1e-5, rtol=0)
    assert apply(fold_attention_scale, rewritten)[1] == 0


def test_attention_pooling_is_absorbed(fill: ModuleType) -> None:
    plain = nn.Sequential(nn.Conv2d(3, 16, 3, 4), AttentionPool2d(16))
    fill.fill_(plain, 3)
    plain.eval()
    rewritten, count = apply(absorb_key_value, plain)
    attn = rewritten[1].block.attn
    assert count == 1
    assert isinstance(attn, AbsorbedAggregation)
    assert (attn.query.shape, attn.attend_token, attn.project_first) == ((1, 16), True, False)
    check_equal(plain, rewritten, fill)
    folded, applied = to_deploy(plain, torch.rand(1, 3, 48, 80))
    assert applied == {
        "fuse_reparametrizations": 0,
        "lift_products": 0,
        "fold_batch_norm": 0,
        "separate_additions": 0,
        "fold_layer_scale": 2,
        "fold_attention_scale": 1,
        "absorb_key_value": 1,
    }
    check_equal(plain, folded, fill)


PAPER = Augmentation(heads=2, min_head_channels=4)
CONVOLUTIONAL: dict[str, tuple[Callable[[], nn.Module], list[int], int]] = {
    "resnet": (lambda: ResNet(block="basic", depths=(1, 1, 1, 1), num_classes=9), [12, 0, 0, 0], 0),
    "augmented resnet": (lambda: ResNet(depths=(1, 1, 1, 1), augmentation=PAPER, num_classes=9), [17, 0, 3, 0], 0),
    "attention pool": (
        lambda: ResNet(block="basic", depths=(1, 1, 1, 1), attention_pool=True, num_classes=9),
        [12, 2, 1, 1],
        0,
    ),
    "augmented wide": (lambda: WideResNet(depth=10, widen=1, augmentation=PAPER, num_classes=9), [3, 0, 3, 0], 4),
    "augmented mnasnet": (lambda: MnasNet(multiplier=0.25, augmentation=PAPER, num_classes=9), [49, 0, 13, 0], 0),
}


@pytest.mark.parametrize("name", CONVOLUTIONAL)
def test_to_deploy_of_the_convolutional_networks(fill: ModuleType, name: str) -> None:
    make, counts, norms_left = CONVOLUTIONAL[name]
    plain = make()
    fill.fill_(plain, 2)
    deployed, applied = to_deploy(plain.eval(), torch.rand(1, 3, 48, 80))
    folded = ("fold_batch_norm", "fold_layer_scale", "fold_attention_scale", "absorb_key_value")
    assert [applied.pop(rewrite) for rewrite in folded] == counts
    assert not any(applied.values())
    assert sum(isinstance(module, nn.BatchNorm2d) for module in deployed.modules()) == norms_left
    assert all(module.scale == 1.0 for module in deployed.modules() if isinstance(module, RelativeSelfAttention2d))
    check_equal(plain, deployed, fill)
