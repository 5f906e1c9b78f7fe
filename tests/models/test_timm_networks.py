"""Networks of timm by name, against timm itself: the transform, the checkpoints as its trainer writes them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from PIL import Image

torch = pytest.importorskip("torch")
timm = pytest.importorskip("timm")

from pcn_deploy.models.libraries import configured_transform  # noqa: E402

SIZES = ((500, 375), (375, 501), (100, 130), (640, 200), (256, 256), (33, 700))
"""Widths and heights: larger and smaller than the crop, long and upright."""

CONFIGURED = {
    "resnet18": (0.95, "bicubic", 224, "center"),
    "resnet18.tv_in1k": (0.875, "bilinear", 224, "center"),
    "vit_tiny_patch16_224": (0.9, "bicubic", 224, "center"),
    "efficientnet_b1": (1.0, "bicubic", 256, "center"),
    "resnetv2_50": (0.95, "bicubic", 224, "center"),
    "inception_v3.tf_in1k": (0.875, "bicubic", 299, "center"),
    "tf_efficientnet_b1.in1k": (0.882, "bicubic", 240, "center"),
    "vit_base_patch16_siglip_224": (0.9, "bicubic", 224, "squash"),
    "ecaresnet50t": (0.95, "bicubic", 256, "center"),
    "mobilenetv3_small_050": (0.875, "bicubic", 224, "center"),
    "nfnet_f0": (0.9, "bicubic", 192, "squash"),
}


def picture(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(width * height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def same_images(ours: Any, theirs: Any) -> None:
    """To 2e-6: both make the same 8-bit pixels, and normalise them in float32, whose step at 2.6 is 2.4e-7."""
    for size in SIZES:
        image = picture(*size)
        np.testing.assert_allclose(ours(image), theirs(image).numpy(), rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", CONFIGURED)
def test_images_are_those_of_timm(name: str) -> None:
    transform = configured_transform(f"timm:{name}")
    share, interpolation, side, mode = CONFIGURED[name]
    assert (transform.crop_pct, transform.interpolation, transform.crop_mode) == (share, interpolation, mode)
    assert transform.resolution == (side, side)
    network = timm.create_model(name, pretrained=False)
    same_images(transform, timm.data.create_transform(**timm.data.resolve_model_data_config(network)))
