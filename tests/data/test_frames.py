"""Frames in memory become what the transform makes of the same image in a file, to the bit."""

from __future__ import annotations

import multiprocessing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pcn_deploy import ImageSource, Transform
from pcn_deploy.data import frames
from pcn_deploy.data.frames import preprocess
from pcn_deploy.data.resize import bands
from pcn_deploy.errors import DataError, OptionError

TRANSFORM = Transform(resolution=(24, 32))


@pytest.fixture(autouse=True)
def _nothing_planned() -> Any:
    frames._planned.cache_clear()
    yield
    frames._planned.cache_clear()


def pixels(height: int, width: int, *more: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).integers(0, 256, (height, width, *more), dtype=np.uint8)


def by_hand(image: Any, transform: Transform) -> Any:
    """Resized whole and cropped by Pillow, then normalised in float64."""
    height, width = transform.resolution
    size = transform.scaled((image.shape[1], image.shape[0]))
    whole = Image.fromarray(image).resize(size, Image.Resampling[transform.interpolation.upper()])
    left, top = round((size[0] - width) / 2), round((size[1] - height) / 2)
    crop = np.asarray(whole.crop((left, top, left + width, top + height)), np.float64)
    return ((crop / 255 - transform.mean) / transform.std).transpose(2, 0, 1)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_size_is_resized_as_pillow_does_it_whole(data: st.DataObject) -> None:
    side = st.integers(1, 130)
    transform = Transform(
        resolution=(data.draw(side), data.draw(side)),
        crop_pct=data.draw(st.sampled_from([0.5, 0.875, 0.96, 1.0])),
        interpolation=data.draw(st.sampled_from(["nearest", "bilinear", "bicubic", "lanczos"])),
        crop_mode=data.draw(st.sampled_from(["center", "squash"])),
    )
    image = pixels(data.draw(side), data.draw(side), 3, seed=data.draw(st.integers(0, 9)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(frames, "LARGE", data.draw(st.sampled_from([1, 10**9])))
        found = preprocess(image, transform)[0]
    frames._planned.cache_clear()
    np.testing.assert_allclose(found, by_hand(image, transform), atol=1e-6)  # a value more or less is 0.017
    np.testing.assert_array_equal(found, transform(Image.fromarray(image)))


@pytest.mark.parametrize("shape", [(72, 128), (40, 20), (64, 64)])
def test_a_border_is_that_of_files(shape: tuple[int, int]) -> None:
    transform, image = Transform(resolution=(64, 64), crop_pct=1.0, crop_mode="border"), pixels(*shape, 3)
    expected = transform(Image.fromarray(image))
    np.testing.assert_array_equal(preprocess(image, transform)[0], expected)
    np.testing.assert_array_equal(preprocess(image[..., ::-1], transform, color="bgr")[0], expected)


@pytest.mark.parametrize("shape", [(720, 1280), (480, 640), (1280, 720)])
def test_rows_of_a_large_frame_are_shared_among_threads(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    transform, image = Transform(), pixels(*shape, 3)
    np.testing.assert_array_equal(preprocess(image, transform)[0], transform.of_array(image))
    planned = frames._planned(shape, transform)
    assert len(planned) == {(720, 1280): 4, (480, 640): 4, (1280, 720): 3}[shape]
    read = sum((band.rows[1] - band.rows[0]) * (band.box[2] - band.box[0]) for band in planned)
    assert read < 0.85 * shape[0] * shape[1] or shape == (480, 640), "less than the whole frame is read"


def test_where_pillow_answers_otherwise_for_a_part_it_resizes_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:

    def shifted(*args: Any) -> Any:
        return tuple(replace(band, box=(0.0, *band.box[1:])) for band in bands(*args))

    image = pixels(90, 160, 3)
    monkeypatch.setattr(frames, "bands", shifted)
    np.testing.assert_array_equal(preprocess(image, TRANSFORM)[0], TRANSFORM.of_array(image))
    assert frames._planned((90, 160), TRANSFORM) == ()


def test_frames_of_every_kind(tmp_path: Path) -> None:
    image, wide = pixels(40, 50, 3), pixels(30, 90, 3, seed=1)
    path = tmp_path / "frame.png"
    Image.fromarray(image).save(path)
    expected = TRANSFORM(Image.fromarray(image))
    for frame in (image, Image.fromarray(image), path, str(path)):
        found = preprocess(frame, TRANSFORM)
        assert (str(found.dtype), found.shape) == ("float32", (1, 3, 24, 32))
        np.testing.assert_array_equal(found[0], expected)
    np.testing.assert_array_equal(preprocess(np.stack([image, image]), TRANSFORM), [expected] * 2)
    several = preprocess([wide, path, Image.fromarray(image)], TRANSFORM)
    np.testing.assert_array_equal(several, [TRANSFORM(Image.fromarray(wide)), expected, expected])
    (calibrated,) = ImageSource(tmp_path, TRANSFORM).subset(1)
    np.testing.assert_array_equal(calibrated.image, expected)


@pytest.mark.parametrize("order", ["rgb", "bgr"])
def test_bgr_is_the_order_of_arrays_alone(order: str, tmp_path: Path) -> None:
    transform, image = replace(TRANSFORM, channel_order=order), pixels(40, 50, 3)
    path = tmp_path / "frame.png"
    Image.fromarray(image).save(path)
    expected = transform(Image.fromarray(image))
    for frame in (image[..., ::-1], np.ascontiguousarray(image[..., ::-1]), Image.fromarray(image), path):
        np.testing.assert_array_equal(preprocess(frame, transform, color="bgr")[0], expected)
    grey = replace(TRANSFORM, mean=(0.5,), std=(0.5,))
    np.testing.assert_array_equal(preprocess(image[..., ::-1], grey, color="bgr")[0], grey(Image.fromarray(image)))


@pytest.mark.parametrize("alpha", ["drop", "white"])
def test_transparency_and_grey_are_taken_as_in_files(alpha: str) -> None:
    transform, image, grey = replace(TRANSFORM, alpha=alpha), pixels(40, 50, 4), pixels(40, 50)
    expected = transform(Image.fromarray(image))
    np.testing.assert_array_equal(preprocess(image, transform)[0], expected)
    np.testing.assert_array_equal(preprocess(image[..., [2, 1, 0, 3]], transform, color="bgr")[0], expected)
    for frame in (grey, grey[..., None]):
        np.testing.assert_array_equal(preprocess(frame, transform)[0], transform(Image.fromarray(grey)))


def test_networks_of_other_channels() -> None:
    transform, image = replace(TRANSFORM, mean=(0.5,) * 5, std=(0.2,) * 5), pixels(40, 50, 5)
    np.testing.assert_array_equal(preprocess(image, transform)[0], transform.of_array(image))


@pytest.mark.parametrize(
    ("frame", "words"),
    [
        (np.zeros((40, 50, 3), np.float32), r"Frame 0 is ndarray of float32 and shape \(40, 50, 3\); expected uint8"),
        ([pixels(4, 5, 3), 7], "Frame 1 is int of int64"),
        (pixels(0, 5, 3), "Frame 0 is ndarray of uint8"),
        (pixels(4, 5, 2), "Frame 0 has 2 channels; the network takes 3"),
        ([], "No frames"),
        (pixels(4, 5, 3)[None][:0], "No frames"),
        ("nowhere.png", r"^nowhere\.png cannot be read"),
    ],
)
def test_what_is_no_frame_is_refused(frame: Any, words: str) -> None:
    with pytest.raises(DataError, match=words):
        preprocess(frame, TRANSFORM)


def test_an_unknown_order_is_refused() -> None:
    with pytest.raises(OptionError, match="'yuv' is unknown"):
        preprocess(pixels(4, 5, 3), TRANSFORM, color="yuv")


def test_a_process_that_was_forked_has_threads_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frames, "LARGE", 1)
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    image = pixels(90, 160, 3)
    expected = preprocess(image, TRANSFORM)
    assert len(frames._planned((90, 160), TRANSFORM)) == 2
    forking = multiprocessing.get_context("fork")
    queue = forking.Queue()
    child = forking.Process(target=lambda: queue.put(preprocess(image, TRANSFORM)))
    child.start()
    np.testing.assert_array_equal(queue.get(timeout=30), expected)
    child.join()
