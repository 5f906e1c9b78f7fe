"""The evaluation transform against a literal computation with Pillow."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from pcn_deploy.data.image_files import about_sizes
from pcn_deploy.data.transform import IMAGENET_MEAN, IMAGENET_STD, Transform, drawn_images
from pcn_deploy.errors import OptionError


def picture(width: int, height: int, mode: str = "RGB") -> Image.Image:
    channels = {"RGB": (3,), "RGBA": (4,), "L": ()}[mode]
    rng = np.random.default_rng(width * height)
    return Image.fromarray(rng.integers(0, 256, (height, width, *channels), dtype=np.uint8))


def normalised(crop: Image.Image, mean: tuple[float, ...], std: tuple[float, ...]) -> npt.NDArray[np.float64]:
    pixels = np.asarray(crop).astype(np.float64) / 255
    channels = pixels[None] if pixels.ndim == 2 else np.moveaxis(pixels, 2, 0)
    return np.stack([(c - m) / s for c, m, s in zip(channels, mean, std, strict=True)])


def check(found: npt.NDArray[np.float32], expected: npt.NDArray[np.float64]) -> None:
    assert found.dtype == np.float32
    assert found.flags["C_CONTIGUOUS"]
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("given", "resized", "resolution"),
    [  # sizes as (width, height); the shorter side becomes 224 / 0.875 = 256
        ((500, 375), (341, 256), (224, 224)),
        ((503, 375), (343, 256), (224, 224)),  # 59.5 pixels to the left become 60
        ((375, 500), (256, 341), (224, 224)),
        ((100, 100), (256, 256), (224, 224)),
        ((256, 256), (256, 256), (224, 224)),
        # crop 112 high, 448 wide: covers 128 x 512
        ((400, 400), (512, 512), (112, 448)),
        ((1000, 100), (1280, 128), (112, 448)),
        ((300, 600), (512, 1024), (112, 448)),
        ((600, 300), (512, 256), (448, 112)[::-1]),
    ],
)
def test_resize_and_centre_crop(given: tuple[int, int], resized: tuple[int, int], resolution: tuple[int, int]) -> None:
    image = picture(*given)
    height, width = resolution
    scaled = image.resize(resized, Image.Resampling.BICUBIC) if resized != given else image
    left, top = round((resized[0] - width) / 2), round((resized[1] - height) / 2)
    crop = scaled.crop((left, top, left + width, top + height))
    check(Transform(resolution=resolution)(image), normalised(crop, IMAGENET_MEAN, IMAGENET_STD))


def test_whole_image_without_crop() -> None:
    transform = Transform(resolution=(20, 30), crop_pct=1.0, mean=(0.5,) * 3, std=(0.25,) * 3)
    image = picture(30, 20)
    check(transform(image), normalised(image, (0.5,) * 3, (0.25,) * 3))


def test_interpolation_is_the_one_asked_for() -> None:
    image = picture(64, 64)
    for name, method in (("nearest", Image.Resampling.NEAREST), ("lanczos", Image.Resampling.LANCZOS)):
        transform = Transform(resolution=(16, 16), crop_pct=1.0, interpolation=name)
        check(transform(image), normalised(image.resize((16, 16), method), IMAGENET_MEAN, IMAGENET_STD))


@pytest.mark.parametrize(
    ("given", "resized", "offset"),
    [
        ((40, 20), (30, 15), (0, 2)),
        ((10, 40), (5, 20), (12, 0)),
        ((60, 40), (30, 20), (0, 0)),
        ((7, 9), (16, 20), (7, 0)),
    ],
)
@pytest.mark.parametrize("order", ["rgb", "bgr"])
def test_a_border_keeps_all_of_the_image_on_the_mean_colour(
    given: tuple[int, int], resized: tuple[int, int], offset: tuple[int, int], order: str
) -> None:
    image, mean = picture(*given), (0.1, 0.3, 0.7)
    whole = Image.new("RGB", (30, 20), (26, 76, 178) if order == "rgb" else (178, 76, 26))
    whole.paste(image.resize(resized, Image.Resampling.BICUBIC), offset)
    if order == "bgr":
        whole = Image.fromarray(np.asarray(whole)[..., ::-1])
    border = Transform(resolution=(20, 30), crop_pct=1.0, crop_mode="border", mean=mean, channel_order=order)
    check(border(image), normalised(whole, mean, IMAGENET_STD))


def test_a_border_of_arrays_has_the_mean_of_each_channel_and_may_be_cut() -> None:
    pixels = np.full((10, 40, 4), 255, np.uint8)
    mean = (0.0, 0.2, 0.4, 0.6)
    border = Transform(resolution=(20, 20), crop_pct=0.5, crop_mode="border", mean=mean, std=(1.0,) * 4)
    found = border.of_array(pixels)
    np.testing.assert_allclose(found[:, 0, 0], 0, atol=1 / 255)
    np.testing.assert_allclose(found[:, 10], np.tile(1 - np.array(mean, np.float32)[:, None], 20), atol=1e-6)
    assert about_sizes(Counter({(40, 10): 6}), border) == []


def test_grey_is_repeated_and_transparency_dropped() -> None:
    transform = Transform(resolution=(24, 24), mean=(0.0,) * 3, std=(1.0,) * 3)
    grey = transform(picture(40, 40, "L"))
    np.testing.assert_array_equal(grey[0], grey[1])
    np.testing.assert_array_equal(grey[0], grey[2])
    clear = picture(40, 40, "RGBA")
    opaque = Image.fromarray(np.asarray(clear)[..., :3])
    np.testing.assert_array_equal(transform(clear), transform(opaque))


def test_one_channel_networks_get_grey() -> None:
    transform = Transform(resolution=(24, 30), crop_pct=1.0, mean=(0.5,), std=(0.5,))
    image = picture(30, 24)
    check(transform(image), normalised(image.convert("L"), (0.5,), (0.5,)))
    assert transform.shape == (1, 24, 30)


def test_a_tiny_image_covers_the_crop() -> None:
    assert Transform(resolution=(33, 47))(picture(1, 2)).shape == (3, 33, 47)
    assert Transform(resolution=(33, 47), crop_pct=1.0)(picture(3000, 5)).shape == (3, 33, 47)


def test_json_round_trip() -> None:
    transform = Transform(resolution=(96, 64), crop_pct=1.0, mean=(0.1,), std=(0.2,), interpolation="bilinear")
    assert Transform.from_json(json.loads(json.dumps(transform.to_json()))) == transform


def test_what_an_older_bundle_does_not_say_was_as_by_default() -> None:
    old = {"resolution": [8, 9], "crop_pct": 0.9, "mean": [0.5], "std": [0.2], "interpolation": "nearest"}
    given = Transform(resolution=(8, 9), crop_pct=0.9, mean=(0.5,), std=(0.2,), interpolation="nearest")
    assert Transform.from_json({**old, "of a newer one": 1}) == given
    for key in old:
        with pytest.raises(KeyError):
            Transform.from_json({name: value for name, value in old.items() if name != key})


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"resolution": (0, 8)}, "below 1 pixel"),
        ({"crop_pct": 0.0}, "crop_pct 0.0"),
        ({"crop_pct": 1.1}, "crop_pct 1.1"),
        ({"mean": (0.5,)}, "1 means but 3"),
        ({"mean": (), "std": ()}, "no channels"),
        ({"mean": (123.675, 116.28, 103.53), "std": (58.4, 57.1, 57.4)}, "divide mean and std by 255"),
        ({"mean": (103.53, 116.28, 123.675), "std": (1.0,) * 3, "channel_order": "bgr"}, "divide mean and std by 255"),
        ({"mean": (0.5,) * 2, "std": (0.5,) * 2, "channel_order": "bgr"}, "2 channels have no order bgr"),
        ({"channel_order": "gbr"}, "'gbr' is unknown"),
        ({"crop_mode": "fill"}, "'fill' is unknown"),
        ({"alpha": "grey"}, "'grey' is unknown"),
        ({"exif": "rotate"}, "'rotate' is unknown"),
        ({"white": 0.0}, "white 0.0 is not above 0"),
        ({"std": (0.5, 0.0, 0.5)}, "not above 0"),
        ({"std": (0.5, float("nan"), 0.5)}, "not above 0"),
        ({"mean": (0.5, float("nan"), 0.5)}, "not finite"),
        ({"interpolation": "cubic"}, "'cubic' is unknown"),
    ],
)
def test_an_impossible_transform_is_refused(wrong: dict[str, Any], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        Transform(**wrong)


def test_sixteen_bits_are_scaled_not_cut_off() -> None:
    ramp = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    transform = Transform(resolution=(16, 16), crop_pct=1.0, mean=(0.0,), std=(1.0,))
    found = transform(Image.fromarray(ramp))[0]
    np.testing.assert_allclose(found, ramp / 65535, atol=1 / 255)


def test_drawn_images_are_what_the_transform_can_give() -> None:
    transform = Transform(resolution=(40, 24))
    images = drawn_images(2, transform, seed=3)
    assert images.shape == (2, 3, 40, 24) and images.dtype == np.float32
    unit = images * np.reshape(transform.std, (3, 1, 1)) + np.reshape(transform.mean, (3, 1, 1))
    assert unit.min() >= -1e-6 and unit.max() <= 1 + 1e-6 and unit.std() > 0.15
    steps = np.abs(np.diff(unit, axis=2))
    assert steps.max() < 0.2, "neighbours in a picture are alike; in noise they differ by up to 1"
    assert not np.array_equal(images[0], images[1])
    np.testing.assert_array_equal(images, drawn_images(2, transform, seed=3))
