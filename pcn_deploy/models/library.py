"""What a library of networks must tell, such as timm: names, networks, and how they are evaluated."""

from __future__ import annotations

import difflib
import importlib
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from pcn_deploy.data.transform import Transform
from pcn_deploy.errors import DependencyError, ModelError


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """How a library evaluates one of its networks.

    Attributes:
        transform: What images go through.
        origin: What says so, in words.
        notes: What the user should know beside.
    """

    transform: Transform
    origin: str
    notes: tuple[str, ...] = ()


class Library(ABC):
    """A package that makes networks by name; its name is the prefix."""

    package: ClassVar[str]

    def load(self) -> Any:
        """Import it.

        Raises:
            DependencyError: If it, or what it needs, is not installed or does not fit the installed torch.
        """
        try:
            return importlib.import_module(self.package)
        except ModuleNotFoundError as error:
            missing = error.name or self.package
            what = f"{self.package} is not installed" if missing == self.package else f"{self.package} needs {missing}"
            msg = f"{what}; MODEL {self.package}:NAME needs it. Install it: pip install {missing}"
            raise DependencyError(msg) from error
        except Exception as error:  # a torchvision made for another torch fails with whatever it meets first
            culprit = "torchvision" if "torchvision" in str(error) else self.package
            msg = (
                f"{self.package} cannot be imported ({type(error).__name__}: {error}). Install the {culprit} that fits "
                f"the installed torch: pip install --upgrade {culprit}"
            )
            raise DependencyError(msg) from error

    def check(self, name: str) -> None:
        """Refuse a name that the library does not have.

        Raises:
            ModelError: If there is no such network; the closest names are in the message.
            DependencyError: As `load`.
        """
        names = self.names()
        if self.architecture(name) in names:
            return
        close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
        listing = f'python -c "{self.listing}"'
        hint = f"Did you mean {' or '.join(f'{self.package}:{one}' for one in close)}? All names: {listing}"
        msg = f"{self.package} has no classifier {name!r}. {hint if close else f'All names: {listing}'}"
        raise ModelError(msg)

    listing: ClassVar[str]
    """Python that prints all names."""

    def architecture(self, name: str) -> str:
        """The name of an architecture without what says whose weights are meant."""
        return name

    @abstractmethod
    def names(self) -> Sequence[str]:
        """Every architecture that classifies images."""

    @abstractmethod
    def create(self, name: str, weights: Path | None, trained: Mapping[str, Any], arguments: dict[str, Any]) -> Any:
        """Make a network with random weights, as it was made where a checkpoint was trained.

        Args:
            name: Its name without the prefix.
            weights: The checkpoint that will be loaded, if any.
            trained: Arguments of the training script, where the checkpoint tells them.
            arguments: Keyword arguments that win over those.
        """

    @abstractmethod
    def evaluation(self, name: str, weights: Path | None, trained: Mapping[str, Any]) -> Evaluation:
        """How a network is evaluated: as it was where the checkpoint was trained, else as the library is configured."""

    def arguments_at(self, name: str, resolution: tuple[int, int]) -> dict[str, Any]:
        """Arguments with which a network that is made for one height and width takes those, in pixels."""
        return {}

    def class_names(self, name: str, weights: Path) -> tuple[str, ...]:
        """Names of the classes of a file that the library publishes itself."""
        return ()


def share_of(crop: int, resize: int) -> float:
    """The share `crop_pct` with which a transform resizes to just that many pixels before it crops.

    Args:
        crop: Side of the crop, in pixels.
        resize: Length of the shorter side before it, in pixels; at least `crop` for a share that a transform takes.
    """
    share = crop / resize
    while int(crop / share) < resize:  # 224 / (224 / 232) is 231.99…
        share = math.nextafter(share, 0)
    return share


def of_references(trained: Mapping[str, Any], weights: Path | None) -> Evaluation | None:
    """How torchvision's references evaluated, from the arguments of their `train.py`; None for other scripts."""
    crop, resize = trained.get("val_crop_size"), trained.get("val_resize_size")
    if not isinstance(crop, int) or not isinstance(resize, int):
        return None
    transform = Transform(
        resolution=(crop, crop),
        crop_pct=share_of(crop, resize),
        interpolation=str(trained.get("interpolation", "bilinear")),
    )
    return Evaluation(transform=transform, origin=f"torchvision's train.py evaluated it, by its arguments in {weights}")
