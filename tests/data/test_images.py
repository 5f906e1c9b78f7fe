"""Where images come from: folders, archives, arrays; what is counted, and what is refused."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from pcn_deploy.data.images import ImageSource
from pcn_deploy.data.transform import Transform
from pcn_deploy.errors import DataError

TRANSFORM = Transform(resolution=(8, 8), crop_pct=1.0, mean=(0.0,) * 3, std=(1.0,) * 3)


def save(path: Path, value: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (value, value, value)).save(path)


def values(source: ImageSource) -> list[int]:
    """The grey value of each image; images of one colour tell them apart."""
    return [round(float(sample.image[0, 0, 0]) * 255) for sample in source]


def labels(source: ImageSource) -> list[int | None]:
    return [sample.label for sample in source]


def floats(count: int) -> npt.NDArray[np.float32]:
    return np.random.default_rng(0).standard_normal((count, 3, 8, 8)).astype(np.float32)


def test_folders_are_classes_in_alphabetical_order(tmp_path: Path) -> None:
    for index, name in enumerate(("cat/b.png", "cat/a.PNG", "ant/z.bmp", "dog/deep/x.png")):
        save(tmp_path / name, index)
    (tmp_path / "cat" / "notes.txt").write_text("not an image")
    source = ImageSource(tmp_path, TRANSFORM)
    assert len(source) == 4
    assert values(source) == [2, 1, 0, 3]
    assert labels(source) == [0, 1, 1, 2]
    assert source.has_labels
    assert source.name == str(tmp_path)


def test_images_beside_the_folders_have_no_class(tmp_path: Path) -> None:
    save(tmp_path / "cat" / "a.png", 1)
    save(tmp_path / "b.png", 2)
    source = ImageSource(tmp_path, TRANSFORM)
    assert labels(source) == [None, None]
    assert not source.has_labels
    assert next(source.batches(2))[1] is None


@pytest.mark.parametrize("key", ["images", "arr_0"])
def test_npz_of_pixels_is_transformed(tmp_path: Path, key: str) -> None:
    pixels = np.arange(5, dtype=np.uint8)[:, None, None, None] * np.ones((1, 4, 4, 3), np.uint8)
    np.savez(tmp_path / "set.npz", **{key: pixels})  # type: ignore[arg-type] # its annotation takes the keys for options
    source = ImageSource(tmp_path / "set.npz", TRANSFORM)
    assert values(source) == [0, 1, 2, 3, 4]
    assert next(iter(source)).image.shape == (3, 8, 8)


def test_npz_of_floats_is_taken_as_it_is(tmp_path: Path) -> None:
    given = floats(5)
    np.savez(tmp_path / "set.npz", images=given, labels=np.array([3, 1, 4, 1, 5]))
    source = ImageSource(str(tmp_path / "set.npz"), TRANSFORM)
    batches = list(source.batches(2))
    assert [len(images) for images, _ in batches] == [2, 2, 1]
    np.testing.assert_array_equal(np.concatenate([images for images, _ in batches]), given)
    assert [label for _, part in batches if part is not None for label in part] == [3, 1, 4, 1, 5]


@pytest.mark.parametrize(
    ("count", "size", "sizes"),
    [
        (16, 8, [8, 8]),
        (17, 8, [8, 5, 4]),
        (9, 8, [5, 4]),
        (10, 8, [8, 2]),
        (1, 8, [1]),
        (7, 3, [3, 2, 2]),
        (3, 2, [2, 1]),
    ],
)
def test_no_image_is_left_over_alone(count: int, size: int, sizes: list[int]) -> None:
    """Its activations would differ in the last digits from what they are in any batch of several."""
    given = floats(count)
    batches = [images for images, _ in ImageSource(given, TRANSFORM).batches(size)]
    assert [len(images) for images in batches] == sizes
    np.testing.assert_array_equal(np.concatenate(batches), given)


@pytest.mark.parametrize("parts", [1, 2, 3, 7])
def test_parts_share_the_very_batches(tmp_path: Path, parts: int) -> None:
    root = spoilt_folder(tmp_path, 20, 1)
    whole = ImageSource(root, TRANSFORM)
    expected = [images for images, _ in whole.batches(4)]
    sources = [ImageSource(root, TRANSFORM) for _ in range(parts)]
    found: list[npt.NDArray[np.float32] | None] = [None] * len(expected)
    for part, source in enumerate(sources):
        found[part::parts] = [images for images, _ in source.batches(4, part=part, parts=parts)]
        assert (source.digest == "") == (parts > 1), "unknown until all parts are there"
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)
    together = np.stack([source.fingerprints for source in sources]).max(0)
    for source in sources:
        source.complete(together)
        assert (source.digest, source.unreadable) == (whole.digest, whole.unreadable)


def test_parts_together_are_stopped_by_too_many_unreadable_images(tmp_path: Path) -> None:
    source = ImageSource(spoilt_folder(tmp_path, 7, 3), TRANSFORM, max_unreadable=0.2)
    list(source.batches(2, part=1, parts=2))  # files 2, 3, 6 and 7; file 2 is unreadable
    together = np.ones((10, 32), np.uint8)
    together[:3] = 0
    with pytest.raises(DataError, match="3 of 10 images"):
        source.complete(together)


def test_iterables_of_images_and_of_batches() -> None:
    given = floats(4)
    mixed = ImageSource((part for part in (given[0], given[1:3], given[3].astype(np.float64))), TRANSFORM)
    for _ in range(2):  # every pass yields the same, even from a generator
        np.testing.assert_array_equal(np.stack([sample.image for sample in mixed]), given)
    assert {sample.image.dtype for sample in mixed} == {np.dtype(np.float32)}


@pytest.mark.parametrize("limit", [1, 2, 4, 10, 99])
def test_a_limit_is_spread_over_all(limit: int) -> None:
    given = np.arange(10, dtype=np.float32)[:, None, None, None] / 255 * np.ones((1, 3, 8, 8), np.float32)
    whole = ImageSource(given, TRANSFORM)
    taken = values(ImageSource(given, TRANSFORM, limit=limit))
    assert taken == values(whole.subset(limit))
    stretches = np.array_split(range(10), min(limit, 10))
    assert len(taken) == len(stretches)
    width = 10 / len(stretches)
    assert all(int(index * width) <= value < (index + 1) * width for index, value in enumerate(taken))
    assert len(whole) == 10, "a subset leaves the source alone"


@pytest.mark.parametrize("classes", [2, 3, 5, 8])
def test_a_subset_is_of_all_classes_whatever_their_order(classes: int) -> None:
    given = floats(40)
    for labels in (np.arange(40) % classes, np.sort(np.arange(40) % classes)):
        part = ImageSource([(given, labels)], TRANSFORM).subset(8)
        counts = np.bincount([sample.label for sample in part if sample.label is not None], minlength=classes)
        assert counts.sum() == 8
        assert counts.min() >= 8 // classes
        assert counts.max() <= -(-8 // classes) + 1


def test_a_subset_without_labels_has_no_period() -> None:
    given = np.arange(161, dtype=np.float32)[:, None, None, None] * np.ones((1, 3, 8, 8), np.float32)
    part = [int(sample.image[0, 0, 0]) for sample in ImageSource(given, TRANSFORM).subset(41)]
    assert part == sorted(set(part))
    for period in (2, 4):
        assert np.bincount(np.array(part) % period, minlength=period).min() >= 41 // (2 * period)


def spoilt_folder(root: Path, good: int, bad: int) -> Path:
    for index in range(good):
        save(root / f"good{index:02}.png", index)
    save(root / "whole.png", 0)
    data = (root / "whole.png").read_bytes()
    (root / "whole.png").unlink()
    for index in range(bad):
        (root / f"bad{index:02}.png").write_bytes([b"no image", b"", data[: len(data) // 2]][index % 3])
    return root


def test_unreadable_images_are_counted_and_left_out(tmp_path: Path) -> None:
    source = ImageSource(spoilt_folder(tmp_path, 7, 3), TRANSFORM, max_unreadable=0.3)
    for _ in range(2):  # counted anew in every pass
        assert values(source) == [0, 1, 2, 3, 4, 5, 6]
        assert [Path(name).name for name in source.unreadable] == ["bad00.png", "bad01.png", "bad02.png"]


def test_too_many_unreadable_images_stop_the_run(tmp_path: Path) -> None:
    source = ImageSource(spoilt_folder(tmp_path, 7, 3), TRANSFORM, max_unreadable=0.29)
    with pytest.raises(
        DataError, match=r"3 of 10 images in .* cannot be read so far; .*29%.* The first: .*bad00\.png.*\.$"
    ):
        values(source)
    with pytest.raises(DataError, match="1 of 10 images"):
        values(ImageSource(tmp_path, TRANSFORM, max_unreadable=0.0))
    with pytest.raises(DataError, match="None of the 2 images"):
        values(ImageSource(spoilt_folder(tmp_path / "all", 0, 2), TRANSFORM, max_unreadable=1.0))


def test_no_images_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "none.npz", images=np.zeros((0, 8, 8, 3), np.uint8))
    (tmp_path / "folder").mkdir()
    no_arrays: list[npt.NDArray[np.float32]] = []
    for empty in (tmp_path / "folder", tmp_path / "none.npz", no_arrays):
        with pytest.raises(DataError, match=r"No images in .*\.npz"):
            ImageSource(empty, TRANSFORM)
    for wrong in (tmp_path / "absent", tmp_path / "absent.npz"):
        with pytest.raises(DataError, match="neither a folder of images nor"):
            ImageSource(wrong, TRANSFORM)
    with pytest.raises(DataError, match="at least 1"):
        ImageSource(floats(1), TRANSFORM, limit=0)


def test_unusable_archives_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text.npz").write_text("no archive")
    np.savez(tmp_path / "empty.npz")
    np.savez(tmp_path / "pickled.npz", images=np.array([{"a": 1}], object), allow_pickle=True)
    np.savez(tmp_path / "labels.npz", images=floats(3), labels=np.array([1, 2]))
    np.savez(tmp_path / "ints.npz", images=np.zeros((2, 8, 8, 3), np.int64))
    for name in ("text", "empty", "pickled", "labels", "ints"):
        with pytest.raises(DataError, match=rf"{name}\.npz"):
            ImageSource(tmp_path / f"{name}.npz", TRANSFORM)


@pytest.mark.parametrize(
    ("shape", "way"),
    [
        ((2, 3, 8, 9), "Set --resolution"),
        ((3, 9, 8), "Set --resolution"),
        ((2, 1, 8, 8), "Set --channels"),
        ((2, 8, 8, 3), r"np\.moveaxis"),
    ],
)
def test_arrays_of_the_wrong_size_are_refused(shape: tuple[int, ...], way: str) -> None:
    source = ImageSource([np.zeros(shape, np.float32)], TRANSFORM)
    with pytest.raises(DataError, match=rf"array\[0\] has shape .*\(3, 8, 8\)\. .*{way}"):
        list(source)


@pytest.mark.parametrize("shape", [(8, 8), (2, 2, 3, 8, 8)])
def test_arrays_that_are_no_images_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(DataError, match="has shape"):
        ImageSource([np.zeros(shape, np.float32)], TRANSFORM)
    with pytest.raises(DataError, match="has shape"):
        ImageSource([np.zeros((2, 8, 8, 4), np.uint8)], TRANSFORM)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_numbers_are_refused(value: float) -> None:
    given = floats(3)
    given[1, 2, 3, 4] = value
    with pytest.raises(DataError, match=r"array\[1\] holds NaN or infinite"):
        list(ImageSource(given, TRANSFORM))


def digest(given: npt.NDArray[np.float32]) -> str:
    source = ImageSource(given, TRANSFORM)
    assert source.digest == "", "unknown before a complete pass"
    list(source)
    return source.digest


def test_digest_is_that_of_the_transformed_images_in_order() -> None:
    given = floats(4)
    each = b"".join(hashlib.sha256(image.tobytes()).digest() for image in given)
    assert digest(given) == hashlib.sha256(each).hexdigest() == digest(given.copy())
    changed = given.copy()
    changed[2, 0, 0, 0] += 1e-3
    assert len({digest(given), digest(given[::-1]), digest(given[:3]), digest(changed)}) == 4
