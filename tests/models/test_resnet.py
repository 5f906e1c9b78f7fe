"""ResNets, wide ResNets and MnasNets: shapes, blocks, scripting, repeated blocks, refused arguments."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
import torch.nn.functional as F
from executors import Execute, eager, onnxruntime, torchscript
from torch import Tensor, nn

from pcn_deploy.errors import OptionError
from pcn_deploy.graph import export
from pcn_deploy.graph.repeat import Run, find_runs
from pcn_deploy.models import mnasnet
from pcn_deploy.models.aggregation import AttentionPool2d
from pcn_deploy.models.attention_conv import AttentionAugmentedConv2d
from pcn_deploy.models.augmentation import Augmentation
from pcn_deploy.models.catalogue import MODELS
from pcn_deploy.models.mnasnet import STAGES, MnasNet, scaled
from pcn_deploy.models.registry import create_model
from pcn_deploy.models.resnet import ResNet
from pcn_deploy.models.wide_resnet import WideResNet, ZeroPadShortcut
from pcn_deploy.network.deploy import to_deploy
from pcn_deploy.specs import BatchRange

PAPER = Augmentation(heads=2, min_head_channels=2)
UNPOOLED = dataclasses.replace(PAPER, pooled="none")
SHALLOW: dict[str, Any] = {"block": "basic", "depths": (1, 1, 1, 1), "image_size": 64, "num_classes": 5}
WIDE: dict[str, Any] = {"depth": 10, "widen": 1, "num_classes": 5}
MNAS: dict[str, Any] = {"multiplier": 0.25, "image_size": 64, "num_classes": 5}

NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "basic": lambda: ResNet(**SHALLOW),
    "bottleneck": lambda: ResNet(**SHALLOW | {"block": "bottleneck"}),
    "augmented": lambda: ResNet(**SHALLOW, augmentation=PAPER),
    "attention pool": lambda: ResNet(**SHALLOW, attention_pool=True),
    "wide": lambda: WideResNet(**WIDE),
    "augmented wide": lambda: WideResNet(**WIDE, augmentation=UNPOOLED),
    "mnasnet": lambda: MnasNet(**MNAS),
    "augmented mnasnet": lambda: MnasNet(**MNAS, augmentation=PAPER),
    "pool alone": lambda: nn.Sequential(nn.Conv2d(3, 5, 3, 4), AttentionPool2d(5), nn.Flatten()),
}


def make(fill: ModuleType, name: str) -> Any:
    net = NETWORKS[name]()
    fill.fill_(net, 2)
    if isinstance(net, MnasNet):  # with no residual in most stages, the signal would fade
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.data *= 1.3
    return net.eval()


@pytest.mark.parametrize("name", NETWORKS)
def test_any_height_and_width(fill: ModuleType, name: str) -> None:
    net = make(fill, name)
    for size in ((32, 32), (25, 40)):
        images = torch.from_numpy(fill.images_for((2, 3, *size), 5))
        logits = eager(net, images)
        assert logits.shape == (2, 5)
        torch.testing.assert_close(eager(net, images[1:]), logits[1:], atol=1e-4, rtol=0)
        assert not torch.allclose(logits[0], logits[1], atol=1e-3), "the logits depend on the image"


@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        ("basic", [(64, 17, 24), (128, 9, 12), (256, 5, 6), (512, 3, 3)]),
        ("bottleneck", [(256, 17, 24), (512, 9, 12), (1024, 5, 6), (2048, 3, 3)]),
        ("augmented", [(64, 17, 24), (128, 9, 12), (256, 5, 6), (512, 3, 3)]),
        (
            "augmented mnasnet",
            [(8, 33, 48), (8, 17, 24), (16, 9, 12), (24, 5, 6), (32, 5, 6), (40, 3, 3), (80, 3, 3)],
        ),
        ("augmented wide", [(16, 65, 35), (32, 33, 18), (64, 17, 9)]),
    ],
)
def test_feature_maps_of_the_stages(fill: ModuleType, name: str, shapes: list[tuple[int, int, int]]) -> None:
    net = make(fill, name)
    width = 35 if "wide" in name else 95
    with torch.inference_mode():
        features = net.stage_features(torch.from_numpy(fill.images_for((2, 3, 65, width), 5)))
    assert [feature.shape for feature in features] == [(2, *shape) for shape in shapes]


@pytest.mark.parametrize(
    ("name", "run"),
    [
        ("pool alone", torchscript),
        ("augmented mnasnet", torchscript),
        ("pool alone", onnxruntime),
        ("augmented wide", onnxruntime),
    ],
)
def test_exported_forms_give_the_same(fill: ModuleType, name: str, run: Execute) -> None:
    net = make(fill, name)
    images = torch.from_numpy(fill.images_for((2, 3, 24, 40), 5))
    expected = eager(net, images)
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(run(net, images), expected, atol=1e-4, rtol=0)


def positions(augmented: AttentionAugmentedConv2d) -> tuple[int, int]:
    return (len(augmented.attention.key_rel_h) + 1) // 2, (len(augmented.attention.key_rel_w) + 1) // 2


def augmented_layers(net: nn.Module) -> dict[str, tuple[int, str, tuple[int, int]]]:
    """Stride, pooling and sides of the tables of each augmented convolution."""
    return {
        name: (module.stride, "attention" if module.pools_attention else "none", positions(module))
        for name, module in net.named_modules()
        if isinstance(module, AttentionAugmentedConv2d)
    }


def meta(network: Callable[..., nn.Module], name: str) -> nn.Module:
    with torch.device("meta"):
        return network(**MODELS[name].arguments).eval()


def test_places_of_attention_in_resnets() -> None:
    """The 3x3 convolution of each block from the second stage on; pooled at 28 x 28 only."""
    sides = {2: 14, 3: 14, 4: 7}
    for name, conv in (("aa_resnet34", "conv1"), ("aa_resnet50", "conv2")):
        expected = {
            f"layer{stage}.{position}.{conv}": (
                1 if position else 2,
                "attention" if stage == 2 else "none",
                (sides[stage], sides[stage]),
            )
            for stage, depth in ((2, 4), (3, 6), (4, 3))
            for position in range(depth)
        }
        assert augmented_layers(meta(ResNet, name)) == expected


def test_places_of_attention_in_wide_resnets() -> None:
    expected = {
        f"layer{stage}.{position}.conv1": (2 if stage > 1 and not position else 1, "none", (side, side))
        for stage, side in ((1, 32), (2, 16), (3, 8))
        for position in range(4)
    }
    assert augmented_layers(meta(WideResNet, "aa_wide_resnet28_10")) == expected


def test_places_of_attention_in_mnasnets() -> None:
    """Thirteen expansions; where the map is larger than 14 x 14, attention reads half of it."""
    expected = {"2.0": 28, "2.1": 14, "2.2": 14, "3.0": 14}
    expected |= {f"3.{position}": 14 for position in (1, 2, 3)} | {"4.0": 14, "4.1": 14, "5.0": 14}
    expected |= {"5.1": 7, "5.2": 7, "6.0": 7}
    assert augmented_layers(meta(MnasNet, "aa_mnasnet_100")) == {
        f"blocks.{block}.conv_pw": (1, "attention" if block in {"2.0", "2.1", "2.2", "3.0"} else "none", (side, side))
        for block, side in expected.items()
    }


def test_tables_are_made_for_the_image_size() -> None:
    with torch.device("meta"):
        net = ResNet(**SHALLOW | {"image_size": 200}, augmentation=PAPER)
        wide = WideResNet(**WIDE | {"image_size": 27}, augmentation=PAPER)
    assert [entry[2] for entry in augmented_layers(net).values()] == [(13, 13), (13, 13), (7, 7)]
    assert [entry[1:] for entry in augmented_layers(wide).values()] == [
        ("attention", (14, 14)),
        ("none", (14, 14)),
        ("none", (7, 7)),
    ]


def test_augmented_blocks_of_a_wide_resnet(fill: ModuleType) -> None:
    """A block that keeps the shape adds its raw input; one that changes it adds the activated, halved, padded one."""
    net = make(fill, "augmented wide")
    x = torch.from_numpy(fill.images_for((1, 16, 5, 8), 1))
    for block in (net.layer1[0], net.layer2[0]):
        with torch.no_grad():
            active = F.relu(block.bn1(x))
            branch = block.conv2(F.relu(block.bn2(block.conv1(active))))
            identity = x
            if block is net.layer2[0]:
                identity = torch.zeros(1, 32, 3, 4)
                for row in range(3):
                    for column in range(4):
                        cells = active[:, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
                        identity[:, :16, row, column] = cells.mean((2, 3))
            torch.testing.assert_close(block(x), branch + identity, atol=1e-5, rtol=0)


def test_a_shortcut_without_change_is_the_identity() -> None:
    x = torch.rand(1, 4, 3, 3)
    assert torch.equal(ZeroPadShortcut(4, 4, 1)(x), x)


def test_gates_and_residuals_of_a_mnasnet(fill: ModuleType) -> None:
    net = make(fill, "mnasnet")
    for stage, blocks in zip(STAGES, net.blocks[1:], strict=True):
        assert [type(block.se) is not nn.Identity for block in blocks] == [stage.gated] * stage.blocks
        assert [block.has_residual for block in blocks[1:]] == [True] * (stage.blocks - 1)
    block = net.blocks[2][1]
    x = torch.from_numpy(fill.images_for((1, 16, 6, 5), 1))
    with torch.no_grad():
        y = F.relu(block.bn2(block.conv_dw(F.relu(block.bn1(block.conv_pw(x))))))
        gate = block.se.conv_expand(F.relu(block.se.conv_reduce(y.mean((2, 3), keepdim=True)))).sigmoid()
        torch.testing.assert_close(block(x), block.bn3(block.conv_pwl(y * gate)) + x, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("channels", "multiplier", "expected"),
    [(32, 1.0, 32), (16, 0.75, 16), (24, 0.75, 24), (40, 1.4, 56), (112, 0.75, 88), (80, 1.25, 104), (24, 0.1, 8)],
)
def test_widths_of_a_multiplier(channels: int, multiplier: float, expected: int) -> None:
    """To the nearest multiple of 8, halves up; 18 would go down to 16, more than a tenth, and goes up to 24 instead."""
    assert scaled(channels, multiplier) == expected


def execute(graph: ir.Model, images: Tensor) -> Any:
    session = ort.InferenceSession(export.serialise(graph), providers=["CPUExecutionProvider"])
    return session.run(None, {"images": images.numpy()})[0]


def test_equal_blocks_of_an_augmented_resnet_are_found() -> None:
    network = create_model("aa_resnet50", random_weights=True)
    assert find_runs(network, torch.zeros(2, 3, 32, 64)) == [
        Run("layer1", ("1", "2")),
        Run("layer2", ("1", "2", "3")),
        Run("layer3", ("1", "2", "3", "4", "5")),
        Run("layer4", ("1", "2")),
    ]


def test_augmented_blocks_are_unrolled(fill: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    net = ResNet(**SHALLOW | {"depths": (1, 3, 1, 1)}, augmentation=PAPER)
    fill.fill_(net, 1)
    deployed, _ = to_deploy(net.eval(), torch.rand(1, 3, 64, 64))
    exported = exports_of(monkeypatch)
    unrolled = export.to_onnx(deployed, (3, 32, 48), BatchRange(), {})
    assert [len(model.layer2) for model in exported] == [2], "once, with one block of the run"
    images = torch.from_numpy(fill.images_for((3, 3, 32, 48), 1))
    np.testing.assert_allclose(execute(unrolled, images), eager(net, images).numpy(), atol=1e-4)


def test_a_block_that_passes_a_size_on_is_unrolled(fill: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of an augmented MnasNet read the batch size that the first of them computed."""
    monkeypatch.setattr(mnasnet, "STAGES", (STAGES[0], dataclasses.replace(STAGES[2], blocks=3)))
    net = MnasNet(**MNAS, augmentation=PAPER)
    fill.fill_(net, 1)
    deployed, _ = to_deploy(net.eval(), torch.rand(1, 3, 64, 64))
    exported = exports_of(monkeypatch)
    graph = export.to_onnx(deployed, (3, 64, 64), BatchRange(), {})
    assert [len(model.blocks[2]) for model in exported] == [2], "once, with one block of the run"
    images = torch.from_numpy(fill.images_for((3, 3, 64, 64), 1))
    np.testing.assert_allclose(execute(graph, images), eager(deployed, images).numpy(), atol=1e-4)


def exports_of(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The networks that are handed to the exporter from now on."""
    exported: list[Any] = []
    original = export._export

    def recording(model: nn.Module, *rest: Any) -> Any:
        exported.append(model)
        return original(model, *rest)

    monkeypatch.setattr(export, "_export", recording)
    return exported


@pytest.mark.parametrize(
    ("network", "arguments", "words"),
    [
        (ResNet, {"block": "dense"}, r"block='dense'.*'bottleneck'"),
        (ResNet, {"depths": (3, 4, 6)}, "four stages"),
        (ResNet, {"depths": (3, 4, 6, 0)}, r"depths=\(3, 4, 6, 0\)"),
        (ResNet, {"image_size": 0}, "image_size=0"),
        (ResNet, {"num_classes": 0}, "num_classes=0"),
        (ResNet, {"augmentation": Augmentation(heads=128)}, "128 value channels of 128 outputs"),
        (WideResNet, {"depth": 30}, "such as 16 or 28"),
        (WideResNet, {"depth": 4}, "depth=4"),
        (WideResNet, {"widen": 0}, "widen=0"),
        (WideResNet, {"in_channels": 0}, "in_channels=0"),
        (MnasNet, {"multiplier": 0.0}, "multiplier=0.0"),
        (MnasNet, {"multiplier": float("nan")}, "multiplier=nan"),
        (MnasNet, {"image_size": 0}, "image_size=0"),
    ],
)
def test_an_impossible_shape_is_refused(network: Any, arguments: dict[str, Any], words: str) -> None:
    with torch.device("meta"), pytest.raises(OptionError, match=words):
        network(**arguments)


def test_unknown_arguments_are_refused() -> None:
    with pytest.raises(OptionError, match=r"mnasnet_100 does not take these arguments.*width"):
        create_model("mnasnet_100", random_weights=True, width=3)
