"""The verb `run`: what an opened engine answers to real images. numpy and Pillow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pcn_deploy.artefact.engine import Engine, check_finite
from pcn_deploy.data.image_files import read_image
from pcn_deploy.errors import DataError, OptionError, ParityError
from pcn_deploy.show.heatmap import MapRange, choose_map, overlay, save
from pcn_deploy.specs import ATTENTION_MAP, LOGITS, EngineSpec
from pcn_deploy.tasks.classification import most_likely
from pcn_deploy.tasks.roles import get_role


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What an engine answers to one image: the most likely classes, best first, and its other outputs.

    Attributes:
        image: The file.
        classes: Indices of the classes.
        names: Their names; the indices as text where none are known.
        probabilities: Softmax of the logits, 0 to 1.
        outputs: What the other outputs hold, by name: role, shape, smallest and largest value, mean.
        heatmap: The picture of where the network looked, if one was asked for.
        attention: What its colours stand for, and whose class the map is.
        error: Why there is no answer: the file is no image, or the outputs are NaN or infinite. Nothing else is set.
    """

    image: str
    classes: tuple[int, ...] = ()
    names: tuple[str, ...] = ()
    probabilities: tuple[float, ...] = ()
    outputs: dict[str, Any] = field(default_factory=dict)
    heatmap: str | None = None
    attention: MapRange | None = None
    error: DataError | ParityError | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain values, the error as its message."""
        return {**asdict(self), "error": None if self.error is None else str(self.error)}


def classify(
    engine: Engine,
    images: Sequence[Path],
    *,
    top: int = 5,
    class_names: Sequence[str] | None = None,
    heatmaps: Sequence[Path] | None = None,
    heatmap_class: int | None = None,
) -> list[Prediction]:
    """Classify image files; of an engine without logits, tell what its outputs hold.

    Args:
        engine: An opened engine.
        images: Image files.
        top: Number of classes per image.
        class_names: Name of every class, in order; by default those that the bundle knows.
        heatmaps: Where to write, for each image, the attention map over it: that of the most likely class where every
            class has its own.
        heatmap_class: The class whose map is drawn instead.

    Returns:
        One prediction per image. An image without an answer has an error instead; it does not stop the others.

    Raises:
        DataError: If the names are not as many as the classes.
        OptionError: If heatmaps are asked of a bundle without attention map, or for a class without one of its own.
        OutputError: If a picture cannot be written.
        DependencyError: If Pillow is missing.
    """
    spec = engine.spec
    logits, maps = spec.output_of(LOGITS), spec.output_of(ATTENTION_MAP)
    if heatmaps is not None and maps is None:
        msg = "The bundle holds no attention map. Build it with --with-attention-map."
        raise OptionError(msg)
    if heatmaps is None and heatmap_class is not None:
        msg = f"Class {heatmap_class} was chosen for a picture that is not drawn. Give --heatmap, or leave --class out."
        raise OptionError(msg)
    class_names, results = class_names or engine.class_names or None, []
    for index, path in enumerate(images):
        try:
            image = read_image(path, engine.transform)
            outputs = engine.outputs(image[None])
            check_finite(outputs, engine, str(path), image[None])
        except (DataError, ParityError) as error:
            results.append(Prediction(image=str(path), error=error))
            continue
        prediction = Prediction(image=str(path), outputs=_others(spec, outputs))
        if logits is not None:
            best = most_likely(outputs[logits.name][0], top, class_names)
            prediction = replace(
                prediction,
                classes=tuple(one.index for one in best),
                names=tuple(one.name for one in best),
                probabilities=tuple(one.probability for one in best),
            )
        if heatmaps is not None and maps is not None:
            first = prediction.classes[0] if prediction.classes else 0
            drawn, attention = choose_map(outputs[maps.name][0], first, heatmap_class)
            save(overlay(image, drawn, engine.transform), heatmaps[index])
            prediction = replace(prediction, heatmap=str(heatmaps[index]), attention=attention)
        results.append(prediction)
    return results


def _others(spec: EngineSpec, outputs: dict[str, npt.NDArray[np.float32]]) -> dict[str, Any]:
    """What the roles of the outputs tell that are neither logits nor an attention map, by name."""
    others = (tensor for tensor in spec.outputs if tensor.role not in (LOGITS, ATTENTION_MAP))
    return {tensor.name: get_role(tensor.role).answer(outputs[tensor.name][0]) for tensor in others}
