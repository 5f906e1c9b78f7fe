"""Classifiers of torchvision by name, against torchvision itself: images, heads, files of its references."""

from __future__ import annotations

import argparse
import hashlib
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

torch = pytest.importorskip("torch")
torchvision = pytest.importorskip("torchvision", exc_type=ImportError)

from pcn_deploy.errors import ModelError  # noqa: E402 - torchvision may be missing
from pcn_deploy.models.libraries import (  # noqa: E402
    LIBRARIES,
    arguments_at,
    configured_evaluation,
    configured_transform,
)
from pcn_deploy.models.library import share_of  # noqa: E402
from pcn_deploy.models.registry import create_model, make_model  # noqa: E402

SIZES = ((500, 375), (375, 501), (100, 130), (640, 200), (256, 256), (33, 700))
"""Widths and heights: larger and smaller than the crop, long and upright."""

CONFIGURED = {
    "resnet18": (256, 224, "bilinear"),
    "resnet50": (232, 224, "bilinear"),
    "efficientnet_b1": (255, 240, "bilinear"),
    "efficientnet_v2_l": (480, 480, "bicubic"),
    "inception_v3": (342, 299, "bilinear"),
    "swin_t": (232, 224, "bicubic"),
    "swin_v2_t": (260, 256, "bicubic"),
    "convnext_tiny": (236, 224, "bilinear"),
    "vit_h_14": (518, 518, "bicubic"),
}
"""Pixels of the shorter side before the crop, of the crop, and how: torchvision 0.28."""

HEADS = ("resnet18", "squeezenet1_1", "mobilenet_v3_small", "shufflenet_v2_x0_5", "regnet_y_400mf", "densenet121")
"""A Linear `fc`, a convolution, the last of several layers, and one that cannot be made without values."""


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is downloaded."""

    def connect(*_: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(socket.socket, "connect", connect)


def make(name: str, **arguments: Any) -> Any:
    """`create_model`, of no type: each library has its own."""
    return create_model(name, **arguments)


def picture(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(width * height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def same_images(ours: Any, theirs: Any) -> None:
    """To 2e-6: both have the same 8-bit pixels, and normalise them in float32, whose step at 2.6 is 2.4e-7."""
    for size in SIZES:
        image = picture(*size)
        np.testing.assert_allclose(ours(image), theirs(image).numpy(), rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", CONFIGURED)
def test_images_are_those_of_the_default_weights(name: str) -> None:
    preset = torchvision.models.get_model_weights(name).DEFAULT.transforms()
    assert (preset.resize_size[0], preset.crop_size[0], preset.interpolation.value) == CONFIGURED[name]
    same_images(configured_transform(f"torchvision:{name}"), preset)


def test_every_published_file_is_resized_to_just_its_size() -> None:
    for name in torchvision.models.list_models(module=torchvision.models):
        for entry in torchvision.models.get_model_weights(name):
            preset = entry.transforms()
            crop, resize = preset.crop_size[0], preset.resize_size[0]
            assert int(crop / share_of(crop, resize)) == resize, entry


def saved(path: Path, network: Any, **more: Any) -> Path:
    torch.save({"model": network.state_dict(), **more}, path)
    return path


def test_a_file_of_its_references_decides_classes_and_images(tmp_path: Path) -> None:
    network = torchvision.models.resnet18(num_classes=4)
    args = argparse.Namespace(model="resnet18", val_crop_size=96, val_resize_size=101, interpolation="bicubic")
    average = {**{f"module.{key}": value for key, value in network.state_dict().items()}, "n_averaged": torch.tensor(7)}
    path = saved(tmp_path / "model.pth", torchvision.models.resnet18(num_classes=4), model_ema=average, args=args)
    made = make_model("torchvision:resnet18", weights=path)
    assert made.checkpoint_weights == "ema"
    assert all(torch.equal(value, network.state_dict()[name]) for name, value in made.network.state_dict().items())
    evaluation = configured_evaluation("torchvision:resnet18", path)
    assert evaluation is not None
    from torchvision.transforms._presets import ImageClassification  # what the references' preset is, without its file
    from torchvision.transforms.functional import InterpolationMode

    preset = ImageClassification(crop_size=96, resize_size=101, interpolation=InterpolationMode.BICUBIC)
    same_images(evaluation.transform, preset)
    assert evaluation.origin.startswith("torchvision's train.py evaluated it")


@pytest.mark.parametrize("name", HEADS)
def test_the_number_of_classes_is_that_of_the_file(name: str, tmp_path: Path) -> None:
    network = torchvision.models.get_model(name, num_classes=4).eval()
    again = make(f"torchvision:{name}", weights=saved(tmp_path / "net.pth", network))
    image = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(again(image), network(image))
    assert again(image).shape == (1, 4)


def publish(monkeypatch: pytest.MonkeyPatch, path: Path, entry: Any) -> None:
    """Let a file be the one that torchvision publishes: its address ends in the first digits of the hash."""
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:8]
    monkeypatch.setattr(entry.value, "url", f"https://download.pytorch.org/models/net-{digest}.pth")


def test_a_published_file_is_recognised_and_has_its_own_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path / "renamed.pth", torchvision.models.resnet50())
    first = torchvision.models.ResNet50_Weights.IMAGENET1K_V1
    before = configured_transform("torchvision:resnet50", path)
    publish(monkeypatch, path, first)
    evaluation = configured_evaluation("torchvision:resnet50", path)
    assert evaluation is not None
    assert evaluation.origin.endswith(f"evaluates ResNet50_Weights.IMAGENET1K_V1, which {path} is")
    assert evaluation.transform != before, "V2, the default, is resized to 232 pixels"
    same_images(evaluation.transform, first.transforms())
    assert make_model("torchvision:resnet50", weights=path).class_names[:2] == ("tench", "goldfish")


def test_published_files_are_loaded_as_their_builder_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Inceptions normalise anew inside, with those weights only; a ViT has the size of its images."""
    path = saved(tmp_path / "net.pth", torchvision.models.googlenet(init_weights=False))
    assert make("torchvision:googlenet", weights=path).transform_input is False
    publish(monkeypatch, path, torchvision.models.GoogLeNet_Weights.IMAGENET1K_V1)
    assert make("torchvision:googlenet", weights=path).transform_input is True
    entry = torchvision.models.ViT_B_32_Weights.IMAGENET1K_V1
    publish(monkeypatch, path, entry)
    monkeypatch.setitem(entry.meta, "min_size", (384, 384))
    with torch.device("meta"):
        assert LIBRARIES["torchvision"].create("vit_b_32", path, {}, {}).image_size == 384


def test_a_vit_is_made_for_the_size_of_its_images() -> None:
    assert arguments_at("torchvision:vit_b_32", (224, 224)) == {}
    assert arguments_at("torchvision:vit_b_32", (96, 96)) == {"image_size": 96}
    assert arguments_at("torchvision:resnet18", (96, 96)) == {}


def test_names_that_are_no_classifiers() -> None:
    with pytest.raises(ModelError, match="torchvision:deeplabv3_resnet50 is no classifier of images"):
        make("torchvision:deeplabv3_resnet50", random_weights=True)
    with pytest.raises(ModelError, match="Did you mean torchvision:resnet18"):
        make("torchvision:resnet81", random_weights=True)
