"""Pillow's resizing, of the part that a crop keeps. numpy and Pillow only.

Pillow can resize a box of an image, but takes its edges as float32: an edge that is rounded moves every weight of the
filter a little, and a few pixels by one. Here a box is made of edges that float32 holds exactly, and reaches as far
beyond the crop as that needs.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from itertools import pairwise
from math import ceil, floor
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    pass

SUPPORT = {"bilinear": 1, "bicubic": 2, "lanczos": 3}
"""Radius of Pillow's filters, in pixels of the smaller of the two images."""


@dataclass(frozen=True, kw_only=True)
class Band:
    """Rows of a crop, and what makes them.

    Attributes:
        rows: First and last of the rows of the image that are read, the last exclusive.
        box: What is resized: left, top, right and bottom in pixels, of the rows read.
        size: Width and height that this becomes.
        kept: Left, top, right and bottom of what is kept of it.
    """

    rows: tuple[int, int]
    box: tuple[float, float, float, float]
    size: tuple[int, int]
    kept: tuple[int, int, int, int]

    def of(self, pixels: npt.NDArray[np.uint8], interpolation: str) -> npt.NDArray[np.uint8]:
        """These rows of the crop, uint8 `(H, W)` or `(H, W, C)`.

        Args:
            pixels: The whole image, uint8 `(H, W)` or `(H, W, C)`.
            interpolation: As `bands` was told.
        """
        from PIL import Image

        image = Image.fromarray(pixels[self.rows[0] : self.rows[1]])
        if self.size != image.size or self.box != (0, 0, *image.size):
            image = image.resize(self.size, Image.Resampling[interpolation.upper()], box=self.box)
        return np.asarray(image.crop(self.kept))


@lru_cache(maxsize=256)
def bands(
    size: tuple[int, int],
    resized: tuple[int, int],
    crop: tuple[int, int, int, int],
    interpolation: str,
    count: int = 1,
) -> tuple[Band, ...]:
    """How an image is resized and cropped, without what the crop drops.

    Args:
        size: Width and height of the image.
        resized: Those that it is resized to.
        crop: Left, top, right and bottom of what is kept of that; it may reach beyond, where Pillow crops zeros.
        interpolation: `nearest`, `bilinear`, `bicubic` or `lanczos`.
        count: At most so many bands of rows, which can be made at the same time.

    Returns:
        The bands, from above; one below the other they are `image.resize(resized).crop(crop)`, to the bit.
    """
    left, top, right, bottom = crop
    inside = 0 <= left < right <= resized[0] and 0 <= top < bottom <= resized[1]
    if (
        interpolation not in SUPPORT or not inside
    ):  # `nearest` looks at places that rounding could move to another pixel
        return (Band(rows=(0, size[1]), box=(0, 0, *size), size=resized, kept=crop),)
    columns, exact = _span(size[0], resized[0], left, right), _exact(size[1], resized[1])
    shares = (top + (bottom - top) * index / count for index in range(1, count))
    inner = {min(exact, key=lambda at: abs(at - share)) for share in shares}  # else bands would overlap
    edges = [top, *sorted(at for at in inner if top < at < bottom), bottom]
    found = []
    for first, last in pairwise(edges):
        lines = _span(size[1], resized[1], first, last)
        box = [_edge(size[0], resized[0], at) for at in columns], [_edge(size[1], resized[1], at) for at in lines]
        reach = ceil(SUPPORT[interpolation] * max(size[1] / resized[1], 1.0)) + 1
        rows = max(0, floor(box[1][0]) - reach), min(size[1], ceil(box[1][1]) + reach)
        found.append(
            Band(
                rows=rows,
                box=(box[0][0], box[1][0] - rows[0], box[0][1], box[1][1] - rows[0]),
                size=(columns[1] - columns[0], lines[1] - lines[0]),
                kept=(left - columns[0], first - lines[0], right - columns[0], last - lines[0]),
            )
        )
    return tuple(found)


def _edge(length: int, resized: int, at: int) -> float:
    """Where the left edge of a pixel of the resized image lies in the image."""
    return float(Fraction(length, resized) * at)


def _span(length: int, resized: int, start: int, stop: int) -> tuple[int, int]:
    """The least span of pixels of the resized image around another one whose edges float32 holds exactly."""
    exact = _exact(length, resized)
    return max(at for at in exact if at <= start), min(at for at in exact if at >= stop)


def _exact(length: int, resized: int) -> list[int]:
    """The pixels of the resized image whose left edges float32 holds exactly, and its end."""
    ratio = Fraction(length, resized)
    return [at for at in range(resized + 1) if Fraction(float(np.float32(float(ratio * at)))) == ratio * at]
