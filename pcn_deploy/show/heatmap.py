"""Where the network looked: the attention map as a picture. numpy and Pillow."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pcn_deploy.data.transform import Transform
from pcn_deploy.errors import OptionError, OutputError

if TYPE_CHECKING:
    from PIL import Image

SHORT_SIDE = 448
"""Smaller images are enlarged to at least so many pixels, by a whole factor."""

# From little to much attention: dark violet, magenta, orange, pale yellow. Lightness rises throughout.
_COLOURS = np.array([[13, 8, 60], [110, 10, 120], [205, 60, 90], [250, 140, 40], [252, 250, 165]], np.float64)
_LEAST_OPAQUE, _MOST_OPAQUE = 0.15, 0.75
_COLOUR_KEPT = 0.3  # of the image, so that the colours of the map are told from its own
_ROUNDING = 1e-5  # of the largest weight: weights that differ by less are equal
FLAT = 1.0
"""A map is nearly flat, and drawn faintly, if its weights differ by less than so many times their mean (our choice)."""

_LIGHT_KEPT = 0.75  # of the image, so that what is white in it is not taken for much attention


@dataclass(frozen=True, kw_only=True)
class MapRange:
    """What the colours of a picture stand for.

    Attributes:
        class_index: The class that the map belongs to; None where one map serves all classes.
        smallest: Smallest weight of a position, 0 to 1.
        largest: Largest weight of a position.
        uniform: What each weight would be if all N positions had the same: 1 / N.
        nearly_flat: Whether the weights differ by less than `FLAT` times their mean.
    """

    class_index: int | None
    smallest: float
    largest: float
    uniform: float
    nearly_flat: bool


def choose_map(
    maps: npt.NDArray[np.floating[Any]], top: int, wanted: int | None
) -> tuple[npt.NDArray[np.floating[Any]], MapRange]:
    """The map to draw of one image, and its range.

    Args:
        maps: Attention maps, `(T, H, W)`: one, or one for each class.
        top: The most likely class.
        wanted: The class whose map is asked for; None for the most likely one.

    Raises:
        OptionError: If a class is asked for that has no map of its own.
    """
    count = len(maps)
    if wanted is not None and count == 1:
        msg = (
            "The network has one attention map for all classes (one class token), so a class cannot be chosen. "
            "Leave --class out."
        )
        raise OptionError(msg)
    if wanted is not None and not 0 <= wanted < count:
        msg = f"Class {wanted} has no map: the network has {count} classes. Give --class 0 to {count - 1}."
        raise OptionError(msg)
    index = None if count == 1 else top if wanted is None else wanted
    chosen = maps[index or 0]
    return chosen, MapRange(
        class_index=index,
        smallest=float(chosen.min()),
        largest=float(chosen.max()),
        uniform=1 / chosen.size,
        nearly_flat=_contrast(chosen) < 1,
    )


def _contrast(attention: npt.NDArray[np.floating[Any]]) -> float:
    """How far the weights differ, in units of what is nearly flat; 0 where they differ by rounding only."""
    spread = float(np.ptp(attention))
    return 0.0 if spread <= _ROUNDING * float(attention.max()) else spread / (FLAT * float(attention.mean()))


def picture_paths(where: Path, images: Sequence[Path], *, overwrite: bool) -> list[Path]:
    """Where the picture of each image goes.

    Args:
        where: A file name for one image; else a folder, with one PNG per image in it.
        images: The images.
        overwrite: Whether existing pictures may be replaced.

    Raises:
        OptionError: If one file is named for several images, or of a type that cannot be written, or a picture would
            take the place of an image.
        OutputError: If a picture exists and may not be replaced, or could not be written.
    """
    if where.suffix and not where.is_dir():
        if len(images) > 1:
            msg = f"{where} is one file for {len(images)} images. Name a folder: --heatmap {where.with_suffix('')}"
            raise OptionError(msg)
        if where.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
            msg = f"{where}: a picture is written as .png, .jpg or .webp. If a folder is meant, make it first."
            raise OptionError(msg)
        paths = [where]
    else:
        names = [f"{image.stem}.png" for image in images]
        repeated = len(set(names)) < len(names)
        paths = [where / (f"{index:03d}_{name}" if repeated else name) for index, name in enumerate(names)]
    there = next(folder for folder in (where if paths != [where] else where.parent, *where.parents) if folder.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        msg = f"{there} is no folder that can be written to. Give another name with --heatmap."
        raise OutputError(msg)
    taken = {image.resolve() for image in images}
    for path in paths:
        if path.resolve() in taken:
            msg = f"The picture {path} would take the place of the image itself. Give another name with --heatmap."
            raise OptionError(msg)
        if path.exists() and not overwrite:
            msg = f"{path} exists. Give --overwrite to replace it, or another name with --heatmap."
            raise OutputError(msg)
    return paths


def save(picture: Image.Image, path: Path) -> None:
    """Write a picture; its folder is made if it is not there.

    Raises:
        OutputError: If it cannot be written, or its folder cannot be made.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        msg = f"The folder {path.parent} cannot be made: {error.strerror}. Give another with --heatmap."
        raise OutputError(msg) from error
    try:
        picture.save(path)
    except OSError as error:
        msg = f"{path} cannot be written: {error.strerror or error}. Give another name with --heatmap."
        raise OutputError(msg) from error


def overlay(
    image: npt.NDArray[np.float32], attention: npt.NDArray[np.floating[Any]], transform: Transform
) -> Image.Image:
    """Lay an attention map over the image the network saw.

    Args:
        image: A transformed image, float32 `(C, H, W)` of 1 or 3 channels.
        attention: Weight of each position, `(H', W')`; drawn relative to its own smallest and largest, and the more
            faintly the less they differ where the map is nearly flat.
        transform: The transform of the image, undone for the picture.

    Returns:
        The picture, RGB, of the shape of the image times a whole number.
    """
    from PIL import Image

    mean, std = (np.array(values, np.float64)[:, None, None] for values in (transform.mean, transform.std))
    unit = (image * std + mean).clip(0, 1)
    ordered = unit[::-1] if transform.channel_order == "bgr" else unit
    seen = np.broadcast_to(ordered, (3, *image.shape[1:])).transpose(1, 2, 0)
    height, width = image.shape[1:]
    factor = max(1, -(-SHORT_SIDE // min(height, width)))
    size = (width * factor, height * factor)
    picture = Image.fromarray(np.rint(255 * seen).astype(np.uint8)).resize(size, Image.Resampling.BICUBIC)
    faded = Image.blend(picture.convert("L").convert("RGB"), picture, _COLOUR_KEPT)
    base = _LIGHT_KEPT * np.asarray(faded, np.float64)
    contrast = _contrast(attention)
    relative = min(1.0, contrast) * (attention - attention.min()) / (float(np.ptp(attention)) if contrast else 1.0)
    smooth = Image.fromarray(relative.astype(np.float32)).resize(size, Image.Resampling.BICUBIC)
    strength = np.asarray(smooth, np.float64).clip(0, 1)[..., None]
    stops = np.linspace(0, 1, len(_COLOURS))
    colours = np.stack([np.interp(strength[..., 0], stops, channel) for channel in _COLOURS.T], axis=-1)
    opacity = _LEAST_OPAQUE + (_MOST_OPAQUE - _LEAST_OPAQUE) * strength
    blended = (1 - opacity) * base + opacity * colours
    return Image.fromarray(np.rint(blended).astype(np.uint8))
