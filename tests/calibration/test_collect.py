"""One pass over the images gives the ranges; facts of layers come from one forward pass."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor, nn

from pcn_deploy.calibration import collect
from pcn_deploy.calibration.collect import calibrate
from pcn_deploy.calibration.plan.facts import inspect_layers
from pcn_deploy.calibration.plan.rules import make_plan
from pcn_deploy.calibration.record import Calibration
from pcn_deploy.data.images import ImageSource
from pcn_deploy.data.transform import Transform
from pcn_deploy.errors import DataError, ModelError, OptionError
from pcn_deploy.models.augmentation import Augmentation
from pcn_deploy.models.patchconvnet import PatchConvNet
from pcn_deploy.models.resnet import ResNet
from pcn_deploy.network.deploy import to_deploy

MakeNet = Callable[..., PatchConvNet]
IMAGES = np.random.default_rng(0).standard_normal((11, 3, 32, 48)).astype(np.float32)
LAYERS = ["patch_embed.proj.2.0", "blocks.1.attn.qkv_pos.5", "head"]


def source() -> ImageSource:
    return ImageSource(IMAGES, Transform(resolution=(32, 48)))


def test_ranges_do_not_depend_on_the_batch_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batch sizes change the last digits of activations in a convolution, so none is in this network."""
    net = nn.Sequential(nn.AvgPool2d(2), nn.ReLU()).eval()
    found: list[Calibration] = []
    for size in (1, 4, 11):
        monkeypatch.setattr(collect, "BATCH", size)
        found.append(calibrate(net, ["0", "1"], source(), "entropy"))
    assert found[0] == found[1] == found[2]
    assert found[0].images == 11
    assert found[0].ranges["0"] != found[0].ranges["1"]


def real_networks(make_net: MakeNet, fill: ModuleType) -> dict[str, nn.Module]:
    resnet = ResNet(
        block="basic",
        depths=(1, 1, 1, 1),
        image_size=64,
        num_classes=5,
        augmentation=Augmentation(heads=2, min_head_channels=2),
    )
    fill.fill_(resnet, 2)
    return {"PatchConvNet": make_net(depth=2), "AA-ResNet": resnet.eval()}


@pytest.mark.parametrize("name", ["PatchConvNet", "AA-ResNet"])
def test_real_networks_have_the_same_ranges_in_any_order_and_any_arrays(
    make_net: MakeNet, fill: ModuleType, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the batch nor where an image stands in it changes anything: no digit of any histogram."""
    net, _ = to_deploy(real_networks(make_net, fill)[name], torch.from_numpy(IMAGES))
    images = np.random.default_rng(0).standard_normal((17, 3, 32, 48)).astype(np.float32)
    layers = list(make_plan(inspect_layers(net, torch.zeros(1, 3, 32, 48)), "int8").quantized_entries)
    transform = Transform(resolution=(32, 48))
    expected = calibrate(net, layers, ImageSource([images], transform), "entropy")
    grouped = [*np.split(images[:12], 3), images[12], images[13:]]
    for given in (grouped, list(images)):
        assert calibrate(net, layers, ImageSource(given, transform), "entropy") == expected
    for seed in range(3):
        shuffled = np.random.default_rng(seed).permutation(images)
        found = calibrate(net, layers, ImageSource([shuffled], transform), "entropy")
        assert (found.statistics, found.ranges) == (expected.statistics, expected.ranges)
        assert found.dataset_sha256 != expected.dataset_sha256
    for size in (3, 5):
        monkeypatch.setattr(collect, "BATCH", size)
        assert calibrate(net, layers, ImageSource([images], transform), "entropy") == expected


@pytest.mark.parametrize("calibrator", ["max", "entropy", "mse", "percentile"])
def test_a_real_network(make_net: MakeNet, calibrator: str) -> None:
    net = make_net(depth=2)
    largest = dict.fromkeys(LAYERS, 0.0)

    def watch(path: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            largest[path] = max(largest[path], float(inputs[0].abs().max()))

        return hook

    told: list[tuple[int, int]] = []
    handles = [net.get_submodule(path).register_forward_pre_hook(watch(path)) for path in LAYERS]
    images = source()
    seen = calibrate(net, LAYERS, images, calibrator, lambda _step, done, total, _unit="": told.append((done, total)))
    assert seen.amax == largest
    assert (seen.images, seen.unreadable, seen.calibrator, seen.source) == (11, 0, calibrator, "the given arrays")
    assert len(seen.dataset_sha256) == 64
    assert seen.dataset_sha256 == images.digest
    assert told[0] == (0, 11)
    assert told[-1] == (11, 11)
    for path in LAYERS:
        assert 0 < seen.ranges[path] <= seen.amax[path]
    assert (seen.ranges == seen.amax) == (calibrator == "max")
    for handle in handles:
        handle.remove()
    assert not any(module._forward_pre_hooks for module in net.modules()), "observers are taken off again"


@pytest.mark.parametrize("calibrator", ["max", "entropy"])
def test_an_input_that_is_always_zero_has_range_zero(calibrator: str) -> None:
    class Zeros(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 0

    net = nn.Sequential(Zeros(), nn.Conv2d(3, 4, 1)).eval()
    assert calibrate(net, ["0", "1"], source(), calibrator).ranges["1"] == 0.0


def test_inputs_that_are_all_zero_everywhere_are_an_error() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1)).eval()
    dark = ImageSource([np.zeros((9, 3, 4, 4), np.float32)], Transform(resolution=(4, 4)))
    with pytest.raises(DataError, match="inputs of all 1 layers are zero on every image"):
        calibrate(net, ["0"], dark, "entropy")


def notes(images: npt.NDArray[np.floating[Any]]) -> tuple[str, ...]:
    net = nn.Sequential(nn.Conv2d(3, 4, 1)).eval()
    given = ImageSource([images.astype(np.float32)], Transform(resolution=(4, 4)))
    seen = calibrate(net, ["0"], given, "entropy")
    assert 0 < seen.ranges["0"] <= seen.amax["0"]
    return seen.notes


def test_images_that_tell_little_are_noted() -> None:
    many = np.random.default_rng(0).standard_normal((33, 3, 4, 4))
    plain = np.ones_like(many) * np.arange(1, 34)[:, None, None, None] / 10
    assert notes(many) == notes(many[:32]) == ()
    for images, *words in (
        (many[:31], "only 31 images"),
        (many[:1], "only 1 image:"),
        (np.repeat(many[:1], 33, axis=0), "all 33 calibration images are equal"),
        (plain, "every calibration image is of one plain colour"),
        (plain[:1], "only 1 image:", "every calibration image is of one plain colour"),
        (np.repeat(many[:1], 2, axis=0), "only 2 images", "all 2 calibration images are equal"),
    ):
        found = notes(images)
        assert [note[: len(word)] for note, word in zip(found, words, strict=True)] == words
    one_differs = plain.copy()
    one_differs[20, 0, 1, 2] += 1
    assert notes(one_differs) == ()


def test_activations_that_are_not_numbers_name_the_layer(make_net: MakeNet) -> None:
    net = make_net(depth=2)
    with torch.no_grad():
        net.blocks[0].attn.qkv_pos[0].bias.fill_(torch.inf)  # type: ignore[union-attr, index]
    with pytest.raises(DataError, match=r"input of blocks\.1\.attn\.qkv_pos\.5 holds NaN"):
        calibrate(net, LAYERS, source(), "entropy")
    assert not any(module._forward_pre_hooks for module in net.modules()), "observers are taken off again"


def test_unknown_calibrator_is_refused_before_the_work() -> None:
    with pytest.raises(OptionError, match="Unknown calibrator"):
        calibrate(nn.Identity(), [], source(), "best")


def test_facts_of_every_layer(make_net: MakeNet) -> None:
    net = make_net(depth=1)
    facts = {fact.path: fact for fact in inspect_layers(net, torch.zeros(1, 3, 32, 48))}
    assert "blocks.0.attn" not in facts, "leaves only"
    stem = facts["patch_embed.proj.0.0"]
    assert (stem.rows, stem.in_channels, stem.out_channels, stem.kernel) == (16 * 24, 3, 4, (3, 3))
    assert [path for path, fact in facts.items() if fact.reads_image] == ["patch_embed.proj.0.0"]
    depthwise = facts["blocks.0.attn.qkv_pos.2"]
    assert (depthwise.rows, depthwise.groups) == (2 * 3, 32)
    assert facts["blocks.0.attn.qkv_pos.4.conv_reduce"].rows == 1
    assert (facts["head"].rows, facts["head"].kind, facts["head"].out_channels) == (1, "Linear", 10)
    keys = facts["blocks_token_only.0.attn.k"]
    assert (keys.rows, keys.in_channels) == (2 * 3 + 1, 32)
    assert facts["norm"].in_channels == 0
    assert not any(module._forward_hooks for module in net.modules())


def test_a_layer_called_twice_is_not_quantised_one_with_a_shared_weight_is() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.act, self.tied = nn.Conv2d(32, 32, 1), nn.ReLU(), nn.Conv2d(32, 32, 1)
            self.first, self.tied.weight = nn.Conv2d(3, 32, 1), self.conv.weight

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.tied(self.conv(self.act(self.conv(self.first(x)))))
            return y

    layers = inspect_layers(Twice(), torch.zeros(1, 3, 4, 4))
    assert {layer.path: layer.uses for layer in layers} == {"first": 1, "conv": 2, "act": 1, "tied": 1}
    assert list(make_plan(layers, "int8").quantized_entries) == ["first", "tied"]


class StandardisedConv(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self._conv_forward(x, self.weight / self.weight.norm(), self.bias)
        return y


def test_a_layer_with_its_own_arithmetic_is_not_taken_for_a_convolution() -> None:
    """Quantising it as a convolution would drop what it does beside convolving."""
    (fact,) = inspect_layers(nn.Sequential(StandardisedConv(3, 16, 1)), torch.zeros(1, 3, 4, 4))
    assert (fact.kind, fact.in_channels) == ("StandardisedConv", 0)
    with pytest.raises(ModelError, match="StandardisedConv: a subclass with a forward of its own"):
        make_plan([fact], "int8")


def test_a_layer_that_holds_a_padding_is_still_named() -> None:
    class Padded(StandardisedConv):
        def __init__(self) -> None:
            super().__init__(3, 16, 1)
            self.pad = nn.ZeroPad2d(1)

    facts = inspect_layers(nn.Sequential(Padded()), torch.zeros(1, 3, 4, 4))
    assert [(fact.path, fact.own_forward) for fact in facts] == [("0", True)]


def test_a_layer_called_by_keyword_is_observed() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 32, 1)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.conv(input=x)
            return y

    given = ImageSource([np.full((1, 3, 4, 4), 2.0, np.float32)], Transform(resolution=(4, 4)))
    assert calibrate(Named(), ["conv"], given, "max").ranges == {"conv": 2.0}
