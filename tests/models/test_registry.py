"""Named architectures: counts, shapes from a file, the user's own factory, and what is refused."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from pcn_deploy.errors import CheckpointError, ModelError, OptionError
from pcn_deploy.models.catalogue import ModelInfo
from pcn_deploy.models.patchconvnet import PatchConvNet
from pcn_deploy.models.registry import create_model, find_model, list_models

NAMED = [info for info in list_models() if info.arguments]


def multiply_accumulates(net: nn.Module, resolution: tuple[int, int]) -> float:
    """Products of weights and of attention for one image, in 10^9, as PyTorch counts them."""
    with FlopCounterMode(display=False) as counter:
        net(torch.empty(1, 3, *resolution, device="meta"))
    return float(counter.get_total_flops()) / 2e9


def test_the_networks_of_both_papers_are_registered() -> None:
    resnets, mnasnets = ("34", "50", "101", "152"), ("075", "100", "125", "140")
    assert [info.name for info in NAMED] == [
        *(f"patchconvnet_{form}" for form in ("s60", "s120", "b60", "b120", "l60", "l120", "s60_multi")),
        *(f"resnet{depth}" for depth in resnets),
        *(f"aa_resnet{depth}" for depth in resnets),
        "aa_resnet50_legacy",
        *(f"resnet{depth}_attnpool" for depth in resnets),
        "wide_resnet28_10",
        "aa_wide_resnet28_10",
        *(f"mnasnet_{width}" for width in mnasnets),
        *(f"aa_mnasnet_{width}" for width in mnasnets),
    ]


@pytest.mark.parametrize("info", NAMED, ids=lambda info: info.name)
def test_registered_counts_are_those_of_the_network(info: ModelInfo) -> None:
    module, _, name = info.factory.partition(":")
    with torch.device("meta"):
        net = getattr(importlib.import_module(module), name)(**info.arguments).eval()
    assert sum(parameter.numel() for parameter in net.parameters()) == info.parameters
    assert round(multiply_accumulates(net, info.resolution), 2) == info.gmacs


# Millions of parameters. PatchConvNet: facebookresearch/deit, README_patchconvnet.md. AA-ResNets and wide ResNets:
# Bello et al., tables 1 and 2. ResNets: the same tables, and torchvision for 152. MnasNet: mingxingtan/mnasnet.
PUBLISHED = {
    "patchconvnet_s60": 25.2,
    "patchconvnet_s120": 47.7,
    "patchconvnet_b60": 99.4,
    "patchconvnet_b120": 188.6,
    "patchconvnet_s60_multi": 25.6,
    "resnet34": 21.8,
    "aa_resnet34": 20.7,
    "resnet50": 25.6,
    "aa_resnet50": 25.8,
    "resnet101": 44.5,
    "aa_resnet101": 45.4,
    "resnet152": 60.19,
    "wide_resnet28_10": 36.3,
    "aa_wide_resnet28_10": 36.2,
    "mnasnet_075": 2.9,
    "mnasnet_100": 3.9,
    "mnasnet_140": 6.1,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_the_published_ones_within_half_a_percent(name: str) -> None:
    info = find_model(name)
    assert info is not None
    assert info.parameters / 1e6 == pytest.approx(PUBLISHED[name], rel=0.005)


def test_random_weights_depend_on_the_seed_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first, again, other = (
        create_model("patchconvnet", random_weights=True, seed=seed, width=32, depth=1, num_classes=7)
        for seed in (3, 3, 4)
    )
    assert torch.equal(torch.rand(3), expected), "the caller's random numbers are left alone"
    pairs = list(
        zip(first.state_dict().values(), again.state_dict().values(), other.state_dict().values(), strict=True)
    )
    assert all(torch.equal(a, b) for a, b, _ in pairs)
    assert not all(torch.equal(a, c) for a, _, c in pairs)
    assert not first.training
    assert first(torch.zeros(1, 3, 32, 32)).shape == (1, 7)


@pytest.mark.parametrize("arguments", [{}, {"weights": "x.pth", "random_weights": True}])
def test_weights_are_given_or_random_but_never_by_default(arguments: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match="--random-weights"):
        create_model("patchconvnet", **arguments)


def test_unknown_name_gets_the_closest() -> None:
    with pytest.raises(ModelError, match=r"Did you mean patchconvnet_s60"):
        find_model("patchconvnet_s_60")
    with pytest.raises(ModelError, match=r"Known: patchconvnet_s60, .*file\.py:factory"):
        find_model("zzz")


SHAPES: list[dict[str, Any]] = [
    {"width": 16, "depth": 1, "num_classes": 3},
    {"width": 32, "depth": 12, "num_classes": 10, "patch": 8},
    {"width": 48, "depth": 2, "num_classes": 5, "patch": 4, "in_channels": 1, "mlp_ratio": 2.5},
    {"width": 32, "depth": 2, "num_classes": 12, "multi_class_token": True},
    {"width": 392, "depth": 1, "num_classes": 2, "mlp_ratio": 1.125},
]


@pytest.mark.parametrize("shape", SHAPES)
def test_shape_is_read_from_the_file(
    tmp_path: Path, make_net: Callable[..., PatchConvNet], shape: dict[str, Any]
) -> None:
    net = make_net(**shape)
    torch.save(net.state_dict(), tmp_path / "net.pth")
    loaded = create_model("patchconvnet", weights=tmp_path / "net.pth")
    images = torch.rand(1, shape.get("in_channels", 3), 48, 32)
    assert isinstance(loaded, PatchConvNet)
    assert (loaded.patch, loaded.multi_class_token) == (net.patch, net.multi_class_token)
    assert torch.equal(loaded(images), net(images))


def test_any_hidden_width_is_read_from_the_file(tmp_path: Path) -> None:
    """hidden / width * width may fall below hidden in floating point."""
    width, hidden = next(
        (width, hidden)
        for width in range(8, 400, 8)
        for hidden in range(width, 4 * width)
        if int(width * (hidden / width)) != hidden
    )
    net = PatchConvNet(width=width, depth=1, num_classes=2, mlp_ratio=(hidden + 0.5) / width)
    assert net.state_dict()["blocks_token_only.0.mlp.fc1.weight"].shape[0] == hidden
    torch.save(net.state_dict(), tmp_path / "net.pth")
    loaded = create_model("patchconvnet", weights=tmp_path / "net.pth")
    assert loaded.state_dict()["blocks_token_only.0.mlp.fc1.weight"].shape[0] == hidden


def test_a_named_form_takes_only_the_classes_from_the_file(
    tmp_path: Path, make_net: Callable[..., PatchConvNet]
) -> None:
    torch.save(make_net(width=384, depth=2, num_classes=7).state_dict(), tmp_path / "shallow.pth")
    with pytest.raises(CheckpointError, match=r"754 missing: blocks\.10\.attn") as caught:
        create_model("patchconvnet_s60", weights=tmp_path / "shallow.pth")
    assert "misshapen" not in str(caught.value), "the head of 7 classes was accepted"


def test_wrong_number_of_classes_is_misshapen(tmp_path: Path, make_net: Callable[..., PatchConvNet]) -> None:
    torch.save(make_net().state_dict(), tmp_path / "net.pth")
    with pytest.raises(CheckpointError, match=r"head\.weight \(10, 32\) instead of \(11, 32\)"):
        create_model("patchconvnet", weights=tmp_path / "net.pth", num_classes=11)


FACTORIES = """
from torch import nn

def good(num_classes=4):
    return nn.Sequential(nn.Flatten(), nn.Linear(12, num_classes)).train()

def broken():
    raise KeyError("no such width")

def wrong():
    return 3

made = good()

def with_neighbour():
    from neighbour_for_the_registry_test import make
    return make()
"""


def test_the_users_own_factory(tmp_path: Path) -> None:
    path = tmp_path / "factories_for_the_registry_test.py"
    path.write_text(FACTORIES)
    model = create_model(f"{path}:good", random_weights=True, num_classes=6)
    assert model(torch.zeros(2, 3, 2, 2)).shape == (2, 6)
    assert not model.training
    weights = {"1.weight": torch.ones(4, 12), "1.bias": torch.zeros(4)}
    torch.save(weights, tmp_path / "own.pth")
    loaded = create_model(f"{path}:good", weights=tmp_path / "own.pth")
    assert torch.equal(loaded(torch.ones(1, 3, 2, 2)), torch.full((1, 4), 12.0))
    (tmp_path / "neighbour_for_the_registry_test.py").write_text("from torch import nn\nmake = nn.Flatten\n")
    assert isinstance(create_model(f"{path}:with_neighbour"), torch.nn.Flatten)
    refusals = {"broken": "no such width", "wrong": "returned int", "absent": "absent", "made": "is a network, not"}
    for name, words in refusals.items():
        with pytest.raises(ModelError, match=words):
            create_model(f"{path}:{name}", random_weights=True)
    with pytest.raises(ModelError, match="no such file"):
        create_model(f"{tmp_path / 'nowhere.py'}:good", random_weights=True)
    with pytest.raises(ModelError, match="No module named"):
        create_model("no_such_package_at_all:good", random_weights=True)
