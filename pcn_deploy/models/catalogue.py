"""The registered architectures, as data. Importing this imports no torch.

Counts are those of the networks as they stand here; `tests/models/test_registry.py` holds them to it. How they compare
with the published ones: docs/models.md.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from pcn_deploy.models.augmentation import Augmentation


@dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """A named architecture.

    Attributes:
        name: Name on the command line.
        factory: `module:callable` that makes it.
        reader: `module:callable` that reads its layouts of weights, see `models.layouts`.
        arguments: Keyword arguments of the factory; empty where the checkpoint decides.
        parameters: Number of parameters with its own number of classes; 0 where the checkpoint decides.
        gmacs: Multiply-accumulates of one image at `resolution`, in 10^9; 0 where the checkpoint decides.
        checkpoints: Files of others that load unchanged.
        resolution: Height and width it was published for, in pixels.
    """

    name: str
    factory: str
    reader: str
    arguments: dict[str, Any] = field(default_factory=dict)
    parameters: int = 0
    gmacs: float = 0.0
    checkpoints: str = "none published"
    resolution: tuple[int, int] = (224, 224)


_LAYOUTS = "pcn_deploy.models.layouts"


def _patchconvnet(name: str, parameters: int, gmacs: float, checkpoints: str, **arguments: Any) -> ModelInfo:
    return ModelInfo(
        name=name,
        factory="pcn_deploy.models.patchconvnet:PatchConvNet",
        reader=f"{_LAYOUTS}:read_patchconvnet",
        arguments=arguments,
        parameters=parameters,
        gmacs=gmacs,
        checkpoints=checkpoints,
    )


# Shapes and LayerScale initial values: facebookresearch/deit, patchconvnet_models.py.
_PATCHCONVNETS = (
    _patchconvnet(
        "patchconvnet_s60",
        25_231_096,
        3.98,
        "s60_224_1k, s60_{224,384,512}_21k",
        width=384,
        depth=60,
        layer_scale=1e-4,
    ),
    _patchconvnet("patchconvnet_s120", 47_723_896, 7.49, "s120_224_1k", width=384, depth=120),
    _patchconvnet("patchconvnet_b60", 99_388_936, 15.80, "b60_224_1k, b60_{224,384}_21k", width=768, depth=60),
    _patchconvnet("patchconvnet_b120", 188_611_336, 29.77, "b120_224_1k, b120_{224,384}_21k", width=768, depth=120),
    _patchconvnet("patchconvnet_l60", 176_009_576, 28.04, "none published", width=1024, depth=60),
    _patchconvnet("patchconvnet_l120", 334_294_376, 52.85, "none published", width=1024, depth=120),
    _patchconvnet(
        "patchconvnet_s60_multi",
        25_614_712,
        5.31,
        "s60_multi_{scratch,finetune}_1k",
        width=384,
        depth=60,
        layer_scale=1e-4,
        multi_class_token=True,
    ),
    _patchconvnet("patchconvnet", 0, 0.0, "any of the above and your own: the shape is read from the file"),
)

_DEPTHS: dict[str, tuple[str, tuple[int, ...]]] = {
    "34": ("basic", (3, 4, 6, 3)),
    "50": ("bottleneck", (3, 4, 6, 3)),
    "101": ("bottleneck", (3, 4, 23, 3)),
    "152": ("bottleneck", (3, 8, 36, 3)),
}

# The public AA-ResNet-50: its shares of channels, its order, and the fault it was trained with.
LEGACY = Augmentation(
    min_head_channels=1,
    nearest_multiple=True,
    order="kqv",
    transposed_heads=True,
    conv_bias=True,
    pooled="layer",
)


def _resnet(
    name: str, size: str, parameters: int, gmacs: float, reader: str = "read_resnet", checkpoints: str = "", **more: Any
) -> ModelInfo:
    block, depths = _DEPTHS[size]
    return ModelInfo(
        name=name,
        factory="pcn_deploy.models.resnet:ResNet",
        reader=f"{_LAYOUTS}:{reader}",
        arguments={"block": block, "depths": depths, **more},
        parameters=parameters,
        gmacs=gmacs,
        checkpoints=checkpoints or "none published",
    )


_RESNETS = (
    *(
        _resnet(f"resnet{size}", size, parameters, gmacs, checkpoints=f"torchvision and timm resnet{size}")
        for size, parameters, gmacs in (
            ("34", 21_797_672, 3.66),
            ("50", 25_557_032, 4.09),
            ("101", 44_549_160, 7.80),
            ("152", 60_192_808, 11.51),
        )
    ),
    _resnet("aa_resnet34", "34", 20_751_024, 3.60, augmentation=Augmentation(kappa=0.25, upsilon=0.25)),
    _resnet("aa_resnet50", "50", 25_814_192, 4.21, augmentation=Augmentation()),
    _resnet("aa_resnet101", "101", 45_397_784, 8.17, augmentation=Augmentation()),
    _resnet("aa_resnet152", "152", 61_630_720, 12.10, augmentation=Augmentation()),
    _resnet(
        "aa_resnet50_legacy",
        "50",
        25_118_606,
        3.72,
        "read_legacy_aa_resnet",
        "aa_resnet50 of d-li14/dot-product-attention",
        augmentation=LEGACY,
    ),
    *(
        _resnet(f"resnet{size}_attnpool", size, parameters, gmacs, attention_pool=True)
        for size, parameters, gmacs in (
            ("34", 24_427_816, 3.69),
            ("50", 67_534_888, 4.54),
            ("101", 86_527_016, 8.25),
            ("152", 102_170_664, 11.97),
        )
    ),
)


def _wide_resnet(name: str, parameters: int, gmacs: float, **arguments: Any) -> ModelInfo:
    return ModelInfo(
        name=name,
        factory="pcn_deploy.models.wide_resnet:WideResNet",
        reader=f"{_LAYOUTS}:read_wide_resnet",
        arguments={"depth": 28, "widen": 10, **arguments},
        parameters=parameters,
        gmacs=gmacs,
        resolution=(32, 32),
    )


def _mnasnet(name: str, multiplier: float, parameters: int, gmacs: float, **arguments: Any) -> ModelInfo:
    known = multiplier in (0.75, 1.0, 1.4) and not arguments
    return ModelInfo(
        name=name,
        factory="pcn_deploy.models.mnasnet:MnasNet",
        reader=f"{_LAYOUTS}:read_mnasnet",
        arguments={"multiplier": multiplier, **arguments},
        parameters=parameters,
        gmacs=gmacs,
        checkpoints=f"timm semnasnet_{round(100 * multiplier):03d}" if known else "none published",
    )


_MNAS = Augmentation(heads=4, kappa=0.1, upsilon=0.05, min_head_channels=1)

_MODELS = (
    *_PATCHCONVNETS,
    *_RESNETS,
    _wide_resnet("wide_resnet28_10", 36_278_324, 5.21),
    _wide_resnet("aa_wide_resnet28_10", 36_058_836, 6.15, augmentation=Augmentation(pooled="none")),
    _mnasnet("mnasnet_075", 0.75, 2_912_278, 0.22),
    _mnasnet("mnasnet_100", 1.0, 3_887_038, 0.31),
    _mnasnet("mnasnet_125", 1.25, 5_255_486, 0.50),
    _mnasnet("mnasnet_140", 1.4, 6_105_992, 0.59),
    _mnasnet("aa_mnasnet_075", 0.75, 3_016_044, 0.26, augmentation=_MNAS),
    _mnasnet("aa_mnasnet_100", 1.0, 4_063_004, 0.36, augmentation=_MNAS),
    _mnasnet("aa_mnasnet_125", 1.25, 5_531_840, 0.57, augmentation=_MNAS),
    _mnasnet("aa_mnasnet_140", 1.4, 6_443_698, 0.66, augmentation=_MNAS),
)

MODELS = {info.name: info for info in _MODELS}
"""By name, in the order people should see them."""
