"""The attention map as a picture: at the right place, readable, and never over a file that is wanted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pcn_deploy.data.transform import Transform
from pcn_deploy.errors import OptionError, OutputError
from pcn_deploy.show.heatmap import SHORT_SIDE, choose_map, overlay, picture_paths, save

TRANSFORM = Transform(resolution=(32, 48), mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
GREY = Transform(resolution=(32, 48), mean=(0.5,), std=(0.25,))


def transformed(pixels: Any, transform: Transform = TRANSFORM) -> Any:
    """Pixels `(H, W, C)` of 0 to 1 as the network sees them."""
    return ((pixels - np.array(transform.mean)) / np.array(transform.std)).transpose(2, 0, 1).astype(np.float32)


def flat(value: float, transform: Transform = TRANSFORM, shape: tuple[int, int] = (32, 48)) -> Any:
    return transformed(np.full((*shape, len(transform.mean)), value), transform)


def colours(picture: Image.Image) -> Any:
    return np.asarray(picture, np.float64)


def yellow(picture: Image.Image) -> Any:
    """How far red and green lie above blue."""
    pixels = colours(picture)
    return pixels[..., :2].min(-1) - pixels[..., 2]


def spot(row: int, column: int) -> Any:
    """A map of 4x6 positions that looks at one of them, and a little at the rest."""
    attention = np.full((4, 6), 0.01, np.float32)
    attention[row, column] = 0.5
    return attention


@pytest.mark.parametrize("shade", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(("row", "column"), [(0, 4), (3, 0), (1, 5)])
def test_the_picture_glows_where_the_network_looked(row: int, column: int, shade: float) -> None:
    picture = overlay(flat(shade), spot(row, column), TRANSFORM)
    side = picture.height // 4
    assert picture.width == 6 * side
    rows = slice(row * side + side // 4, (row + 1) * side - side // 4)
    columns = slice(column * side + side // 4, (column + 1) * side - side // 4)
    far = np.ones((picture.height, picture.width), bool)
    far[max(0, (row - 1) * side) : (row + 2) * side, max(0, (column - 1) * side) : (column + 2) * side] = False
    light, tone = colours(picture).mean(-1), yellow(picture)
    assert light[rows, columns].mean() > light[far].max() + 10, "also where the image itself is white"
    assert tone[rows, columns].mean() > tone[far].max() + 40


def test_the_middle_of_the_glow_is_the_middle_of_the_patch() -> None:
    picture = overlay(flat(0.2), spot(2, 1), TRANSFORM)
    side = picture.height / 4
    rows, columns = np.nonzero(yellow(picture) > 0.8 * yellow(picture).max())
    assert rows.mean() == pytest.approx(2.5 * side, abs=0.05 * side)
    assert columns.mean() == pytest.approx(1.5 * side, abs=0.05 * side)


def test_more_attention_is_lighter_all_the_way() -> None:
    attention = np.linspace(0, 0.2, 48, dtype=np.float32)[None].repeat(32, 0)
    picture = overlay(flat(0.5, shape=(448, 672)), attention, TRANSFORM)
    mapped = colours(picture)[224] - (1 - np.linspace(0.15, 0.75, 672)[:, None]) * 0.75 * 0.5 * 255
    weights = [0.2126, 0.7152, 0.0722]
    assert (np.diff((mapped @ weights)[7:-7:14]) > 0).all()


def test_the_image_is_the_one_the_network_saw() -> None:
    """The transform is undone, so its values do not show; light stays light and colours keep their side."""
    pixels = np.zeros((32, 48, 3))
    pixels[:, :24] = (0.9, 0.9, 0.9)
    pixels[:16, 24:] = (0.9, 0.1, 0.1)
    uniform = np.full((4, 6), 1 / 24, np.float32)
    found = colours(overlay(transformed(pixels), uniform, TRANSFORM))
    side = found.shape[0] // 4
    light, red, black = found[2 * side, side], found[side, 5 * side], found[3 * side, 5 * side]
    assert light.min() > 120 > 100 > red.max() > black.max()
    assert red[0] > 1.2 * red[1]
    other = Transform(resolution=(32, 48), mean=(0.1, 0.2, 0.3), std=(1.0, 0.5, 0.7))
    same = colours(overlay(transformed(pixels, other), uniform, other))
    np.testing.assert_allclose(same, found, atol=2.01)


def test_equal_weights_show_no_place() -> None:
    uniform = np.full((4, 6), 1 / 24, np.float32)
    rounded = uniform + np.random.default_rng(0).choice([-1e-8, 1e-8], (4, 6)).astype(np.float32)
    assert np.ptp(rounded) > 0
    for attention in (uniform, rounded, np.zeros((4, 6), np.float32), np.ones((1, 1), np.float32)):
        found = colours(overlay(flat(0.5), attention, TRANSFORM))
        assert np.ptp(found, axis=(0, 1)).max() == 0


def test_a_nearly_flat_map_looks_flat() -> None:
    """Weights that differ by a few percent glow by a few percent, and not as if one were all."""
    low, shades = 1 / 24, []
    for share in (0.02, 0.2, 0.6, 2.0, 4.0):
        attention = np.full((4, 6), low, np.float32)
        attention[1, 4] += share * low
        chosen, seen = choose_map(attention[None], 0, None)
        assert seen.nearly_flat == (share < 1)
        assert seen.smallest == pytest.approx(low)
        assert seen.largest == pytest.approx(low * (1 + share))
        shades.append(float(np.ptp(yellow(overlay(flat(0.5), chosen, TRANSFORM)))))
    assert shades[0] < 0.1 * shades[3]
    assert shades[0] < shades[1] < shades[2] < shades[3]
    assert shades[3] == shades[4], "beyond that, the range is the map's own"


def test_whose_map_is_drawn() -> None:
    maps = np.stack([spot(0, 1), spot(1, 2), spot(2, 3)])
    chosen, seen = choose_map(maps, 2, None)
    assert (seen.class_index, chosen.argmax()) == (2, maps[2].argmax())
    chosen, seen = choose_map(maps, 2, 1)
    assert (seen.class_index, chosen.argmax()) == (1, maps[1].argmax())
    assert seen.uniform == 1 / 24
    assert choose_map(maps[:1], 2, None)[1].class_index is None
    with pytest.raises(OptionError, match=r"Class 3 has no map: the network has 3 classes"):
        choose_map(maps, 2, 3)
    with pytest.raises(OptionError, match=r"one attention map for all classes.*Leave --class out"):
        choose_map(maps[:1], 2, 0)


def test_an_image_of_one_channel() -> None:
    found = overlay(flat(0.5, GREY), spot(0, 4), GREY)
    assert found.mode == "RGB"
    expected = overlay(flat(0.5), spot(0, 4), TRANSFORM)
    np.testing.assert_allclose(colours(found), colours(expected), atol=1.01)


@pytest.mark.parametrize(
    ("shape", "size"),
    [((32, 48), (672, 448)), ((30, 20), (460, 690)), ((224, 224), (448, 448)), ((448, 600), (600, 448))],
)
def test_small_images_are_enlarged_by_a_whole_factor(shape: tuple[int, int], size: tuple[int, int]) -> None:
    picture = overlay(flat(0.5, shape=shape), spot(0, 0), TRANSFORM)
    assert picture.size == size
    assert min(size) >= SHORT_SIDE


def test_a_large_image_keeps_its_size() -> None:
    assert overlay(flat(0.5, shape=(500, 700)), spot(0, 0), TRANSFORM).size == (700, 500)


def test_one_image_goes_to_the_file_named(tmp_path: Path) -> None:
    for name in ("a.png", "a.JPG", "a.jpeg", "a.webp"):
        assert picture_paths(tmp_path / name, [Path("x.bmp")], overwrite=False) == [tmp_path / name]


def test_images_go_to_a_folder(tmp_path: Path) -> None:
    images = [Path("one/cat.jpg"), Path("two/dog.bmp")]
    for folder in (tmp_path / "new", tmp_path):
        assert picture_paths(folder, images, overwrite=False) == [folder / "cat.png", folder / "dog.png"]
        assert picture_paths(folder, images[:1], overwrite=False) == [folder / "cat.png"]
    assert not (tmp_path / "new").exists(), "made when the first picture is written"
    dotted = tmp_path / "v1.2"
    dotted.mkdir()
    assert picture_paths(dotted, images[:1], overwrite=False) == [dotted / "cat.png"]


def test_images_of_one_name_get_numbers(tmp_path: Path) -> None:
    images = [Path("one/cat.jpg"), Path("two/cat.png"), Path("dog.png")]
    found = picture_paths(tmp_path, images, overwrite=False)
    assert [path.name for path in found] == ["000_cat.png", "001_cat.png", "002_dog.png"]


def test_names_that_cannot_be_meant(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"out\.png is one file for 2 images\. Name a folder: --heatmap \S*out$"):
        picture_paths(tmp_path / "out.png", [Path("a.png"), Path("b.png")], overwrite=False)
    with pytest.raises(OptionError, match=r"out\.v2: a picture is written as \.png, \.jpg or \.webp\. If a folder"):
        picture_paths(tmp_path / "out.v2", [Path("a.png")], overwrite=False)


def test_pictures_that_exist(tmp_path: Path) -> None:
    (tmp_path / "b.png").write_bytes(b"precious")
    images = [Path("x/a.png"), Path("x/b.png")]
    for where, given in ((tmp_path, images), (tmp_path / "b.png", images[:1])):
        with pytest.raises(OutputError, match=r"b\.png exists\. Give --overwrite"):
            picture_paths(where, given, overwrite=False)
        assert len(picture_paths(where, given, overwrite=True)) == len(given)


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_image_is_never_replaced_by_its_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overwrite: bool
) -> None:
    image = tmp_path / "cat.png"
    Image.new("RGB", (8, 8)).save(image)
    monkeypatch.chdir(tmp_path)
    for where in (tmp_path, image, Path(), Path("cat.png")):
        with pytest.raises(OptionError, match=r"cat\.png would take the place of the image itself"):
            picture_paths(where, [image], overwrite=overwrite)
    assert picture_paths(tmp_path / "maps", [image], overwrite=overwrite)


def test_pictures_are_written(tmp_path: Path) -> None:
    picture = overlay(flat(0.5), spot(0, 4), TRANSFORM)
    for name in ("new/deep/a.png", "b.jpg", "c.webp"):
        save(picture, tmp_path / name)
        with Image.open(tmp_path / name) as opened:
            np.testing.assert_allclose(colours(opened.convert("RGB")).mean(), colours(picture).mean(), atol=2)


def test_pictures_that_cannot_be_written(tmp_path: Path) -> None:
    picture = overlay(flat(0.5), spot(0, 4), TRANSFORM)
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(OutputError, match=r"The folder \S*sub cannot be made: .*Give another with --heatmap"):
        save(picture, tmp_path / "file" / "sub" / "a.png")
    (tmp_path / "a.png").mkdir()
    with pytest.raises(OutputError, match=r"a\.png cannot be written: Is a directory\. Give another name"):
        save(picture, tmp_path / "a.png")
