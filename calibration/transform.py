"""The evaluation transform: what an image goes through before the network sees it. numpy and Pillow only."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pcn_deploy.errors import OptionError

if TYPE_CHECKING:
    from PIL import Image

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos")


@dataclass(frozen=True, kw_only=True)
class Transform:
    """Resize so that the image covers the crop, centre crop, scale to [0, 1], normalise.

    Attributes:
        resolution: Height and width of the crop, in pixels.
        crop_pct: Share of the resized image that the crop keeps, in (0, 1].
        mean: Mean per channel, of images in [0, 1].
        std: Standard deviation per channel, above 0.
        interpolation: One of `INTERPOLATIONS`; Pillow's, with antialiasing.

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

    def __post_init__(self) -> None:
        problems = [
            (min(self.resolution) < 1, f"resolution {self.resolution} has a side below 1 pixel"),
            (not 0 < self.crop_pct <= 1, f"crop_pct {self.crop_pct} is not in (0, 1]"),
            (
                len(self.mean) != len(self.std),
                f"{len(self.mean)} means but {len(self.std)} standard deviations",
            ),
            (len(self.mean) not in (1, 3), f"{len(self.mean)} channels; images have 1 or 3"),
            (not all(math.isfinite(value) for value in self.mean), f"mean {self.mean} is not finite"),
            (not all(0 < value < math.inf for value in self.std), f"standard deviation {self.std} is not above 0"),
            (self.interpolation not in INTERPOLATIONS, f"interpolation {self.interpolation!r} is unknown"),
        ]
        found = "; ".join(text for wrong, text in problems if wrong)
        if found:
            msg = f"The image transform is not possible: {found}."
            raise OptionError(msg)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Transform:
        """Inverse of `to_json`."""
        return cls(
            resolution=(data["resolution"][0], data["resolution"][1]),
            crop_pct=data["crop_pct"],
            mean=tuple(data["mean"]),
            std=tuple(data["std"]),
            interpolation=data["interpolation"],
        )

    def to_json(self) -> dict[str, Any]:
        """Plain values, as the manifest holds them."""
        return asdict(self)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of one transformed image, `(C, H, W)`."""
        return (len(self.mean), *self.resolution)

    def __call__(self, image: Image.Image) -> npt.NDArray[np.float32]:
        """Transform one image.

        Args:
            image: Any size and mode; grey images are repeated over three channels, transparency is dropped, 16 bits
                become 8, and an EXIF orientation is ignored, as torchvision does.

        Returns:
            float32 `(C, H, W)`.
        """
        from PIL import Image

        if image.mode.startswith("I"):  # 16 bits per pixel: Pillow's own conversion would cut off, not scale
            image = Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
        image = image.convert("RGB" if len(self.mean) == 3 else "L")
        height, width = self.resolution
        wanted = (int(height / self.crop_pct), int(width / self.crop_pct))
        if wanted[0] * image.width >= wanted[1] * image.height:
            size = (max(width, int(wanted[0] * image.width / image.height)), wanted[0])
        else:
            size = (wanted[1], max(height, int(wanted[1] * image.height / image.width)))
        if size != image.size:
            image = image.resize(size, Image.Resampling[self.interpolation.upper()])
        left, top = round((size[0] - width) / 2), round((size[1] - height) / 2)
        crop = image.crop((left, top, left + width, top + height))
        unit = np.asarray(crop, np.float32).reshape(height, width, -1) / np.float32(255)
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
