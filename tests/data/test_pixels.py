"""Images of every kind, written by Pillow, against pixels made by hand; what is silently wrong elsewhere is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from pcn_deploy.data.image_files import read_image
from pcn_deploy.data.images import ImageSource
from pcn_deploy.data.transform import Transform
from pcn_deploy.errors import DataError

RAMP = np.linspace(0, 1, 64).reshape(8, 8)


def transform(channels: int = 3, **given: Any) -> Transform:
    shape = {"resolution": (8, 8), "crop_pct": 1.0, "mean": (0.0,) * channels, "std": (1.0,) * channels}
    return Transform(**{**shape, **given})


def read(image: Image.Image, path: Path, **given: Any) -> npt.NDArray[np.float32]:
    """What comes of an image after it was written and read, `(3, 8, 8)` in [0, 1]."""
    image.save(path)
    return read_image(path, transform(**given))


def close(found: npt.NDArray[np.float32], expected: npt.NDArray[Any], steps: float = 0.51) -> None:
    """Equal within a rounding to 8 bits, in every channel."""
    np.testing.assert_allclose(found, np.broadcast_to(expected, found.shape), atol=steps / 255)


def deep(name: str) -> Image.Image:
    """The ramp in more than 8 bits."""
    return {
        "float to 1": lambda: Image.fromarray(RAMP.astype(np.float32)),
        "float to 255": lambda: Image.fromarray((RAMP * 255).astype(np.float32)),
        "float to 1000": lambda: Image.fromarray((RAMP * 1000).astype(np.float32)),
        "int32 to 255": lambda: Image.fromarray((RAMP * 255).round().astype(np.int32)),
        "int32 to 4095": lambda: Image.fromarray((RAMP * 4095).round().astype(np.int32)),
        "negative": lambda: Image.fromarray((RAMP - 0.5).astype(np.float32)),
        "NaN": lambda: Image.fromarray(np.where(RAMP > 0.5, np.nan, RAMP).astype(np.float32)),
        "uint16": lambda: Image.fromarray((RAMP * 65535).round().astype(np.uint16)),
        "uint16 to 4095": lambda: Image.fromarray((RAMP * 4095).round().astype(np.uint16)),
        "uint16 to 255": lambda: Image.fromarray((RAMP * 255).round().astype(np.uint16)),
    }[name]()


@pytest.mark.parametrize("name", ["float to 1", "float to 255", "float to 1000", "int32 to 255", "int32 to 4095"])
def test_values_without_a_white_are_refused_in_words(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match=r"x\.tif holds .* from 0 to \d+, and nothing says which value is white"):
        read(deep(name), tmp_path / "x.tif")


@pytest.mark.parametrize(
    ("name", "suffix", "white"),
    [
        ("float to 1", "tif", 1),
        ("float to 255", "tif", 255),
        ("float to 1000", "tif", 1000),
        ("int32 to 255", "tif", 255),
        ("int32 to 4095", "tif", 4095),
        ("uint16", "tif", None),
        ("uint16", "png", None),
        ("uint16 to 4095", "tif", 4095),
        ("uint16 to 4095", "png", 4095),
        ("uint16 to 255", "png", 255),
    ],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_what_is_white_scales_the_values(
    tmp_path: Path, name: str, suffix: str, white: float | None, channels: int
) -> None:
    close(read(deep(name), tmp_path / f"x.{suffix}", white=white, channels=channels), RAMP)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        *((name, "expected 0 to --white 255") for name in ("float to 1000", "negative", "uint16")),
        ("NaN", r"x\.tif holds NaN or infinity in 32 of 64 pixels"),
    ],
)
def test_values_beyond_white_are_refused(tmp_path: Path, name: str, reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        read(deep(name), tmp_path / "x.tif", white=255)


@pytest.mark.parametrize("suffix", ["tif", "png"])
def test_sixteen_bits_that_would_be_black_are_refused(tmp_path: Path, suffix: str) -> None:
    with pytest.raises(DataError, match=r"16 bits but no value above 255, so it would be black. Build with --white"):
        read(deep("uint16 to 255"), tmp_path / f"x.{suffix}")


def test_black_in_sixteen_bits_is_black(tmp_path: Path) -> None:
    close(read(Image.fromarray(np.zeros((8, 8), np.uint16)), tmp_path / "x.png"), np.zeros(()))


def test_one_bit_and_palettes(tmp_path: Path) -> None:
    black_or_white = (RAMP > 0.5).astype(np.uint8)
    close(read(Image.fromarray(black_or_white * 255).convert("1"), tmp_path / "1.png"), black_or_white)
    indices = Image.frombytes("P", (8, 8), (np.arange(64) % 3).astype(np.uint8).tobytes())
    colours = np.array([[255, 0, 0], [0, 200, 0], [10, 20, 30]], np.uint8)
    indices.putpalette(colours.tobytes())
    expected = colours[np.arange(64).reshape(8, 8) % 3].transpose(2, 0, 1) / 255
    for name in ("p.png", "p.bmp"):
        close(read(indices, tmp_path / name), expected)


def clear(mode: str) -> Image.Image:
    """Grey 200, transparent on the left half."""
    alpha = np.repeat(np.array([[0] * 4 + [255] * 4], np.uint8), 8, 0)
    grey = np.full((8, 8), 200, np.uint8)
    rgba = Image.fromarray(np.stack([grey, grey, grey, alpha], -1))
    if mode != "P":
        return rgba.convert(mode)
    indexed = Image.frombytes("P", (8, 8), (alpha > 0).astype(np.uint8).tobytes())
    indexed.putpalette(bytes([200] * 6))
    indexed.info["transparency"] = 0
    return indexed


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("alpha", "left"), [("drop", 200), ("white", 255), ("black", 0)])
def test_transparency(tmp_path: Path, mode: str, channels: int, alpha: str, left: int) -> None:
    found = read(clear(mode), tmp_path / "x.png", alpha=alpha, channels=channels)
    close(found, np.array([left] * 4 + [200] * 4) / 255)


def test_cmyk_by_the_plain_formula(tmp_path: Path) -> None:
    inks = np.random.default_rng(0).integers(0, 256, (8, 8, 4), dtype=np.uint8)
    found = read(Image.frombytes("CMYK", (8, 8), inks.tobytes()), tmp_path / "x.tif")
    cmyk = inks.astype(np.float64) / 255
    close(found, ((1 - cmyk[..., :3]) * (1 - cmyk[..., 3:])).transpose(2, 0, 1), 1.5)


@pytest.mark.parametrize("turn", range(1, 9))
def test_exif_orientation_is_ignored_unless_asked_for(tmp_path: Path, turn: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    image, exif = Image.fromarray(pixels), Image.Exif()
    exif[0x0112] = turn
    image.save(tmp_path / "x.png", exif=exif)
    flips = {2: (0, True), 3: (2, False), 4: (2, True), 5: (1, True), 6: (3, False), 7: (3, True), 8: (1, False)}
    quarter, mirrored = flips.get(turn, (0, False))
    upright = np.rot90(pixels, quarter)
    upright = upright[:, ::-1] if turn in (2, 4) else upright[::-1] if mirrored else upright
    close(read_image(tmp_path / "x.png", transform()), pixels.transpose(2, 0, 1) / 255)
    close(read_image(tmp_path / "x.png", transform(exif="apply")), upright.transpose(2, 0, 1) / 255)


def test_bgr_is_blue_first_with_mean_and_std_in_that_order(tmp_path: Path) -> None:
    mean, std = (0.1, 0.2, 0.3), (0.5, 1.0, 2.0)
    colour = np.array([250, 100, 50]) / 255
    image = Image.new("RGB", (8, 8), (250, 100, 50))
    found = read(image, tmp_path / "x.png", channel_order="bgr", mean=mean, std=std)
    np.testing.assert_allclose(found[:, 0, 0], (colour[::-1] - mean) / std, atol=1e-6)


def test_squash_keeps_no_proportions() -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 50, 3), dtype=np.uint8))
    found = transform(crop_mode="squash")(image)
    close(found, np.asarray(image.resize((8, 8), Image.Resampling.BICUBIC)).transpose(2, 0, 1) / 255)
    cut = transform(crop_mode="squash", crop_pct=0.8)(image)
    close(cut, np.asarray(image.resize((10, 10), Image.Resampling.BICUBIC))[1:9, 1:9].transpose(2, 0, 1) / 255)


def test_files_are_refused_by_a_network_of_other_channels(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"the network takes 6 channels\. Give arrays"):
        read(Image.new("RGB", (8, 8)), tmp_path / "x.png", channels=6)


def test_a_source_stops_with_the_reason(tmp_path: Path) -> None:
    for index in range(4):
        deep("float to 1").save(tmp_path / f"{index}.tif")
    with pytest.raises(DataError, match=r"1 of 4 images .* The first: .*0\.tif holds floats from 0 to 1.*--white"):
        list(ImageSource(tmp_path, transform()))
    assert len(list(ImageSource(tmp_path, transform(white=1)))) == 4


def notes(folder: Path, **given: Any) -> str:
    return "\n".join(ImageSource(folder, transform(**given)).notes)


def test_notes_tell_what_is_done_and_what_to_give(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (8, 8)).save(tmp_path / "turned.jpg", exif=exif)
    clear("RGBA").save(tmp_path / "clear.png")
    Image.new("CMYK", (8, 8)).save(tmp_path / "ink.tif")
    deep("uint16").save(tmp_path / "deep.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    told = notes(tmp_path)
    for words in ("carry an EXIF orientation", "have an alpha channel", "are CMYK", "have 16 bits"):
        assert f"1 of 5 images looked at {words}" in told
    chosen = notes(tmp_path, exif="apply", alpha="white", white=65535)
    assert chosen.count("looked at") == 1 and "are CMYK" in chosen


@pytest.mark.parametrize(
    ("size", "given", "words"),
    [
        ((32, 32), {"resolution": (224, 224), "crop_pct": 0.875}, "32x32 (width x height): they become 256x256"),
        ((160, 160), {"resolution": (224, 224), "crop_pct": 0.875}, "--resolution 160x160 --crop-pct 1"),
        ((224, 224), {"resolution": (224, 224), "crop_pct": 0.875}, "the middle 224x224 is kept (77 % of the area)"),
        ((1280, 720), {"resolution": (224, 224), "crop_pct": 0.875}, "become 455x256, of which the middle 224x224"),
        ((224, 224), {"resolution": (224, 224), "crop_pct": 1.0}, ""),
        ((256, 256), {"resolution": (224, 224), "crop_pct": 0.875}, ""),
        ((32, 32), {"resolution": (32, 32), "crop_pct": 1.0}, ""),
        ((64, 48), {"resolution": (48, 64), "crop_pct": 1.0}, ""),
        ((64, 64), {"resolution": (32, 32), "crop_pct": 1.0}, "become 32x32. If the network was trained on others"),
    ],
)
def test_a_note_tells_that_images_have_another_size(
    tmp_path: Path, size: tuple[int, int], given: dict[str, Any], words: str
) -> None:
    for index in range(3):
        Image.new("RGB", size).save(tmp_path / f"{index}.png")
    told = notes(tmp_path, **given)
    assert words in told
    assert bool(words) == ("looked at" in told)


def test_images_of_many_sizes_are_only_noted_where_most_are_enlarged(tmp_path: Path) -> None:
    for index in range(6):
        Image.new("RGB", (300 + index, 400)).save(tmp_path / f"{index}.png")
    large = {"resolution": (224, 224), "crop_pct": 0.875}
    assert notes(tmp_path, **large) == ""
    for index in range(8):
        Image.new("RGB", (100 + index, 90)).save(tmp_path / f"small{index}.png")
    assert "8 of 14 images looked at are smaller than 224x224 needs" in notes(tmp_path, **large)
