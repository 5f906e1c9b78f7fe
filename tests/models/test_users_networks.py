"""What users' networks bring along: wrappers, parts of training, code that asks its own modules."""

from __future__ import annotations

import threading
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from pcn_deploy.calibration.plan.facts import inspect_layers
from pcn_deploy.errors import CheckpointError, ModelError
from pcn_deploy.models.checkpoint import load_strict, read_state_dict
from pcn_deploy.models.registry import create_model
from pcn_deploy.network.deploy import to_deploy
from pcn_deploy.network.evaluation_mode import in_evaluation_mode

IMAGES = torch.rand(2, 3, 8, 8)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.Conv2d(16, 16, 3)])
        self.head = nn.Linear(16, 5)
        self.layers[1].running_mean, self.layers[1].running_var = torch.rand(16), 0.5 + torch.rand(16)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


def same(model: nn.Module, other: nn.Module) -> None:
    with torch.no_grad():
        torch.testing.assert_close(other(IMAGES), model(IMAGES), atol=1e-5, rtol=1e-4)


class AsksForNorms(Net):
    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
            if isinstance(layer, nn.BatchNorm2d):
                x = F.relu(x)
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


class ReadsTheNorm(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.layers[1].weight.sum()  # type: ignore[operator]


class UsesAWeightTwice(Net):
    def forward(self, x: Tensor) -> Tensor:
        y = self.layers[2](self.layers[1](self.layers[0](x)))
        y = y + F.pad(F.conv2d(x, self.layers[0].weight), [-1] * 4)  # type: ignore[arg-type]
        logits: Tensor = self.head(y.mean((2, 3)))
        return logits


@pytest.mark.parametrize("kind", [AsksForNorms, ReadsTheNorm])
def test_a_rewrite_that_changes_the_network_is_left_out(kind: Callable[[], nn.Module]) -> None:
    net = kind().eval()
    deployed, applied = to_deploy(net, IMAGES)
    assert applied["fold_batch_norm"] == 0
    same(net, deployed)


def test_a_weight_that_is_used_elsewhere_stays_there_when_a_norm_is_folded_into_it() -> None:
    net = UsesAWeightTwice().eval()
    deployed, applied = to_deploy(net, IMAGES)
    assert applied["fold_batch_norm"] == 1
    same(net, deployed)


class ActivatedNorm(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


class ChecksShapes(Net):
    """Its norm ends in an activation, and it looks at the shape of what it is given, which stops a plain trace."""

    def __init__(self) -> None:
        super().__init__()
        norm = ActivatedNorm(16)
        norm.load_state_dict(self.layers[1].state_dict())
        self.layers[1] = norm

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] != 3 or x.shape[2] < 5:
            raise ValueError
        return super().forward(x)


def test_norms_are_folded_in_networks_that_check_shapes_and_where_they_end_in_an_activation() -> None:
    net = ChecksShapes().eval()
    deployed, applied = to_deploy(net, IMAGES)
    assert applied["fold_batch_norm"] == 1
    assert not any(isinstance(module, nn.BatchNorm2d) for module in deployed.modules())
    same(net, deployed)


def test_the_other_rewrites_stay() -> None:
    net = AsksForNorms().eval()
    nn.utils.parametrizations.weight_norm(net.layers[2])
    deployed, applied = to_deploy(net, IMAGES)
    assert (applied["fuse_reparametrizations"], applied["fold_batch_norm"]) == (1, 0)
    same(net, deployed)


@pytest.mark.parametrize("wrap", [nn.DataParallel, AveragedModel, torch.compile])
def test_wrappers_are_taken_away(wrap: Callable[[nn.Module], nn.Module]) -> None:
    net = Net().eval()
    found = in_evaluation_mode(wrap(net))
    assert type(found) is Net
    same(net, found)


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile])
def test_wrapped_parts_are_unwrapped(wrap: Callable[[nn.Module], nn.Module]) -> None:
    net, whole = Net().eval(), Net().eval()
    whole.load_state_dict(net.state_dict())
    net.set_submodule("layers", wrap(net.layers))
    found = in_evaluation_mode(net)
    assert [path for path, _ in found.named_modules()] == [path for path, _ in whole.named_modules()]
    same(whole, found)


def test_what_scripts_still_does(make_net: Callable[..., nn.Module]) -> None:
    net = make_net()
    net.compile()
    torch.jit.script(in_evaluation_mode(net))
    torch.jit.script(in_evaluation_mode(make_net()))


def test_synchronised_norms_become_plain_ones() -> None:
    net = Net().eval()
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(net)  # type: ignore[no-untyped-call]
    found = in_evaluation_mode(converted)
    assert type(found.get_submodule("layers.1")) is nn.BatchNorm2d
    assert type(converted.get_submodule("layers.1")) is nn.SyncBatchNorm, "the caller's network is left alone"
    torch.jit.script(found)
    assert to_deploy(found, IMAGES)[1]["fold_batch_norm"] == 1


class Frozen(Net):
    def train(self, mode: bool = True) -> Any:
        super().train(mode)
        self.layers[1].eval()


class Remembers(Net):
    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, list[Tensor]] = {"first": []}

    def get_extra_state(self) -> dict[str, int]:
        return {"version": 1}

    def set_extra_state(self, state: Any) -> None:
        pass

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        self.seen["first"] = [y]
        return y


@pytest.mark.parametrize("kind", [Frozen, Remembers])
def test_they_can_be_copied(kind: Callable[[], nn.Module]) -> None:
    net = kind()
    net.eval()
    net(IMAGES)  # what is remembered has a history
    same(net, in_evaluation_mode(net))


def test_what_cannot_be_copied_is_named() -> None:
    net = Net()
    net.lock = threading.Lock()  # type: ignore[assignment]
    with pytest.raises(ModelError, match=r"an attribute cannot be copied .*lock"):
        in_evaluation_mode(net)


def test_layers_with_methods_of_their_own_are_no_plain_layers() -> None:
    net = Net().eval()
    for index, name in ((0, "forward"), (2, "_conv_forward")):
        layer = net.layers[index]
        setattr(layer, name, types.MethodType(getattr(type(layer), name), layer))
    facts = {layer.path: layer.own_forward for layer in inspect_layers(net, IMAGES[:1])}
    assert facts == {"layers.0": True, "layers.1": False, "layers.2": True, "head": False}


# Files.


class Logits(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = Net()


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight


def test_a_file_of_the_network_inside_fits() -> None:
    net, outer = Net(), Logits()
    load_strict(outer, net.state_dict(), "file")
    assert torch.equal(outer.net.head.weight, net.head.weight)


def test_names_that_agree_to_the_letter_are_left_alone(tmp_path: Path) -> None:
    net = nn.DataParallel(Net())
    torch.save(net.state_dict(), tmp_path / "net.pth")
    load_strict(nn.DataParallel(Net()), read_state_dict(tmp_path / "net.pth"), "file")


class Aliased(Net):
    def __init__(self) -> None:
        super().__init__()
        self.also = [self.head.weight]

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) @ self.also[0]


def test_another_name_of_a_weight_is_loaded_too() -> None:
    net, other = Aliased().eval(), Aliased().eval()
    load_strict(other, net.state_dict(), "file")
    same(net, other)


def test_tied_weights_are_needed_once() -> None:
    net, other = Tied(), Tied()
    state = {name: value for name, value in net.state_dict().items() if name != "second.weight"}
    load_strict(other, state, "file")
    assert other.second.weight is other.first.weight
    assert torch.equal(other.first.weight, net.first.weight)


def test_names_that_the_network_translates_itself_fit() -> None:
    old, new = nn.Sequential(nn.Conv2d(3, 4, 1)), nn.Sequential(nn.Conv2d(3, 4, 1))
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(old[0])
    nn.utils.parametrizations.weight_norm(new[0])
    load_strict(new, old.state_dict(), "file")
    torch.testing.assert_close(new(IMAGES), old(IMAGES))


def test_masks_of_infinity_are_numbers(tmp_path: Path) -> None:
    torch.save({"mask": torch.full((3, 3), -torch.inf).triu(1), "weight": torch.ones(2)}, tmp_path / "ok.pth")
    assert set(read_state_dict(tmp_path / "ok.pth")) == {"mask", "weight"}
    torch.save({"weight": torch.tensor([1.0, torch.inf])}, tmp_path / "bad.pth")
    with pytest.raises(CheckpointError, match="NaN or infinite values in 1 tensors: weight"):
        read_state_dict(tmp_path / "bad.pth")


def test_a_file_without_tensors_says_what_it_has(tmp_path: Path) -> None:
    torch.save({"student": {"w": torch.ones(2)}, "teacher": {"w": torch.ones(2)}, "epoch": 3}, tmp_path / "odd.pth")
    with pytest.raises(CheckpointError, match=r"It has the keys 'student', 'teacher', 'epoch'\. Save it as"):
        read_state_dict(tmp_path / "odd.pth")


FACTORY = """
import torch
from torch import nn

def typed():
    torch.set_default_dtype(torch.float64)
    return nn.Sequential(nn.Conv2d(3, 4, 3)).float()

def exported():
    return torch.export.export(nn.Conv2d(3, 4, 3), (torch.zeros(1, 3, 8, 8),)).module()
"""


def test_a_file_of_the_network_and_a_little_more_says_which_part_fits(tmp_path: Path) -> None:
    (tmp_path / "odd_factories.py").write_text(FACTORY)
    net = nn.Sequential(nn.Conv2d(3, 4, 3))
    saved = {**{f"model.{name}": value for name, value in net.state_dict().items()}, "loss.weight": torch.ones(2)}
    torch.save(saved, tmp_path / "lightning.ckpt")
    with pytest.raises(CheckpointError, match=r"\nIts 2 tensors under 'model\.' fit: save those only\.$"):
        create_model(f"{tmp_path / 'odd_factories.py'}:typed", weights=tmp_path / "lightning.ckpt")


def test_factories(tmp_path: Path) -> None:
    (tmp_path / "odd_factories.py").write_text(FACTORY)
    create_model(f"{tmp_path / 'odd_factories.py'}:typed")
    assert torch.get_default_dtype() == torch.float32
    with pytest.raises(ModelError, match=r"returned a program of torch\.export"):
        create_model(f"{tmp_path / 'odd_factories.py'}:exported")
