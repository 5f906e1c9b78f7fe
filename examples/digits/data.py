"""scikit-learn's handwritten digits as image files: 1,797 real grey images of 8x8 pixels, in 10 classes.

Run it as `python examples/digits/data.py [FOLDER]`. Source of the images: E. Alpaydin and C. Kaynak, "Optical
Recognition of Handwritten Digits", UCI Machine Learning Repository, 1998; they come with scikit-learn.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from pcn_deploy.data.transform import IMAGENET_MEAN, IMAGENET_STD, Transform

NUM_CLASSES = 10
TEST_IMAGES = 360
SPLIT_SEED = 0
BRIGHTEST = 16  # largest value of a pixel in the data set

TRANSFORM = Transform(resolution=(32, 32), crop_pct=1.0, mean=IMAGENET_MEAN, std=IMAGENET_STD, interpolation="bicubic")


def write_images(folder: Path) -> tuple[Path, Path]:
    """Write `folder/{train,test}/<class>/<index>.png`; files that exist stay as they are.

    Args:
        folder: Made if it does not exist.

    Returns:
        The folders of the train split (1,437 images) and of the test split (360).
    """
    digits = load_digits()
    pixels = np.rint(digits.images * (255 / BRIGHTEST)).astype(np.uint8)
    indices = np.arange(len(pixels))
    train, test = train_test_split(indices, test_size=TEST_IMAGES, random_state=SPLIT_SEED, stratify=digits.target)
    for name, members in (("train", train), ("test", test)):
        for index in members:
            path = folder / name / str(digits.target[index]) / f"{index:04d}.png"
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels[index]).save(path)
    return folder / "train", folder / "test"


if __name__ == "__main__":
    for split in write_images(Path(sys.argv[1] if len(sys.argv) > 1 else "out/digits")):
        print(f"{split}: {len(list(split.rglob('*.png')))} images")
