"""Where the network looked: the attention map as a picture. numpy and Pillow."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pcn_deploy.calibration.transform import Transform
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
_LIGHT_KEPT = 0.75  # of the image, so that what is white in it is not taken for much attention


def picture_paths(where: Path, images: Sequence[Path], *, overwrite: bool) -> list[Path]:
    """Where the picture of each image goes.

    Args:
        where: A file name for one image; else a folder, with one PNG per image in it.
        images: The images.
        overwrite: Whether existing pictures may be replaced.

    Raises:
        OptionError: If one file is named for several images, or of a type that cannot be written, or a picture would
            take the place of an image.
        OutputError: If a picture exists and may not be replaced.
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
        attention: Weight of each position, `(H', W')`; drawn relative to its own smallest and largest.
        transform: The transform of the image, undone for the picture.

    Returns:
        The picture, RGB, of the shape of the image times a whole number.
    """
    from PIL import Image

    mean, std = (np.array(values, np.float64)[:, None, None] for values in (transform.mean, transform.std))
    seen = np.broadcast_to((image * std + mean).clip(0, 1), (3, *image.shape[1:])).transpose(1, 2, 0)
    height, width = image.shape[1:]
    factor = max(1, -(-SHORT_SIDE // min(height, width)))
    size = (width * factor, height * factor)
    picture = Image.fromarray(np.rint(255 * seen).astype(np.uint8)).resize(size, Image.Resampling.BICUBIC)
    faded = Image.blend(picture.convert("L").convert("RGB"), picture, _COLOUR_KEPT)
    base = _LIGHT_KEPT * np.asarray(faded, np.float64)
    spread = float(np.ptp(attention))
    equal = spread <= _ROUNDING * float(attention.max())
    relative = np.zeros_like(attention) if equal else (attention - attention.min()) / spread
    smooth = Image.fromarray(relative.astype(np.float32)).resize(size, Image.Resampling.BICUBIC)
    strength = np.asarray(smooth, np.float64).clip(0, 1)[..., None]
    stops = np.linspace(0, 1, len(_COLOURS))
    colours = np.stack([np.interp(strength[..., 0], stops, channel) for channel in _COLOURS.T], axis=-1)
    opacity = _LEAST_OPAQUE + (_MOST_OPAQUE - _LEAST_OPAQUE) * strength
    blended = (1 - opacity) * base + opacity * colours
    return Image.fromarray(np.rint(blended).astype(np.uint8))
