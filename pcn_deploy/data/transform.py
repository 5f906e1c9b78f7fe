"""The evaluation transform: what an image goes through before the network sees it. numpy and Pillow only."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pcn_deploy.data.pixels import ALPHAS, CHANNEL_ORDERS, EXIFS, to_pixels
from pcn_deploy.errors import DataError, OptionError

if TYPE_CHECKING:
    from PIL import Image

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos")
CROP_MODES = ("center", "squash", "border")

_BEYOND_WHITE = 2.0
"""A mean above this is of images whose white is 255, not 1."""

FAR = 10.0
"""Floats so many times beyond black and white were not normalised (0 to 255 is 96 times with ImageNet's statistics)."""

_ALWAYS = ("resolution", "crop_pct", "mean", "std", "interpolation")
"""What every bundle says of its transform."""


@dataclass(frozen=True, kw_only=True)
class Transform:
    """Make pixels of 8 bits, resize, centre crop, scale to [0, 1], order the channels, normalise.

    Attributes:
        resolution: Height and width of the crop, in pixels.
        crop_pct: Share of the resized image that the crop keeps, in (0, 1].
        mean: Mean per channel, of images in [0, 1], in the order of the network's channels; as many as it takes.
        std: Standard deviation per channel, above 0.
        interpolation: One of `INTERPOLATIONS`; Pillow's, with antialiasing.
        crop_mode: `center` resizes so that the image covers the crop, `squash` to the very height and width, without
            regard to its proportions, `border` so that all of the image is in it, on the mean colour (timm's names).
        channel_order: `bgr` for networks trained on what OpenCV reads.
        alpha: What becomes of transparency: `drop` as torchvision does, or laid over `white` or `black`.
        exif: Whether an EXIF orientation is applied; `ignore` is what torchvision and timm do.
        white: Which value is white in images of more than 8 bits; by default 65535 for 16 bits, none for others.

    Raises:
        OptionError: If a value is out of its range.

    Source of the defaults: facebookresearch/deit, `main.py --eval-crop-ratio` and `datasets.py` (0.875, bicubic,
    ImageNet statistics).
    """

    resolution: tuple[int, int] = (224, 224)
    crop_pct: float = 0.875
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    interpolation: str = "bicubic"
    crop_mode: str = "center"
    channel_order: str = "rgb"
    alpha: str = "drop"
    exif: str = "ignore"
    white: float | None = None

    def __post_init__(self) -> None:
        problems = [
            (min(self.resolution) < 1, f"resolution {self.resolution} has a side below 1 pixel"),
            (not 0 < self.crop_pct <= 1, f"crop_pct {self.crop_pct} is not in (0, 1]"),
            (
                len(self.mean) != len(self.std),
                f"{len(self.mean)} means but {len(self.std)} standard deviations",
            ),
            (not self.mean, "no channels"),
            (not all(math.isfinite(value) for value in self.mean), f"mean {self.mean} is not finite"),
            (
                max(self.mean, default=0) > _BEYOND_WHITE,
                f"mean {self.mean} is of values from 0 to 255; here they are from 0 to 1: divide mean and std by 255",
            ),
            (not all(0 < value < math.inf for value in self.std), f"standard deviation {self.std} is not above 0"),
            (self.interpolation not in INTERPOLATIONS, f"interpolation {self.interpolation!r} is unknown"),
            (self.crop_mode not in CROP_MODES, f"crop mode {self.crop_mode!r} is unknown"),
            (self.channel_order not in CHANNEL_ORDERS, f"channel order {self.channel_order!r} is unknown"),
            (self.channel_order == "bgr" and len(self.mean) != 3, f"{len(self.mean)} channels have no order bgr"),
            (self.alpha not in ALPHAS, f"alpha {self.alpha!r} is unknown"),
            (self.exif not in EXIFS, f"exif {self.exif!r} is unknown"),
            (self.white is not None and not 0 < self.white < math.inf, f"white {self.white} is not above 0"),
        ]
        faults = "; ".join(text for wrong, text in problems if wrong)
        if faults:
            msg = f"The image transform is not possible: {faults}."
            raise OptionError(msg)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Transform:
        """Inverse of `to_json`; what an older bundle does not say was as by default."""
        known = {one.name: data[one.name] for one in fields(cls) if one.name in data or one.name in _ALWAYS}
        height, width = known["resolution"]
        return cls(**{**known, "resolution": (height, width), "mean": tuple(known["mean"]), "std": tuple(known["std"])})

    def to_json(self) -> dict[str, Any]:
        """Plain values, as the manifest holds them."""
        return asdict(self)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of one transformed image, `(C, H, W)`."""
        return (len(self.mean), *self.resolution)

    @property
    def range(self) -> tuple[float, float]:
        """Least and largest value that black and white become, over all channels."""
        mean, std = np.array(self.mean), np.array(self.std)
        return float((-mean / std).min()), float(((1 - mean) / std).max())

    def scaled(self, size: tuple[int, int]) -> tuple[int, int]:
        """Width and height that an image of a width and height is resized to, before the crop."""
        height, width = self.resolution
        wanted = (int(width / self.crop_pct), int(height / self.crop_pct))
        if self.crop_mode == "squash":
            return wanted
        if self.crop_mode == "border":
            ratio = max(size[0] / wanted[0], size[1] / wanted[1])
            return max(1, round(size[0] / ratio)), max(1, round(size[1] / ratio))
        if wanted[1] * size[0] >= wanted[0] * size[1]:
            return max(width, int(wanted[1] * size[0] / size[1])), wanted[1]
        return wanted[0], max(height, int(wanted[0] * size[1] / size[0]))

    def __call__(self, image: Image.Image) -> npt.NDArray[np.float32]:
        """Transform one image.

        Args:
            image: Any size and mode; grey images are repeated over three channels.

        Returns:
            float32 `(C, H, W)`.

        Raises:
            DataError: If nothing says how bright the image is, or the network takes other channels than images have.
        """
        return self.normalise(self._cropped(to_pixels(image, self), self._colour))

    def of_array(self, pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """Transform pixels `(H, W, C)`; C is what the network takes, but grey, RGB and RGBA become what it takes.

        Returns:
            float32 `(C, H, W)`.

        Raises:
            DataError: If the network takes another number of channels.
        """
        from PIL import Image

        channels = pixels.shape[2]
        if channels in (1, 3, 4) and len(self.mean) in (1, 3):
            return self(Image.fromarray(pixels[..., 0] if channels == 1 else pixels))
        if channels != len(self.mean):
            msg = f"has {channels} channels; the network takes {len(self.mean)}. Give a mean and std for each channel."
            raise DataError(msg)
        planes = [
            self._cropped(Image.fromarray(np.ascontiguousarray(pixels[..., one])), (self.mean[one],))
            for one in range(channels)
        ]
        return self.normalise(np.concatenate(planes, axis=2))

    @property
    def _colour(self) -> tuple[float, ...]:
        """The mean in the order of the channels of image files."""
        return self.mean[::-1] if self.channel_order == "bgr" else self.mean

    def _cropped(self, image: Image.Image, colour: tuple[float, ...]) -> npt.NDArray[np.uint8]:
        """Resize and crop, laid over a colour in [0, 1] where the image is smaller; uint8 `(H, W, C)`."""
        from PIL import Image

        height, width = self.resolution
        size = self.scaled(image.size)
        if size != image.size:
            image = image.resize(size, Image.Resampling[self.interpolation.upper()])
        if size[0] < width or size[1] < height:
            image = self._padded(image, colour)
            size = image.size
        return np.asarray(image.crop(self.centre(size))).reshape(height, width, -1)

    def centre(self, size: tuple[int, int]) -> tuple[int, int, int, int]:
        """Left, top, right and bottom of the crop, of an image that was resized to a width and height."""
        height, width = self.resolution
        left, top = round((size[0] - width) / 2), round((size[1] - height) / 2)
        return left, top, left + width, top + height

    def _padded(self, image: Image.Image, colour: tuple[float, ...]) -> Image.Image:
        """An image as large as the crop where it was smaller, in the middle of a colour in [0, 1]."""
        from PIL import Image

        (height, width), (wide, high) = self.resolution, image.size
        size = max(width, wide), max(height, high)
        fill = tuple(round(255 * value) for value in colour)
        whole = Image.new(image.mode, size, fill if len(fill) > 1 else fill[0])
        whole.paste(image, ((size[0] - wide) // 2, (size[1] - high) // 2))
        return whole

    def normalise(self, pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """Order the channels, scale to [0, 1], take off their mean and divide by their standard deviation.

        Args:
            pixels: RGB or grey, `(H, W, C)`, uint8.

        Returns:
            float32 `(C, H, W)`.
        """
        ordered = pixels[..., ::-1] if self.channel_order == "bgr" else pixels
        unit = ordered.astype(np.float32) / np.float32(255)
        normal = np.subtract(unit, np.array(self.mean, np.float32)) / np.array(self.std, np.float32)
        return np.ascontiguousarray(normal.transpose(2, 0, 1), dtype=np.float32)


def drawn_images(count: int, transform: Transform, seed: int) -> npt.NDArray[np.float32]:
    """Smooth coloured spots, as the transform gives them: what is like a photograph where there is none.

    Args:
        count: Number of images.
        transform: Its channels, resolution and statistics.
        seed: Of the spots.

    Returns:
        float32 `(count, C, H, W)`.
    """
    generator = np.random.default_rng(seed)
    channels, height, width = transform.shape
    spots = generator.random((count, channels, 8, 8))
    rows, columns = (_enlargement(size, spots.shape[-1]) for size in (height, width))
    unit = rows @ spots @ columns.T
    mean, std = (np.reshape(values, (channels, 1, 1)) for values in (transform.mean, transform.std))
    return np.asarray((unit - mean) / std, np.float32)


def _enlargement(size: int, grid: int) -> npt.NDArray[np.float64]:
    """Weights of linear interpolation from `grid` points to `size` pixels, `(size, grid)`."""
    at = np.linspace(0, grid - 1, size)
    return np.asarray(np.maximum(0, 1 - np.abs(at[:, None] - np.arange(grid))))
