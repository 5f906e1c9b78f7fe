"""Frames of a camera: from pixels in memory to what the network takes, fast. numpy and Pillow only."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from pcn_deploy.aliases import Images
from pcn_deploy.data.image_files import read_image
from pcn_deploy.data.pixels import CHANNEL_ORDERS
from pcn_deploy.data.resize import Band, bands
from pcn_deploy.data.transform import Transform
from pcn_deploy.errors import DataError, OptionError

if TYPE_CHECKING:
    from PIL import Image

Pixels: TypeAlias = npt.NDArray[np.uint8]
Frame: TypeAlias = "Pixels | Image.Image | str | Path"
Frames: TypeAlias = "Frame | Sequence[Frame]"

LARGE = 200_000
"""Pixels of a frame from which its rows are shared among threads: below, handing them over takes longer."""

MOST_THREADS = 4


def preprocess(frames: Frames, transform: Transform, *, color: str = "rgb") -> Images:
    """Transform frames, each as `transform` does, to the bit.

    Args:
        frames: One frame or several: uint8 arrays `(H, W, 3)` or `(N, H, W, 3)`, of any size; with other channels where
            the network takes them, `(H, W, 4)` with transparency, `(H, W)` grey. Pictures of Pillow, and files.
        transform: What each goes through.
        color: Order of the channels of arrays: `rgb`, or `bgr` as OpenCV has them. Pictures and files know theirs.

    Returns:
        float32 `(N, C, H, W)`.

    Raises:
        OptionError: If the order of the channels is unknown.
        DataError: If there is no frame, or one is no image or not of 8 bits.
        DependencyError: If Pillow is missing.
    """
    if color not in CHANNEL_ORDERS:
        msg = f"Color {color!r} is unknown; it is one of {', '.join(CHANNEL_ORDERS)}."
        raise OptionError(msg)
    several = isinstance(frames, list | tuple) or (isinstance(frames, np.ndarray) and frames.ndim == 4)
    one_by_one: Sequence[Any] = frames if several else [frames]  # type: ignore[assignment]
    if len(one_by_one) == 0:
        msg = "No frames were given."
        raise DataError(msg)
    out = np.empty((len(one_by_one), *transform.shape), np.float32)
    for index, frame in enumerate(one_by_one):
        try:
            _transform(frame, transform, color, out[index])
        except DataError as error:
            msg = str(error) if isinstance(frame, str | Path) else f"Frame {index} {error}"
            raise DataError(msg) from error
    return out


def _transform(frame: Any, transform: Transform, color: str, out: npt.NDArray[np.float32]) -> None:
    """One frame, written to `out`, `(C, H, W)`."""
    if isinstance(frame, str | Path):
        out[:] = read_image(Path(frame), transform)
        return
    if hasattr(frame, "getexif"):  # a picture of Pillow
        out[:] = transform(frame)
        return
    pixels = _pixels(frame)
    planned = _planned(pixels.shape[:2], transform) if pixels.shape[2] == len(transform.mean) == 3 else ()
    if not planned:
        if color == "bgr" and pixels.shape[2] in (3, 4):
            pixels = np.ascontiguousarray(pixels[..., [2, 1, 0, 3][: pixels.shape[2]]])
        out[:] = transform.of_array(pixels)
        return
    swapped = (color == "bgr") != (transform.channel_order == "bgr")
    write = partial(_write, pixels, transform, _table(transform), swapped, out)
    if len(planned) == 1:
        write(planned[0], 0)
        return
    starts = np.cumsum([0, *(band.kept[3] - band.kept[1] for band in planned)]).tolist()
    list(_threads().map(write, planned, starts))


def _pixels(frame: Any) -> Pixels:
    """The frame as uint8 `(H, W, C)`."""
    pixels = np.asarray(frame)
    if pixels.dtype != np.uint8 or pixels.ndim not in (2, 3) or 0 in pixels.shape:
        msg = (
            f"is {type(frame).__name__} of {pixels.dtype} and shape {pixels.shape}; expected uint8 (H, W, C), a "
            "picture of Pillow or the path of a file. What is transformed already needs no preprocessing."
        )
        raise DataError(msg)
    return pixels[..., None] if pixels.ndim == 2 else pixels


def _write(
    pixels: Pixels,
    transform: Transform,
    table: npt.NDArray[np.float32],
    swapped: bool,
    out: npt.NDArray[np.float32],
    band: Band,
    start: int,
) -> None:
    """Resize, crop and normalise a band of rows."""
    rows = band.of(pixels, transform.interpolation)
    for channel, values in enumerate(table):
        plane = rows[..., 2 - channel if swapped else channel]
        np.take(values, plane, out=out[channel, start : start + len(rows)], mode="clip")


@lru_cache(maxsize=64)
def _table(transform: Transform) -> npt.NDArray[np.float32]:
    """What each of the 256 values becomes, for each channel, `(C, 256)`."""
    levels = np.repeat(np.arange(256, dtype=np.uint8)[None, :, None], len(transform.mean), axis=2)
    return transform.normalise(levels)[:, 0]


@lru_cache(maxsize=64)
def _planned(shape: tuple[int, int], transform: Transform) -> tuple[Band, ...]:
    """How frames of a height and width are resized and cropped at once; empty where Pillow itself must do it.

    Pillow chooses by the size which direction it resizes first, and it may choose otherwise for a part: noise shows it.
    """
    if transform.crop_mode == "border":  # what is beside the image is no part of it
        return ()
    size = shape[1], shape[0]
    resized = transform.scaled(size)
    count = min(MOST_THREADS, os.cpu_count() or 1) if size[0] * size[1] >= LARGE else 1
    noise = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    expected = transform.of_array(noise)
    for some in sorted({count, 1}, reverse=True):
        planned = bands(size, resized, transform.centre(resized), transform.interpolation, some)
        made = [band.of(noise, transform.interpolation) for band in planned]
        if np.array_equal(transform.normalise(np.concatenate(made)), expected):
            return planned
    return ()


@cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max_workers=MOST_THREADS, thread_name_prefix="pcn-deploy-frames")


os.register_at_fork(after_in_child=_threads.cache_clear)  # the threads stay with the parent
