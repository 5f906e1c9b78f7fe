"""Classifiers of torchvision by name, as its references make and evaluate them. Importing this does not import it."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pcn_deploy.data.transform import Transform
from pcn_deploy.errors import ModelError
from pcn_deploy.models.library import Evaluation, Library, of_references, share_of

_OF_ONE_SIZE, _SIDE = "vit_", 224
"""Networks that take images of the size they were made for, and the side they are made for by default, in pixels."""


class Torchvision(Library):
    """torchvision, github.com/pytorch/vision."""

    package = "torchvision"
    listing = "import torchvision.models as m; print(*m.list_models(m))"

    _INCEPTIONS = frozenset({"googlenet", "inception_v3"})
    """Those whose builder sets `transform_input` where it loads the weights that torchvision publishes."""

    def names(self) -> Sequence[str]:
        """Its classifiers: `torchvision.models.list_models`, without segmentation, detection and the like."""
        models = self.load().models
        names: list[str] = models.list_models(module=models)
        return names

    def check(self, name: str) -> None:
        """Refuse what is no classifier; raises as that of all libraries."""
        if name not in self.names() and name in self.load().models.list_models():
            msg = f"torchvision:{name} is no classifier of images. Let a function return it: file.py:factory"
            raise ModelError(msg)
        super().check(name)

    def create(self, name: str, weights: Path | None, trained: Mapping[str, Any], arguments: dict[str, Any]) -> Any:
        """As its references' `train.py` makes it; the Inceptions as they are made for its own weights, with those."""
        if name in self._INCEPTIONS:
            published = weights is not None and self._published(name, weights) is not None
            arguments = {"init_weights": weights is None, "transform_input": published, **arguments}
        elif name.startswith(_OF_ONE_SIZE) and weights and (entry := self._published(name, weights)):
            arguments = {"image_size": entry.meta["min_size"][0], **arguments}
        return self.load().models.get_model(name, weights=None, **arguments)

    def arguments_at(self, name: str, resolution: tuple[int, int]) -> dict[str, Any]:
        """`image_size` for a ViT, which is made for one size."""
        made_for_another = name.startswith(_OF_ONE_SIZE) and resolution != (_SIDE, _SIDE)
        return {"image_size": resolution[0]} if made_for_another else {}

    def evaluation(self, name: str, weights: Path | None, trained: Mapping[str, Any]) -> Evaluation:
        """As its references' `train.py` evaluated, else the transform of the weights that torchvision publishes."""
        if recipe := of_references(trained, weights):
            return recipe
        published = self._published(name, weights) if weights else None
        entry = published or self.load().models.get_model_weights(name).DEFAULT
        preset = entry.transforms()
        crop, resize = (_one(size) for size in (preset.crop_size, preset.resize_size))
        transform = Transform(
            resolution=(crop, crop),
            crop_pct=share_of(crop, resize),
            interpolation=preset.interpolation.value,
            mean=tuple(preset.mean),
            std=tuple(preset.std),
        )
        origin = f"torchvision {self.load().__version__} evaluates {type(entry).__name__}.{entry.name}"
        if published:
            origin += f", which {weights} is"
        return Evaluation(transform=transform, origin=origin)

    def class_names(self, name: str, weights: Path) -> tuple[str, ...]:
        """The categories of the weights that torchvision publishes."""
        entry = self._published(name, weights)
        return tuple(entry.meta["categories"]) if entry else ()

    def _published(self, name: str, weights: Path) -> Any:
        """The entry of the file that torchvision publishes, recognised by its hash, which is in its address."""
        for entry in self.load().models.get_model_weights(name):
            match = re.search(r"-([0-9a-f]{8,})\.\w+$", entry.url)
            if match and _sha256(weights).startswith(match[1]):
                return entry
        return None


def _one(size: Any) -> int:
    """A side, from torchvision's list of one."""
    return int(size[0]) if isinstance(size, list | tuple) else int(size)


def _sha256(path: Path) -> str:
    sha = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            sha.update(block)
    return sha.hexdigest()
