"""Images in memory: all that people hand over for calibration, against the same images as plain float32 arrays."""

from __future__ import annotations

import gc
import itertools
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pcn_deploy.data import arrays
from pcn_deploy.data.arrays import all_of
from pcn_deploy.data.images import ImageSource
from pcn_deploy.data.transform import Transform
from pcn_deploy.errors import DataError, OptionError
from pcn_deploy.verbs.load import load
from pcn_deploy.verbs.options import CompileOptions
from pcn_deploy.verbs.steps.sources import HELD_OUT, as_source, open_sources, repeatable
from pcn_deploy.verbs.verify import verify

torch = pytest.importorskip("torch")

FLOATS = np.random.default_rng(0).standard_normal((6, 3, 8, 8)).astype(np.float32)
PIXELS = np.random.default_rng(1).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)
LABELS = [3, 1, 4, 1, 5, 9]


def transform(channels: int = 3) -> Transform:
    return Transform(resolution=(8, 8), crop_pct=1.0, mean=(0.0,) * channels, std=(1.0,) * channels)


class Frames:
    """A data set as torch's map-style ones: a length and an index, and no IndexError at its end."""

    def __init__(self, image: Callable[[int], Any]) -> None:
        self.image = image

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> Any:
        return self.image(index % 6), LABELS[index % 6]


def batches() -> Iterator[Any]:
    for start in (0, 2, 4):
        yield FLOATS[start : start + 2], np.array(LABELS[start : start + 2])


def tensors(**kind: Any) -> Any:
    return torch.tensor(FLOATS, **kind)


LABELLED: dict[str, Callable[[], Any]] = {
    "DataLoader": lambda: torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(tensors(), torch.tensor(LABELS)), batch_size=4
    ),
    "Dataset": lambda: Frames(lambda index: tensors()[index]),
    "function": lambda: batches,
    "generator": batches,
    "function that returns a list": lambda: lambda: list(batches()),
    "dicts": lambda: [{"pixel_values": images, "labels": labels} for images, labels in batches()],
    "one batch with labels": lambda: (tensors(), torch.tensor(LABELS)),
    "one dict": lambda: {"image": tensors(requires_grad=True), "label": torch.tensor(LABELS)},
    "labels of shape (N, 1)": lambda: [(FLOATS, np.array(LABELS)[:, None])],
    "three of a batch": lambda: [(FLOATS, np.array(LABELS), ["a.jpg"] * 6)],
    "a list of images and labels": lambda: [[FLOATS[index], LABELS[index]] for index in range(6)],
}


@pytest.mark.parametrize("name", LABELLED)
def test_images_with_labels(name: str) -> None:
    source = ImageSource(LABELLED[name](), transform())
    found = list(source)
    np.testing.assert_array_equal(np.stack([sample.image for sample in found]), FLOATS)
    assert [sample.label for sample in found] == LABELS
    assert source.has_labels


UNLABELLED: dict[str, Callable[[], Any]] = {
    "with gradients": lambda: tensors(requires_grad=True),
    "a list of tensors": lambda: [tensors()[:4], tensors()[4], tensors()[5]],
    "float64": lambda: FLOATS.astype(np.float64),
    "a list in a list": lambda: [[FLOATS[0], FLOATS[1]], list(FLOATS[2:])],
    "mixed labels": lambda: [(FLOATS, np.eye(6, dtype=np.float32))],
}


@pytest.mark.parametrize("name", UNLABELLED)
def test_images_without_labels(name: str) -> None:
    source = ImageSource(UNLABELLED[name](), transform())
    np.testing.assert_array_equal(np.stack([sample.image for sample in source]), FLOATS)
    assert not source.has_labels


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_floats_of_every_type(dtype: Any) -> None:
    given = tensors(dtype=dtype)
    found = np.stack([sample.image for sample in ImageSource([given], transform())])
    np.testing.assert_array_equal(found, given.float().numpy())
    assert found.dtype == np.float32


PICTURES: dict[str, Callable[[], Any]] = {
    "arrays (N, H, W, C)": lambda: PIXELS,
    "tensors (N, C, H, W)": lambda: torch.tensor(PIXELS.transpose(0, 3, 1, 2).copy()),
    "tensors (N, H, W, C)": lambda: torch.tensor(PIXELS),
    "arrays (N, C, H, W)": lambda: PIXELS.transpose(0, 3, 1, 2),
    "single images": lambda: list(PIXELS),
    "pictures": lambda: [Image.fromarray(image) for image in PIXELS],
    "a data set of pictures": lambda: Frames(lambda index: Image.fromarray(PIXELS[index])),
}


@pytest.mark.parametrize("name", PICTURES)
def test_pixels_go_through_the_transform(name: str) -> None:
    found = np.stack([sample.image for sample in ImageSource(PICTURES[name](), transform())])
    np.testing.assert_allclose(found, PIXELS.transpose(0, 3, 1, 2) / 255, atol=1e-6)


@pytest.mark.parametrize("channels", [2, 4, 6, 13])
def test_any_number_of_channels(channels: int) -> None:
    random = np.random.default_rng(0)
    floats = random.standard_normal((3, channels, 8, 8)).astype(np.float32)
    found = np.stack([sample.image for sample in ImageSource(floats, transform(channels))])
    np.testing.assert_array_equal(found, floats)
    pixels = random.integers(0, 256, (3, 20, 16, channels), dtype=np.uint8)
    found = np.stack([sample.image for sample in ImageSource(pixels, transform(channels))])
    for image, given in zip(found, pixels, strict=True):
        for plane, band in zip(image, given.transpose(2, 0, 1), strict=True):
            resized = Image.fromarray(band).resize((8, 10), Image.Resampling.BICUBIC).crop((0, 1, 8, 9))
            np.testing.assert_allclose(plane, np.asarray(resized) / 255, atol=1e-6)
    with pytest.raises(DataError, match=rf"\({channels}, 8, 8\); the network takes \(3, 8, 8\). Set --channels"):
        list(ImageSource(floats, transform()))


def test_grey_pixels_fit_networks_of_three_channels() -> None:
    found = next(iter(ImageSource(PIXELS[..., :1], transform()))).image
    np.testing.assert_allclose(found, np.repeat(PIXELS[:1, ..., 0] / 255, 3, 0), atol=1e-6)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (3, "Images were given as int"),
        ([{"frames": FLOATS}], "A batch has the keys 'frames'"),
        (["cat.png"], "holds <U7"),
        ([np.zeros((2, 3, 8, 8), np.int64)], "holds int64 of shape"),
        ([np.zeros((2, 8, 8, 3), bool)], "holds bool of shape"),
        ([None], "holds object"),
        ([np.zeros((2, 8, 8, 5), np.uint8)], r"has shape \(2, 8, 8, 5\)"),
    ],
)
def test_other_things_are_refused_in_words(given: Any, words: str) -> None:
    with pytest.raises(DataError, match=words):
        ImageSource(given, transform())


def test_a_long_stream_is_thinned_while_it_comes() -> None:
    alive = []

    def stream() -> Iterator[Any]:
        for index in range(1000):
            alive.append(index)
            yield np.full((3, 8, 8), index, np.float32)

    source = ImageSource(stream, transform(), limit=10)
    found = [int(sample.image[0, 0, 0]) for sample in source]
    assert len(alive) == 1000
    assert len(found) == 10
    assert found == sorted(set(found))
    assert min(found) < 300 and max(found) >= 700
    assert found == [int(sample.image[0, 0, 0]) for sample in ImageSource(stream, transform(), limit=10)]


@pytest.mark.parametrize("period", [2, 4, 5, 10])
def test_a_long_stream_keeps_all_classes_that_come_in_turn(period: int) -> None:
    def stream() -> Iterator[Any]:
        for start in range(0, 4000, 8):
            labels = np.arange(start, start + 8) % period
            yield np.ones((8, 3, 8, 8), np.float32) * labels[:, None, None, None], labels

    for given in (stream, lambda: (images for images, _ in stream())):
        found = [int(sample.image[0, 0, 0]) for sample in ImageSource(given, transform(), limit=100)]
        assert len(found) == 100
        assert np.bincount(found, minlength=period).min() >= 100 // period // 3


def test_of_a_long_stream_no_whole_batches_stay_in_memory() -> None:
    seen: list[weakref.ref[Any]] = []

    def stream() -> Iterator[Any]:
        for _ in range(200):
            batch = np.zeros((16, 3, 8, 8), np.float32)
            seen.append(weakref.ref(batch))
            yield batch
            del batch

    source = ImageSource(stream, transform(), limit=16)
    gc.collect()
    assert len(source) == 16
    assert sum(batch() is not None for batch in seen) <= 2


@pytest.mark.parametrize(("classes", "limit"), [(2, 512), (5, 512), (10, 512), (5, 250), (10, 200), (5, 80)])
def test_each_class_calibrates_and_judges_whatever_the_order(classes: int, limit: int) -> None:
    labels = np.arange(400) % classes
    options = CompileOptions(transform=transform(), calibration_images=limit)
    for order in (labels, np.sort(labels)):
        given = np.random.default_rng(2).random((400, 3, 8, 8), dtype=np.float32)
        source, held_out = open_sources([(given, order)], None, options)
        assert source is not None and held_out is not None
        assert (len(source), len(held_out)) == ((320, 80) if limit >= 400 else (limit, min(400 - limit, HELD_OUT)))
        for part in (source, held_out):
            found = [sample.label for sample in part if sample.label is not None]
            counts = np.bincount(found, minlength=classes)
            assert np.ptp(counts) <= 2, "in proportion"


def test_a_data_set_is_asked_only_for_what_is_used() -> None:
    asked = []

    def image(index: int) -> Any:
        asked.append(index)
        return FLOATS[index]

    assert len(ImageSource(Frames(image), transform(), limit=3)) == 3
    assert len(asked) == 3


def test_another_transform_than_that_of_the_options_is_refused() -> None:
    source = ImageSource(PIXELS, transform())
    other = Transform(resolution=(8, 8), crop_pct=1.0, mean=(0.5,) * 3, std=(1.0,) * 3)
    assert as_source(source, CompileOptions(transform=transform())) is source
    with pytest.raises(
        OptionError, match=r"than that of the options: mean \(0.0, 0.0, 0.0\) instead of \(0.5, 0.5, 0.5\)"
    ):
        as_source(source, CompileOptions(transform=other))


def test_another_transform_than_that_of_the_bundle_is_refused(path: Path) -> None:
    with load(path) as engine:
        with pytest.raises(OptionError, match=r"than that of the bundle: resolution \(8, 8\) instead of \(32, 32\)"):
            verify(engine, ImageSource(PIXELS, transform()), reference=engine.predict)
        pixels = ImageSource(PIXELS, engine.transform)
        assert verify(engine, pixels, reference=engine.predict)


@pytest.mark.parametrize(
    ("low", "high", "told"), [(0, 255, True), (0, 1, True), (-1, 1, False), (-2.1, 2.6, False), (-5, 5, False)]
)
def test_floats_that_nobody_normalised_are_noted(low: float, high: float, told: bool) -> None:
    images = np.linspace(low, high, 3 * 64, dtype=np.float32).reshape(1, 3, 8, 8)
    notes = ImageSource(images, Transform(resolution=(8, 8))).notes
    assert [f"run from {low:.3g} to {high:.3g}" in note for note in notes] == [True] * told


def test_floats_of_a_network_without_normalisation_are_not_noted() -> None:
    assert ImageSource(np.random.default_rng(0).random((2, 3, 8, 8)), transform()).notes == ()


def test_a_generator_may_calibrate_and_judge() -> None:
    """With a budget and no other images, the same ones are gone through twice."""
    streamed = (image for image in FLOATS)
    again: Any = repeatable(streamed)
    assert [len(list(ImageSource(again, transform()))) for _ in range(2)] == [6, 6]
    assert repeatable(FLOATS) is FLOATS


def test_a_long_stream_does_not_stay_in_memory_where_images_are_held_out() -> None:
    def stream() -> Iterator[Any]:
        for index in range(3000):
            yield np.full((3, 8, 8), index, np.float32), 0

    options = CompileOptions(transform=transform(), calibration_images=10)
    source, held_out = open_sources(stream, None, options)
    assert source is not None and held_out is not None
    assert len(source) == 10
    assert 0 < len(held_out) <= HELD_OUT
    names = [{part.item_name(index) for index in range(len(part))} for part in (source, held_out)]
    assert not names[0] & names[1]


@pytest.mark.parametrize("name", ["arrays (N, H, W, C)", "pictures"])
def test_a_note_tells_that_pixels_have_another_size(name: str) -> None:
    notes = ImageSource(PICTURES[name](), Transform()).notes
    assert len(notes) == 1 and "6 of 6 images looked at are 8x8 (width x height): they become 256x256" in notes[0]
    assert ImageSource(PICTURES[name](), transform()).notes == ()


@pytest.mark.parametrize("kept_all", [True, False])
def test_a_stream_that_does_not_end_is_refused(kept_all: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrays, "MOST_KEPT", 20)
    monkeypatch.setattr(arrays, "MOST_SEEN", 50)
    endless, most = itertools.repeat(PIXELS[0]), 20 if kept_all else 50
    with pytest.raises(DataError, match=rf"not ended after {most}\. Give something that ends"):
        ImageSource(endless, transform(), limit=None if kept_all else 4)
    assert len(ImageSource(itertools.islice(endless, most), transform(), limit=None if kept_all else 4)) > 3
    with pytest.raises(DataError, match="not ended after 20"):
        all_of(endless)
    assert len(all_of(itertools.islice(endless, 20))) == 20
