"""Weights of others, in their layouts: torchvision's ResNets, timm's MnasNets, the public AA-ResNet-50."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.nn.functional as F
from executors import Execute, eager, onnxruntime, torchscript
from torch import Tensor, nn

from pcn_deploy.errors import CheckpointError
from pcn_deploy.models import layouts
from pcn_deploy.models.augmentation import Augmentation
from pcn_deploy.models.catalogue import LEGACY, MODELS
from pcn_deploy.models.containers import StateDict
from pcn_deploy.models.mnasnet import MnasNet
from pcn_deploy.models.registry import create_model
from pcn_deploy.models.resnet import ResNet
from pcn_deploy.models.wide_resnet import WideResNet

Shapes = dict[str, tuple[int, ...]]
DEPTHS = (3, 4, 6, 3)
LOGITS = Path(__file__).parents[1] / "fixtures" / "aa_resnet50_legacy.npz"


def norm(name: str, channels: int) -> Shapes:
    leaves = ("weight", "bias", "running_mean", "running_var")
    return {f"{name}.{leaf}": (channels,) for leaf in leaves} | {f"{name}.num_batches_tracked": ()}


def torchvision_resnet(*, bottleneck: bool, classes: int = 1000, channels: int = 3) -> Shapes:
    """Keys and shapes of torchvision's ResNet-34 and ResNet-50."""
    shapes: Shapes = {"conv1.weight": (64, channels, 7, 7)} | norm("bn1", 64)
    before = 64
    for stage, depth in enumerate(DEPTHS):
        width = 64 * 2**stage
        after = 4 * width if bottleneck else width
        kernels = (1, 3, 1) if bottleneck else (3, 3)
        for position in range(depth):
            block = f"layer{stage + 1}.{position}"
            inputs = before
            for index, kernel in enumerate(kernels, 1):
                outputs = after if index == len(kernels) else width
                shapes[f"{block}.conv{index}.weight"] = (outputs, inputs, kernel, kernel)
                shapes |= norm(f"{block}.bn{index}", outputs)
                inputs = outputs
            if not position and before != after:
                shapes[f"{block}.downsample.0.weight"] = (after, before, 1, 1)
                shapes |= norm(f"{block}.downsample.1", after)
            before = after
    return shapes | {"fc.weight": (classes, before), "fc.bias": (classes,)}


def public_aa_resnet50() -> Shapes:
    """Keys and shapes of aanet/aa_resnet.py in d-li14/dot-product-attention."""
    shapes = torchvision_resnet(bottleneck=True)
    widths = {2: (128, 24, 16, 14), 3: (256, 48, 24, 14), 4: (512, 104, 48, 7)}
    for stage, (width, dk, dv, side) in widths.items():
        for position in range(DEPTHS[stage - 1]):
            conv = f"layer{stage}.{position}.conv2"
            del shapes[f"{conv}.weight"]
            parts = {
                "conv_out": (width - dv, width, 3, 3),
                "conv_kqv": (2 * dk + dv, width, 1, 1),
                "attn_out": (dv, dv, 1, 1),
            }
            for part, shape in parts.items():
                shapes |= {f"{conv}.{part}.weight": shape, f"{conv}.{part}.bias": shape[:1]}
            shapes |= {f"{conv}.key_rel_{axis}": (2 * side - 1, dk // 8) for axis in "wh"}
    return shapes


def filled(fill: ModuleType, shapes: Shapes) -> StateDict:
    """Weights by name, as `fill.fill_` would set them."""
    return {
        name: torch.from_numpy(fill.tensor_for(name, shape, 0)) if shape else torch.tensor(7)
        for name, shape in shapes.items()
    }


@pytest.fixture
def load(tmp_path: Path) -> Iterator[Callable[..., nn.Module]]:
    """Makes a network from a file with the given weights."""
    path = tmp_path / "w.pth"

    def load(name: str, state: StateDict, **arguments: Any) -> nn.Module:
        torch.save(state, path)
        return create_model(name, weights=path, **arguments)

    yield load
    path.unlink(missing_ok=True)  # up to 100 MB


def torchvision_forward(state: StateDict, x: Tensor, kernels: tuple[int, ...]) -> Tensor:
    """What torchvision computes: the stride of a block is in its first 3x3 convolution and in its shortcut."""

    def conv_norm(x: Tensor, conv: str, bn: str, stride: int = 1) -> Tensor:
        weight = state[f"{conv}.weight"]
        x = F.conv2d(x, weight, stride=stride, padding=weight.shape[2] // 2)
        mean, variance, gain, bias = (
            state[f"{bn}.{leaf}"] for leaf in ("running_mean", "running_var", "weight", "bias")
        )
        return F.batch_norm(x, mean, variance, gain, bias, eps=1e-5)

    x = F.max_pool2d(conv_norm(x, "conv1", "bn1", 2).relu(), 3, 2, 1)
    for stage, depth in enumerate(DEPTHS, 1):
        for position in range(depth):
            block, stride = f"layer{stage}.{position}", 2 if stage > 1 and not position else 1
            y = x
            for index in range(1, len(kernels) + 1):
                here = stride if index == kernels.index(3) + 1 else 1
                y = conv_norm(y, f"{block}.conv{index}", f"{block}.bn{index}", here)
                y = y if index == len(kernels) else y.relu()
            if f"{block}.downsample.0.weight" in state:
                x = conv_norm(x, f"{block}.downsample.0", f"{block}.downsample.1", stride)
            x = (y + x).relu()
    return F.linear(x.mean((2, 3)), state["fc.weight"], state["fc.bias"])


@pytest.mark.parametrize(("name", "kernels"), [("resnet34", (3, 3)), ("resnet50", (1, 3, 1))])
def test_torchvision_resnets_load_and_compute_the_same(
    fill: ModuleType, load: Callable[..., nn.Module], name: str, kernels: tuple[int, ...]
) -> None:
    state = filled(fill, torchvision_resnet(bottleneck=len(kernels) == 3, classes=7, channels=2))
    model = load(name, state)
    assert list(model.state_dict()) == list(state), "the same keys in the same order"
    x = torch.from_numpy(fill.images_for((2, 2, 97, 64), 1))
    expected = torchvision_forward(state, x, kernels)
    assert expected.shape == (2, 7)
    assert expected.std() > 0.1
    torch.testing.assert_close(eager(model, x), expected, atol=1e-4, rtol=0)


def test_a_file_without_counters_of_batches_loads(fill: ModuleType, load: Callable[..., nn.Module]) -> None:
    """Files older than PyTorch 0.4.1 have none; torchvision's first ResNets are such."""
    state = filled(fill, torchvision_resnet(bottleneck=False))
    old = {name: tensor for name, tensor in state.items() if not name.endswith("num_batches_tracked")}
    assert len(state) - len(old) == 36
    loaded = load("resnet34", old).state_dict()
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in old.items())
    assert loaded["bn1.num_batches_tracked"].dtype == torch.int64


def zeros(shapes: Shapes) -> StateDict:
    return {name: torch.zeros(shape) for name, shape in shapes.items()}


def test_weights_of_another_family_name_what_is_missing_and_extra(load: Callable[..., nn.Module]) -> None:
    with pytest.raises(CheckpointError) as caught:
        load("resnet34", MnasNet(multiplier=0.25, num_classes=3).state_dict())
    missing, extra = str(caught.value).splitlines()[1:3]
    assert "missing: conv1.weight, fc.bias, fc.weight, layer1.0.bn1.bias, " in missing
    assert "extra: blocks.0.0.bn1.bias, " in extra
    shapes = torchvision_resnet(bottleneck=False)
    shapes["head.bias"] = shapes.pop("fc.bias")
    with pytest.raises(CheckpointError, match=r"1 missing: fc\.bias\n  1 extra: head\.bias"):
        load("resnet34", zeros(shapes))


def test_plain_weights_do_not_fit_an_augmented_network(load: Callable[..., nn.Module]) -> None:
    with pytest.raises(
        CheckpointError, match=r"91 missing: layer2\.0\.conv1\.attention\.(?s:.*)13 extra: layer2\.0\.conv1\.weight"
    ):
        load("aa_resnet34", zeros(torchvision_resnet(bottleneck=False)))


Reader = Callable[[StateDict], layouts.Read]
BLOCKS = {"block": "basic", "depths": (1, 1, 1, 1)}
PAPER = Augmentation(heads=2, min_head_channels=2)
EXTENSIBLE: dict[str, tuple[type[nn.Module], Reader, dict[str, Any]]] = {
    "resnet": (ResNet, layouts.read_resnet, BLOCKS),
    "aa_resnet": (ResNet, layouts.read_resnet, BLOCKS | {"augmentation": PAPER}),
    "attnpool": (ResNet, layouts.read_resnet, BLOCKS | {"attention_pool": True}),
    "wide": (WideResNet, layouts.read_wide_resnet, {"depth": 10, "widen": 1}),
    "aa_wide": (
        WideResNet,
        layouts.read_wide_resnet,
        {"depth": 10, "widen": 1, "augmentation": dataclasses.replace(PAPER, pooled="none")},
    ),
    "mnasnet": (MnasNet, layouts.read_mnasnet, {"multiplier": 0.25}),
    "aa_mnasnet": (MnasNet, layouts.read_mnasnet, {"multiplier": 0.25, "augmentation": PAPER}),
}


@pytest.mark.parametrize("image_size", [32, 33, 75, 200, 224, 240, 280])
@pytest.mark.parametrize("family", EXTENSIBLE)
def test_a_file_tells_classes_channels_and_image_size(family: str, image_size: int) -> None:
    """Whatever image size the tables were made for, the one read off them makes tables of the same shapes."""
    network, reader, arguments = EXTENSIBLE[family]
    with torch.device("meta"):
        state = network(**arguments, image_size=image_size, num_classes=5, in_channels=2).state_dict()
        kept, read = reader(state)
        again = network(**arguments, **read).state_dict()
    assert kept is state
    assert (read["num_classes"], read["in_channels"]) == (5, 2)
    assert ("image_size" in read) == family.startswith("aa_")
    assert {name: tensor.shape for name, tensor in again.items()} == {name: t.shape for name, t in state.items()}


@pytest.mark.parametrize("reader", [entry[1] for entry in EXTENSIBLE.values()])
def test_a_foreign_file_tells_nothing(reader: Reader) -> None:
    for ends in (((3,), (3, 3)), ((3, 3), ())):
        keys = zip(("conv1.weight", "conv_stem.weight", "fc.weight", "classifier.weight"), (0, 0, 1, 1), strict=True)
        state = {key: torch.zeros(ends[end]) for key, end in keys}
        assert reader(state) == (state, {})


def test_a_named_network_takes_size_classes_and_channels_from_the_file(load: Callable[..., nn.Module]) -> None:
    arguments = MODELS["aa_mnasnet_075"].arguments
    with torch.device("meta"):
        net = MnasNet(**arguments, image_size=240, num_classes=6, in_channels=1)
    state = {name: torch.full(tensor.shape, 0.5, dtype=tensor.dtype) for name, tensor in net.state_dict().items()}
    loaded = load("aa_mnasnet_075", state)
    assert loaded.state_dict().keys() == state.keys()
    assert eager(loaded, torch.rand(1, 1, 64, 96)).shape == (1, 6)
    with pytest.raises(CheckpointError, match=r"classifier\.weight \(6, 1280\) instead of \(9, 1280\)"):
        load("aa_mnasnet_075", state, num_classes=9)


@pytest.fixture(scope="module")
def public(fill: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A file in the layout of the public AA-ResNet-50."""
    path = tmp_path_factory.mktemp("legacy") / "public.pth"
    state = filled(fill, public_aa_resnet50())
    assert len(state) == 411
    torch.save({"state_dict": {f"module.{name}": tensor for name, tensor in state.items()}}, path)
    yield path
    path.unlink()


@pytest.fixture(scope="module")
def images(fill: ModuleType) -> Tensor:
    return torch.from_numpy(fill.images_for((2, 3, 224, 224), 0))


@pytest.fixture(scope="module")
def legacy(public: Path) -> nn.Module:
    return create_model("aa_resnet50_legacy", weights=public)


@pytest.fixture(scope="module")
def expected() -> npt.NDArray[np.float32]:
    """Logits of the public code with the same weights, for the same images, on the CPU."""
    logits: npt.NDArray[np.float32] = np.load(LOGITS)["logits"]
    assert logits.std() > 0.5, "the reference itself must not be trivial"
    return logits


@pytest.mark.parametrize("run", [eager, torchscript, pytest.param(onnxruntime, marks=pytest.mark.all_networks)])
def test_equals_the_public_aa_resnet50(
    legacy: nn.Module, images: Tensor, expected: npt.NDArray[np.float32], run: Execute
) -> None:
    np.testing.assert_allclose(run(legacy, images).numpy(), expected, atol=1e-4, rtol=0)


def test_without_its_fault_the_public_aa_resnet50_gives_something_else(
    public: Path, images: Tensor, expected: npt.NDArray[np.float32]
) -> None:
    right = dataclasses.replace(LEGACY, transposed_heads=False)
    found = eager(create_model("aa_resnet50_legacy", weights=public, augmentation=right), images)
    assert np.abs(found.numpy() - expected).max() > 0.1
