"""Networks of timm by name, against timm itself: the images, and the checkpoints as its trainer writes them."""

from __future__ import annotations

import argparse
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

torch = pytest.importorskip("torch")
timm = pytest.importorskip("timm", exc_type=ImportError)

from pcn_deploy.errors import CheckpointError, ModelError  # noqa: E402 - timm may be missing
from pcn_deploy.models.libraries import arguments_at, configured_evaluation, configured_transform  # noqa: E402
from pcn_deploy.models.registry import create_model, make_model  # noqa: E402

SIZES = ((500, 375), (375, 501), (100, 130), (640, 200), (256, 256), (33, 700))
"""Widths and heights: larger and smaller than the crop, long and upright."""

CONFIGURED = {
    "resnet18": (0.95, "bicubic", 224, "center"),
    "resnet18.tv_in1k": (0.875, "bilinear", 224, "center"),
    "vit_tiny_patch16_224": (0.9, "bicubic", 224, "center"),
    "efficientnet_b1": (0.9, "bicubic", 240, "center"),
    "efficientnetv2_rw_s": (1.0, "bicubic", 288, "center"),
    "crossvit_9_240": (0.875, "bicubic", 240, "center"),
    "inception_v3.tf_in1k": (0.875, "bicubic", 299, "center"),
    "regnetz_040": (1.0, "bicubic", 256, "center"),
    "coatnet_rmlp_2_rw_384": (1.0, "bicubic", 384, "squash"),
    "hgnet_tiny": (0.965, "bicubic", 224, "center"),
    "mobilevitv2_050": (0.888, "bicubic", 256, "center"),
}
"""What timm 1.0.31 configures."""

TRAINED = {"model": "test_resnet", "img_size": 128, "crop_pct": 0.9, "mean": [0.5, 0.4, 0.3], "std": None}
TRAINED |= {"interpolation": "", "input_size": None, "in_chans": None, "gp": None, "bn_eps": None, "model_kwargs": {}}


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


def same_images(ours: Callable[[Image.Image], Any], theirs: Callable[[Image.Image], Any]) -> None:
    """To 2e-6: both have the same 8-bit pixels, and normalise them in float32, whose step at 2.6 is 2.4e-7."""
    for size in SIZES:
        image = picture(*size)
        np.testing.assert_allclose(ours(image), theirs(image).numpy(), rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", CONFIGURED)
def test_images_are_those_of_timm(name: str) -> None:
    transform = configured_transform(f"timm:{name}")
    share, interpolation, side, mode = CONFIGURED[name]
    assert (transform.crop_pct, transform.interpolation, transform.crop_mode) == (share, interpolation, mode)
    assert transform.resolution == (side, side)
    with torch.device("meta"):
        network = timm.create_model(name, pretrained=False)
    same_images(transform, timm.data.create_transform(**timm.data.resolve_model_data_config(network)))


@pytest.mark.parametrize("share", [1.0, 0.8])
def test_a_border_is_that_of_timm(share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    configuration = timm.get_pretrained_cfg("resnet18")
    configuration.crop_mode, configuration.crop_pct = "border", share
    monkeypatch.setattr(timm, "get_pretrained_cfg", lambda _name: configuration)
    data = timm.data.resolve_data_config(pretrained_cfg=configuration.to_dict(), args={"input_size": None})
    same_images(configured_transform("timm:resnet18"), timm.data.create_transform(**data))


def test_a_border_of_black_is_left_out_and_said() -> None:
    evaluation = configured_evaluation("timm:volo_d5_512")
    assert evaluation is not None
    assert evaluation.transform.crop_pct == 1
    assert evaluation.notes == ("timm evaluates volo_d5_512 on a black border, crop_pct 1.15; here without one, 1.",)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of timm's own saver, as `train.py` calls it: 3 classes, raw weights and an average of them."""
    from timm.utils import CheckpointSaver, ModelEmaV3

    folder = tmp_path_factory.mktemp("timm")
    network, other = (timm.create_model("test_resnet", num_classes=3) for _ in range(2))
    saver = CheckpointSaver(
        network,
        torch.optim.SGD(network.parameters(), lr=0.1),
        args=argparse.Namespace(**TRAINED, num_classes=3, lr=0.1, amp=False),
        model_ema=ModelEmaV3(other),
        checkpoint_dir=str(folder),
        recovery_dir=str(folder),
    )
    saver.save_checkpoint(3, metric=55.0)
    torch.save((network.state_dict(), other.state_dict()), folder / "both.pth")
    return folder / "checkpoint-3.pth.tar"


def same_weights(network: Any, state: dict[str, Any]) -> None:
    assert network.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())


def test_a_file_of_its_trainer_decides_classes_and_images(written: Path) -> None:
    raw, average = torch.load(written.parent / "both.pth", weights_only=True)
    made = make_model("timm:test_resnet", weights=written)
    assert made.checkpoint_weights == "ema"
    same_weights(made.network, average)
    assert average["fc.weight"].shape[0] == 3
    same_weights(make("timm:test_resnet", weights=written, checkpoint_weights="raw"), raw)
    evaluation = configured_evaluation("timm:test_resnet", written)
    assert evaluation is not None
    assert "with crop_pct, mean, input_size of its training" in evaluation.origin
    args = {key: value for key, value in TRAINED.items() if value}
    data = timm.data.resolve_model_data_config(made.network, args=args)
    assert data["input_size"] == (3, 128, 128)
    same_images(evaluation.transform, timm.data.create_transform(**data))


def test_a_file_of_deit_is_cut_as_its_script_does(tmp_path: Path) -> None:
    args = argparse.Namespace(model="test_resnet", input_size=96, eval_crop_ratio=0.75)
    state = timm.create_model("test_resnet", num_classes=3).state_dict()
    torch.save({"model": state, "args": args}, tmp_path / "net.pth")
    transform = configured_transform("timm:test_resnet", tmp_path / "net.pth")
    assert (transform.shape, transform.crop_pct) == ((3, 96, 96), 0.75)


def test_arguments_of_another_architecture_are_not_used(tmp_path: Path) -> None:
    network = timm.create_model("test_resnet", num_classes=3)
    args = argparse.Namespace(**{**TRAINED, "model": "test_vit"})
    torch.save({"state_dict": network.state_dict(), "args": args}, tmp_path / "net.pth")
    evaluation = configured_evaluation("timm:test_resnet", tmp_path / "net.pth")
    assert evaluation is not None
    assert evaluation.transform == configured_transform("timm:test_resnet")
    assert "was trained as test_vit: the arguments of its training are not used" in evaluation.notes[0]
    torch.save({"state_dict": network.state_dict(), "args": argparse.Namespace(**TRAINED)}, tmp_path / "net.pth")
    with pytest.raises(CheckpointError, match=r"was trained as test_resnet: give timm:test_resnet as the model\.$"):
        make("timm:test_vit", weights=tmp_path / "net.pth")


def test_what_its_trainer_made_otherwise_is_made_so(tmp_path: Path) -> None:
    told = {"input_size": [1, 96, 96], "gp": "max", "model_kwargs": {"act_layer": "silu", "checkpoint_path": "/none"}}
    network = timm.create_model("test_resnet", num_classes=3, in_chans=1, global_pool="max", act_layer="silu").eval()
    args = argparse.Namespace(**{**TRAINED, **told, "mean": None})
    torch.save({"state_dict": network.state_dict(), "args": args}, tmp_path / "net.pth")
    again = make("timm:test_resnet", weights=tmp_path / "net.pth")
    image = torch.rand(2, 1, 96, 96)
    with torch.no_grad():
        assert torch.equal(again(image), network(image))
    assert configured_transform("timm:test_resnet", tmp_path / "net.pth").shape == (1, 96, 96)


def test_the_epsilon_of_norms_is_that_of_the_training(tmp_path: Path) -> None:
    network = timm.create_model("test_efficientnet", num_classes=3, bn_eps=0.5)
    args = argparse.Namespace(**{**TRAINED, "model": "test_efficientnet", "bn_eps": 0.5})
    torch.save({"state_dict": network.state_dict(), "args": args}, tmp_path / "net.pth")
    assert make("timm:test_efficientnet", weights=tmp_path / "net.pth").bn1.eps == 0.5


def test_a_vit_is_made_for_the_size_of_its_images(tmp_path: Path) -> None:
    assert arguments_at("timm:test_vit", (160, 160)) == {}
    assert arguments_at("timm:resnet18", (96, 64)) == {}
    assert arguments_at("timm:test_vit", (96, 64)) == {"img_size": [96, 64]}
    network = timm.create_model("test_vit", num_classes=3, img_size=96)
    args = argparse.Namespace(**{**TRAINED, "model": "test_vit", "img_size": 96})
    torch.save({"state_dict": network.state_dict(), "args": args}, tmp_path / "net.pth")
    torch.save(network.state_dict(), tmp_path / "plain.pth")
    same_weights(make("timm:test_vit", weights=tmp_path / "net.pth"), network.state_dict())
    same_weights(make("timm:test_vit", weights=tmp_path / "plain.pth", img_size=[96, 96]), network.state_dict())
    with pytest.raises(CheckpointError, match="pos_embed"):
        make("timm:test_vit", weights=tmp_path / "plain.pth")


def test_names_that_timm_does_not_have() -> None:
    with pytest.raises(ModelError, match="Did you mean timm:resnet18 or timm:"):
        make("timm:resnt18", random_weights=True)
    with pytest.raises(ModelError, match=r"no configuration 'resnet18\.none'\. Known: timm:resnet18\.a1_in1k, "):
        make("timm:resnet18.none", random_weights=True)
    with pytest.raises(ModelError, match=r"no classifier 'hf-hub:timm/resnet18'"):
        make("timm:hf-hub:timm/resnet18", random_weights=True)


def test_a_tag_is_a_configuration_of_the_same_network() -> None:
    first, again = (make(f"timm:{name}", random_weights=True) for name in ("test_vit", "test_vit.r160_in1k"))
    same_weights(first, again.state_dict())
