"""Drawn images, harder than digits: sixteen shapes on cluttered backgrounds, 64x64 pixels, in colour.

Every image is drawn from its split and its index alone, and no file is downloaded; versions of Pillow differ in a few
pixels of some images. The shape of the class is the largest of the picture; smaller shapes of other classes, stripes,
an opaque bar, noise, blur and little contrast stand in the way.

    python examples/shapes/data.py --split test --output out/shapes-test.npz
    python examples/shapes/data.py --split calibration --output out/shapes-calibration   # a folder of PNGs
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFilter

from pcn_deploy import Transform

SIDE = 64
FINE = 3
"""Shapes are drawn so many times larger and reduced: smooth edges."""
MAX_TURN = 0.7
"""Largest turn of a shape, in radians."""
SPLITS = {"train": 24_000, "calibration": 512, "test": 6_000}
TRANSFORM = Transform(resolution=(SIDE, SIDE), crop_pct=1.0, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))

Points = list[tuple[float, float]]


def _regular(corners: int, inner: float = 1.0) -> Points:
    """A regular polygon; with `inner` below 1, a star of as many points."""
    steps = corners if inner == 1.0 else 2 * corners
    radii = [inner if inner < 1.0 and step % 2 else 1.0 for step in range(steps)]
    turns = [2 * math.pi * step / steps for step in range(steps)]
    return [(radius * math.cos(turn), radius * math.sin(turn)) for radius, turn in zip(radii, turns, strict=True)]


def _arc(start: float, end: float, radius: Callable[[float], float], steps: int = 40) -> Points:
    turns = [start + (end - start) * step / steps for step in range(steps + 1)]
    return [(radius(turn) * math.cos(turn), radius(turn) * math.sin(turn)) for turn in turns]


def _crescent() -> Points:
    outer = _arc(0.35 * math.pi, 1.65 * math.pi, lambda _: 1.0)
    inner = [(0.45 + 0.85 * x, 0.95 * y) for x, y in reversed(outer)]
    return outer + inner


def _stroke(points: Points, width: float) -> Points:
    """The outline of a line of some width."""
    left, right = [], []
    for index, (x, y) in enumerate(points):
        before, after = points[max(index - 1, 0)], points[min(index + 1, len(points) - 1)]
        dx, dy = after[0] - before[0], after[1] - before[1]
        length = math.hypot(dx, dy) or 1.0
        across = (-dy / length * width / 2, dx / length * width / 2)
        left.append((x + across[0], y + across[1]))
        right.append((x - across[0], y - across[1]))
    return left + right[::-1]


OUTLINES: dict[str, Points] = {
    "triangle": _regular(3),
    "square": _regular(4),
    "pentagon": _regular(5),
    "hexagon": _regular(6),
    "octagon": _regular(8),
    "circle": _regular(48),
    "star-4": _regular(4, 0.42),
    "star-5": _regular(5, 0.45),
    "star-6": _regular(6, 0.52),
    "crescent": _crescent(),
    "arrow": [(1, 0), (0.1, 0.8), (0.1, 0.3), (-0.9, 0.3), (-0.9, -0.3), (0.1, -0.3), (0.1, -0.8)],
    "chevron": [(1, 0), (0.0, 0.9), (-0.7, 0.9), (0.3, 0), (-0.7, -0.9), (0.0, -0.9)],
    "ell": [(-0.7, -1), (-0.1, -1), (-0.1, 0.45), (0.8, 0.45), (0.8, 1), (-0.7, 1)],
    "tee": [
        *[(-0.9, -0.9), (0.9, -0.9), (0.9, -0.35), (0.28, -0.35)],
        *[(0.28, 0.9), (-0.28, 0.9), (-0.28, -0.35), (-0.9, -0.35)],
    ],
    "spiral": _stroke(_arc(0, 3.6 * math.pi, lambda turn: 0.12 + 0.078 * turn, 90), 0.2),
    "wave": _stroke([(x / 20 - 1, 0.55 * math.sin(math.pi * x / 20 * 2)) for x in range(41)], 0.34),
}
CLASSES = tuple(OUTLINES)


def draw(split: str, index: int, *, plain: bool = False) -> tuple[npt.NDArray[np.uint8], int]:
    """One image `(64, 64, 3)` and its class; the classes take turns.

    Args:
        split: One of `SPLITS`.
        index: Number of the image.
        plain: Leave out what stands in the way.
    """
    rng = np.random.default_rng([sorted(SPLITS).index(split), index])
    label = index % len(CLASSES)
    if plain:
        canvas = Image.new("RGB", (SIDE * FINE, SIDE * FINE), _colour(rng))
        _place(canvas, label, _colour(rng), rng.uniform(0.26, 0.42), rng, spread=0.14)
        return np.asarray(canvas.resize((SIDE, SIDE), Image.Resampling.BOX)), label
    canvas = _background(rng)
    for _ in range(rng.integers(1, 4)):
        other = int(rng.integers(len(CLASSES)))
        _place(canvas, other, _colour(rng), rng.uniform(0.07, 0.13), rng, spread=0.5)
    _place(canvas, label, _colour(rng), rng.uniform(0.26, 0.42), rng, spread=0.14)
    _bar(canvas, rng)
    small = canvas.resize((SIDE, SIDE), Image.Resampling.BOX)
    small = small.filter(ImageFilter.GaussianBlur(float(rng.uniform(0, 0.9))))
    pixels = np.asarray(small, np.float64)
    contrast, light = rng.uniform(0.4, 1.0), rng.uniform(-40, 40)
    slope = np.linspace(-1, 1, SIDE)[:, None, None] * rng.uniform(-35, 35)
    pixels = 128 + (pixels - 128) * contrast + light + slope + rng.normal(0, rng.uniform(3, 18), pixels.shape)
    return pixels.clip(0, 255).round().astype(np.uint8), label


def _colour(rng: np.random.Generator) -> tuple[int, int, int]:
    red, green, blue = (int(value) for value in rng.integers(0, 256, 3))
    return red, green, blue


def _background(rng: np.random.Generator) -> Image.Image:
    """One colour with stripes of another."""
    side = SIDE * FINE
    canvas = Image.new("RGB", (side, side), _colour(rng))
    pen, stripe = ImageDraw.Draw(canvas), _colour(rng)
    turn, gap, width = rng.uniform(0, math.pi), rng.uniform(18, 60), rng.uniform(3, 14)
    along = (math.cos(turn) * 2 * side, math.sin(turn) * 2 * side)
    for step in np.arange(-2 * side, 2 * side, gap):
        x, y = side / 2 - math.sin(turn) * step, side / 2 + math.cos(turn) * step
        pen.line((x - along[0], y - along[1], x + along[0], y + along[1]), stripe, int(width))
    return canvas


def _place(
    canvas: Image.Image,
    kind: int,
    colour: tuple[int, int, int],
    size: float,
    rng: np.random.Generator,
    spread: float,
) -> None:
    """Draw a shape, turned, sheared and shifted, filled or as a thick line."""
    side = SIDE * FINE
    turn, shear = rng.uniform(-MAX_TURN, MAX_TURN), rng.uniform(-0.2, 0.2)
    stretch = rng.uniform(0.8, 1.2)
    cx, cy = side * (0.5 + rng.uniform(-spread, spread, 2))
    cos, sin = math.cos(turn) * size * side, math.sin(turn) * size * side
    points = [
        (cx + cos * (x * stretch + shear * y) - sin * y, cy + sin * (x * stretch + shear * y) + cos * y)
        for x, y in OUTLINES[CLASSES[kind]]
    ]
    pen = ImageDraw.Draw(canvas)
    if rng.random() < 0.35 and CLASSES[kind] not in ("spiral", "wave"):
        pen.line([*points, points[0], points[1]], colour, max(3, int(0.2 * size * side)), joint="curve")
    else:
        pen.polygon(points, fill=colour)


def _bar(canvas: Image.Image, rng: np.random.Generator) -> None:
    """An opaque bar across part of the picture."""
    side = SIDE * FINE
    x, y = rng.uniform(0, side, 2)
    dx, dy = rng.uniform(-0.6, 0.6, 2) * side
    ImageDraw.Draw(canvas).line((x, y, x + dx, y + dy), _colour(rng), int(rng.uniform(4, 20)))


def images(
    split: str, count: int | None = None, *, plain: bool = False
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """The first images of a split.

    Args:
        split: One of `SPLITS`.
        count: How many; all of them if None.
        plain: Leave out what stands in the way of the shapes.

    Returns:
        Images uint8 `(N, 64, 64, 3)` and classes int64 `(N,)`.
    """
    drawn = [draw(split, index, plain=plain) for index in range(SPLITS[split] if count is None else count)]
    return np.stack([image for image, _ in drawn]), np.array([label for _, label in drawn], np.int64)


def write(split: str, output: Path, count: int | None = None) -> None:
    """Write a split as `.npz`, or as a folder of PNGs with a sub-folder per class."""
    pixels, labels = images(split, count)
    if output.suffix == ".npz":
        output.parent.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(output, images=pixels, labels=labels)
        return
    for index, (image, label) in enumerate(zip(pixels, labels, strict=True)):
        place = output / f"{label:02d}" / f"{index:05d}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(place)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Draw a split.")
    parser.add_argument("--split", choices=SPLITS, default="test")
    parser.add_argument("--count", type=int)
    parser.add_argument("--output", type=Path, required=True, help="FILE.npz or a folder")
    given = parser.parse_args()
    write(given.split, given.output, given.count)
