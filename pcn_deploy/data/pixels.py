"""From an image of any kind that Pillow opens to the 8-bit pixels that networks are trained on. numpy and Pillow only.

What torchvision's loader does, `image.convert("RGB")`, is done here too, with two exceptions where that is silently
wrong: values of more than 8 bits are scaled by what is white instead of being cut off, and where nothing says what is
white the image is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from pcn_deploy.errors import DataError

if TYPE_CHECKING:
    from PIL import Image

CHANNEL_ORDERS = ("rgb", "bgr")
ALPHAS = ("drop", "white", "black")
EXIFS = ("ignore", "apply")

_ORIENTATION = 0x0112
"""Tag of EXIF: 1 is upright, 2 to 8 are turned or mirrored (JEITA CP-3451)."""

_SIXTEEN_BITS = 65535


class PixelRules(Protocol):
    """What a `Transform` says of the pixels of a file."""

    @property
    def mean(self) -> tuple[float, ...]:
        """As many values as the network takes channels."""

    @property
    def exif(self) -> str:
        """One of `EXIFS`."""

    @property
    def alpha(self) -> str:
        """One of `ALPHAS`."""

    @property
    def white(self) -> float | None:
        """Which value is white in images of more than 8 bits."""


@dataclass(frozen=True)
class Kind:
    """A kind of image about which there is a choice, or a loss: whether one is of it, and what is done."""

    holds: Callable[[Image.Image, PixelRules], bool]
    words: str


def is_turned(image: Image.Image) -> bool:
    """Whether EXIF says that the image is to be turned or mirrored."""
    if image.format == "PNG" and "exif" not in image.info:
        return False  # Pillow would decode the whole image to look for it at the end
    return image.getexif().get(_ORIENTATION, 1) not in (0, 1)


def has_alpha(image: Image.Image) -> bool:
    """Whether some pixels may be transparent."""
    return image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info


KINDS = {
    "turned": Kind(
        lambda image, transform: transform.exif == "ignore" and is_turned(image),
        "carry an EXIF orientation, which is ignored as torchvision and timm do; a build with --exif apply turns them, "
        "as OpenCV does.",
    ),
    "transparent": Kind(
        lambda image, transform: transform.alpha == "drop" and has_alpha(image),
        "have an alpha channel, which is dropped as torchvision does, so that the colour under transparent pixels is "
        "seen; a build with --alpha white or black lays them over that colour.",
    ),
    "cmyk": Kind(
        lambda image, _: image.mode == "CMYK",
        "are CMYK and become RGB by Pillow's formula, without a colour profile, as in torchvision.",
    ),
    "deep": Kind(
        lambda image, transform: _has_16_bits(image) and transform.white is None,
        f"have 16 bits and become 8, {_SIXTEEN_BITS} being white; a build with --white VALUE says otherwise (4095 for "
        "12 bits).",
    ),
}


def _has_16_bits(image: Image.Image) -> bool:
    """Whether the file itself says so; Pillow opens those of PNG and PGM as 32 bits, which has no white of its own."""
    return image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))


def to_pixels(image: Image.Image, transform: PixelRules) -> Image.Image:
    """Grey or RGB of 8 bits, as many channels as the network takes.

    Raises:
        DataError: If nothing says what is white, values are out of range, or the network takes other channels than an
            image file has.
    """
    from PIL import Image, ImageOps

    channels = len(transform.mean)
    if channels not in (1, 3):
        msg = f"is an image file; the network takes {channels} channels. Give arrays: an .npz with 'images'."
        raise DataError(msg)
    if transform.exif == "apply":
        image = ImageOps.exif_transpose(image)
    if image.mode == "F" or image.mode.startswith("I"):  # more than 8 bits
        image = _to_8_bits(image, transform.white)
    if transform.alpha != "drop" and has_alpha(image):
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, transform.alpha), image)
    return image.convert("RGB" if channels == 3 else "L")


def _to_8_bits(image: Image.Image, white: float | None) -> Image.Image:
    """Scale values so that `white` becomes 255, to the nearest."""
    from PIL import Image

    values: Any = np.asarray(image).astype(np.float64)
    low, high = float(values.min()), float(values.max())
    kind = "floats" if image.mode == "F" else "whole numbers"
    strange = int((~np.isfinite(values)).sum())
    if strange:
        msg = f"holds NaN or infinity in {strange} of {values.size} pixels."
        raise DataError(msg)
    if white is None and not _has_16_bits(image):
        msg = (
            f"holds {kind} from {low:g} to {high:g}, and nothing says which value is white. Build with --white VALUE: "
            "1, 255, 65535 or whatever the network was trained with."
        )
        raise DataError(msg)
    if white is None and 0 < high < _SIXTEEN_BITS / 255:
        msg = f"has 16 bits but no value above {high:g}, so it would be black. Build with --white VALUE, such as 255."
        raise DataError(msg)
    white = white or _SIXTEEN_BITS
    if not (low >= 0 and high <= white):
        msg = (
            f"holds {kind} from {low:g} to {high:g}; expected 0 to --white {white:g}. "
            "Build with the value that is white."
        )
        raise DataError(msg)
    return Image.fromarray((values * (255 / white)).round().astype(np.uint8))
