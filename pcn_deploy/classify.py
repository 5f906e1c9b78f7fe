"""The verb `run`: the most likely classes of real images, through an opened engine. numpy and Pillow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pcn_deploy.calibration.images import read_image
from pcn_deploy.errors import DataError
from pcn_deploy.runtime import Engine


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """The most likely classes of one image, best first.

    Attributes:
        image: The file.
        classes: Indices of the classes.
        names: Their names; the indices as text where no names were given.
        probabilities: Softmax of the logits, 0 to 1.
    """

    image: str
    classes: tuple[int, ...]
    names: tuple[str, ...]
    probabilities: tuple[float, ...]


def classify(
    engine: Engine, images: Sequence[Path], *, top: int = 5, class_names: Sequence[str] | None = None
) -> list[Prediction]:
    """Classify image files.

    Args:
        engine: An opened engine.
        images: Image files.
        top: Number of classes per image.
        class_names: Name of every class, in order.

    Returns:
        One prediction per image.

    Raises:
        DataError: If an image cannot be read, or the names are not as many as the classes.
        DependencyError: If Pillow is missing.
    """
    results = []
    for path in images:
        logits = engine.predict(read_image(path, engine.transform)[None])[0].astype(np.float64)
        if class_names is not None and len(class_names) != len(logits):
            msg = f"{len(class_names)} class names were given; the network has {len(logits)} classes."
            raise DataError(msg)
        weights = np.exp(logits - logits.max())
        best = np.argsort(-logits, kind="stable")[:top]
        results.append(
            Prediction(
                image=str(path),
                classes=tuple(int(index) for index in best),
                names=tuple(str(index) if class_names is None else class_names[index] for index in best),
                probabilities=tuple(float(value) for value in (weights / weights.sum())[best]),
            )
        )
    return results
