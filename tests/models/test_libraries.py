"""Networks of libraries by name: our own logic, with a fake library; the real ones have files of their own."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import pcn_deploy
from pcn_deploy import Transform
from pcn_deploy.errors import CheckpointError, DependencyError, ModelError, OptionError
from pcn_deploy.models.checkpoint import read_training_arguments
from pcn_deploy.models.libraries import LIBRARIES, configured_evaluation, configured_transform, find_library
from pcn_deploy.models.library import Evaluation, Library, share_of
from pcn_deploy.models.registry import create_model, make_model


class Net(nn.Module):
    def __init__(self, num_classes: int = 1000, width: int = 4) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3)
        self.norm = nn.BatchNorm2d(width)
        self.head = nn.Linear(width, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(self.norm(self.conv(x)).mean((2, 3)))
        return logits


class FakeLibrary(Library):
    """A fake: it has the networks `net` and `wide`, and is not imported."""

    package = "fake"
    listing = "print('net wide')"

    def names(self) -> Sequence[str]:
        return ["net", "wide"]

    def create(self, name: str, weights: Path | None, trained: Mapping[str, Any], arguments: dict[str, Any]) -> Any:
        return Net(**{"width": 8 if name == "wide" else 4, **arguments})

    def evaluation(self, name: str, weights: Path | None, trained: Mapping[str, Any]) -> Evaluation:
        side = int(trained.get("side", 32))
        return Evaluation(transform=Transform(resolution=(side, side)), origin="fake does")


@pytest.fixture(autouse=True)
def fake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LIBRARIES, "fake", FakeLibrary())


def make(name: str, **arguments: Any) -> Any:
    """`create_model`, of no type: each library has its own."""
    return create_model(name, **arguments)


def saved(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


def test_only_a_prefix_is_that_of_a_library() -> None:
    assert find_library("timm:resnet18") == (LIBRARIES["timm"], "resnet18")
    assert [find_library(name) for name in ("timm", "resnet50", "timm.models:resnet18", "net.py:timm")] == [None] * 4


def test_weights_are_given_or_random_but_never_by_default() -> None:
    with pytest.raises(OptionError, match="--random-weights"):
        make("fake:net")
    first, again = (make("fake:net", random_weights=True, seed=3) for _ in range(2))
    assert torch.equal(first.head.weight, again.head.weight)
    assert (first.head.out_features, first.training) == (1000, False)
    assert make("fake:net", random_weights=True, num_classes=7).head.out_features == 7


def test_names_and_arguments_that_the_library_does_not_know() -> None:
    with pytest.raises(ModelError, match=r"^fake has no classifier 'nett'\. Did you mean fake:net\? All names: python"):
        make("fake:nett", random_weights=True)
    with pytest.raises(
        ModelError, match=r"fake has no classifier 'zzz'\. All names: python -c \"print\('net wide'\)\"$"
    ):
        configured_transform("fake:zzz")
    with pytest.raises(ModelError, match=r"fake:net could not be made: TypeError: .*depth"):
        make("fake:net", random_weights=True, depth=3)
    with pytest.raises(ModelError, match="only timm:NAME and torchvision:NAME and fake:NAME do"):
        configured_transform("resnet50")


NET = Net(6)
STATE = NET.state_dict()
LAYOUTS = {
    "flat": STATE,
    "DataParallel": {f"module.{key}": value for key, value in STATE.items()},
    "compiled": {"model": {f"_orig_mod.{key}": value for key, value in STATE.items()}},
    "Lightning, model": {
        "state_dict": {f"model.{key}": value for key, value in STATE.items()},
        "hyper_parameters": {"lr": 0.1, "num_classes": 6},
        "pytorch-lightning_version": "2.5.0",
    },
    "Lightning, net": {"state_dict": {f"net.{key}": value for key, value in STATE.items()}, "hparams_name": "kwargs"},
    "Lightning, compiled": {"state_dict": {f"model._orig_mod.{key}": value for key, value in STATE.items()}},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_files_load_as_their_trainers_write_them(layout: str, tmp_path: Path) -> None:
    made = make_model("fake:net", weights=saved(tmp_path / "net.pth", LAYOUTS[layout]))
    assert all(torch.equal(value, STATE[name]) for name, value in made.network.state_dict().items())
    assert (made.weights_from, made.notes) == ("file", ())


def test_what_a_lightning_module_keeps_beside_its_network_is_left_and_named(tmp_path: Path) -> None:
    state = {**LAYOUTS["Lightning, model"]["state_dict"], "criterion.weight": torch.ones(6), "seen": torch.zeros(1)}
    path = saved(tmp_path / "net.ckpt", {"state_dict": state})
    made = make_model("fake:net", weights=path)
    assert all(torch.equal(value, STATE[name]) for name, value in made.network.state_dict().items())
    left = "holds the network under 'model.' and other tensors beside it, left: criterion.weight, seen."
    assert made.notes == (f"{path} {left}",)


def test_a_file_that_does_not_fit_says_what_it_is(tmp_path: Path) -> None:
    path = saved(tmp_path / "net.pth", {"model": STATE, "args": argparse.Namespace(model="net")})
    with pytest.raises(CheckpointError, match=r"\nIts classifier has 6 classes, --num-classes says 5: leave it out\.$"):
        make("fake:net", weights=path, num_classes=5)
    with pytest.raises(CheckpointError, match=r"misshapen: conv\.weight (.|\n)*trained as net: give fake:net as the"):
        make("fake:wide", weights=path)
    path = saved(tmp_path / "more.pth", {**STATE, "extra": torch.zeros(2)})
    with pytest.raises(CheckpointError, match="1 extra: extra"):
        make("fake:net", weights=path)
    assert make("fake:net", weights=saved(path, STATE), num_classes=6).head.out_features == 6


def test_a_network_that_cannot_be_made_without_values_is_made_with_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class NeedsValues(Net):
        def __init__(self, num_classes: int = 1000, width: int = 4) -> None:
            super().__init__(num_classes, width)
            self.scale = float(self.norm.weight.sum())

    monkeypatch.setattr(
        FakeLibrary, "create", lambda _self, _name, _file, _trained, arguments: NeedsValues(**arguments)
    )
    assert make("fake:net", weights=saved(tmp_path / "net.pth", STATE)).head.out_features == 6


def test_arguments_of_the_training_are_read_but_nothing_is_run(tmp_path: Path) -> None:
    for kind, args in (("space", argparse.Namespace(model="net", side=48)), ("dict", {"model": "net", "side": 48})):
        path = saved(tmp_path / f"{kind}.pth", {"model": STATE, "args": args})
        assert read_training_arguments(path) == {"model": "net", "side": 48}
        assert configured_transform("fake:net", path).resolution == (48, 48)
        evaluation = configured_evaluation("fake:wide", path)
        assert evaluation is not None
        assert evaluation.transform.resolution == (32, 32)
        assert evaluation.notes == (
            f"{path} was trained as net: the arguments of its training are not used for fake:wide.",
        )
    torch.save({"model": STATE, "args": {"side": 40}}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert read_training_arguments(tmp_path / "old.pth") == {"side": 40}
    assert configured_transform("fake:net", tmp_path / "old.pth").resolution == (32, 32), "it does not say of what"
    for content in ({"model": STATE, "args": [1]}, STATE):
        assert read_training_arguments(saved(tmp_path / "none.pth", content)) == {}
    with pytest.raises(CheckpointError, match=r"objects other than tensors \(it refers to pathlib"):
        configured_transform("fake:net", saved(tmp_path / "path.pth", {"model": STATE, "args": {"data": tmp_path}}))
    with pytest.raises(CheckpointError, match="does not exist"):
        configured_transform("fake:net", tmp_path / "nothing.pth")
    odd = saved(tmp_path / "odd.pth", {"model": STATE, "args": {"model": "net", "side": "wide"}})
    with pytest.raises(ModelError, match="fake:net has no image transform that can be read: ValueError"):
        configured_transform("fake:net", odd)


@pytest.mark.parametrize("package", ["timm", "torchvision"])
def test_a_library_that_is_missing_is_said_with_its_pip_line(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    message = rf"^{package} is not installed; .*: pip install {package}$"
    with pytest.raises(DependencyError, match=message):
        configured_transform(f"{package}:resnet18")
    with pytest.raises(DependencyError, match=message):
        make(f"{package}:resnet18", random_weights=True)


def test_a_library_that_does_not_fit_torch_is_told_from_one_that_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What timm fails with where torchvision was made for another torch; a fake timm fails so."""
    (tmp_path / "timm.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    monkeypatch.delitem(sys.modules, "timm", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(DependencyError, match=r"^timm cannot be imported .*: pip install --upgrade torchvision$"):
        configured_transform("timm:resnet18")
    (tmp_path / "timm.py").write_text("import no_such_package")
    with pytest.raises(DependencyError, match=r"^timm needs no_such_package; .*: pip install no_such_package$"):
        configured_transform("timm:resnet18")


@pytest.mark.parametrize("crop", [96, 224, 240, 299, 384])
def test_the_share_of_a_crop_gives_back_the_size_before_it(crop: int) -> None:
    for resize in range(crop, 2 * crop):
        transform = Transform(resolution=(crop, crop), crop_pct=share_of(crop, resize))
        assert transform.scaled((1000, 1000)) == (resize, resize)


def test_the_python_names() -> None:
    assert pcn_deploy.configured_transform("fake:net") == Transform(resolution=(32, 32))
    assert isinstance(pcn_deploy.create_model("fake:net", random_weights=True), Net)
