"""Networks of timm by name, as its `train.py` makes and evaluates them. Importing this does not import timm."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from pcn_deploy.data.transform import Transform
from pcn_deploy.errors import ModelError
from pcn_deploy.models.library import Evaluation, Library, of_references


class Timm(Library):
    """timm, github.com/huggingface/pytorch-image-models."""

    package = "timm"
    listing = "import timm; print(*timm.list_models())"

    def architecture(self, name: str) -> str:
        """The name without its tag, such as `a1_in1k`."""
        return name.partition(".")[0]

    def names(self) -> Sequence[str]:
        """As `timm.list_models()`."""
        names: list[str] = self.load().list_models()
        return names

    def check(self, name: str) -> None:
        """Refuse an architecture or a tag that there is not; raises as that of all libraries."""
        super().check(name)
        tags = self.load().list_pretrained(f"{self.architecture(name)}.*")
        if name != self.architecture(name) and self._configuration(name) is None:
            known = ", ".join(f"timm:{one}" for one in tags)
            msg = f"timm has no configuration {name!r}. Known: {known or f'timm:{self.architecture(name)}'}."
            raise ModelError(msg)

    def create(self, name: str, weights: Path | None, trained: Mapping[str, Any], arguments: dict[str, Any]) -> Any:
        """As timm's `train.py` makes it: its arguments that change what is computed are taken over."""
        timm = self.load()
        own = inspect.signature(timm.create_model).parameters  # a checkpoint says nothing of paths and downloads
        more = trained.get("model_kwargs")
        told = {key: value for key, value in more.items() if key not in own} if isinstance(more, dict) else {}
        told |= {"in_chans": _channels(trained), "global_pool": trained.get("gp"), "bn_eps": trained.get("bn_eps")}
        configuration = self._configuration(name)
        if getattr(configuration, "fixed_input_size", False) and (size := _input_size(trained)):
            told.setdefault("img_size", size[1:])
        told = {key: value for key, value in told.items() if value is not None}
        return timm.create_model(name, pretrained=False, **{**told, **arguments})

    def arguments_at(self, name: str, resolution: tuple[int, int]) -> dict[str, Any]:
        """`img_size` for a network that is made for one size, such as a ViT, where another is wanted."""
        configuration = self._configuration(name)
        fixed = getattr(configuration, "fixed_input_size", False)
        return {"img_size": list(resolution)} if fixed and configuration.input_size[1:] != resolution else {}

    def evaluation(self, name: str, weights: Path | None, trained: Mapping[str, Any]) -> Evaluation:
        """As `timm.data.resolve_data_config`, which timm's `train.py` evaluates with.

        Raises:
            OptionError: If what it says is not possible here.
        """
        timm = self.load()
        if recipe := of_references(trained, weights):
            return recipe
        configuration = self._configuration(name)
        keys = ("crop_pct", "crop_mode", "interpolation", "mean", "std")
        told = {key: trained[key] for key in keys if trained.get(key)}
        if "crop_pct" not in told and trained.get("eval_crop_ratio"):  # DeiT's main.py
            told["crop_pct"] = trained["eval_crop_ratio"]
        if size := _input_size(trained):
            told["input_size"] = size
        elif channels := _channels(trained):
            told["in_chans"] = channels
        found = timm.data.resolve_data_config(
            args={"input_size": None, **told}, pretrained_cfg=configuration.to_dict() if configuration else {}
        )
        channels, height, width = found["input_size"]
        if told.get("in_chans"):
            channels = told["in_chans"]
        share = float(found["crop_pct"])
        notes: tuple[str, ...] = ()
        if share > 1:
            notes = (f"timm evaluates {name} on a black border, crop_pct {share:g}; here without one, 1.",)
        transform = Transform(
            resolution=(height, width),
            crop_pct=min(share, 1.0),
            crop_mode=found["crop_mode"],
            interpolation=found["interpolation"],
            mean=_spread(found["mean"], channels),
            std=_spread(found["std"], channels),
        )
        tag = getattr(configuration, "tag", None)
        full = f"{self.architecture(name)}.{tag}" if tag else name
        origin = f"timm {timm.__version__} configures {full}"
        if told:
            origin += f", with {', '.join(told)} of its training (in {weights})"
        return Evaluation(transform=transform, origin=origin, notes=notes)

    def _configuration(self, name: str) -> Any:
        with suppress(RuntimeError):  # no such tag
            return self.load().get_pretrained_cfg(name)
        return None


def _input_size(trained: Mapping[str, Any]) -> tuple[int, int, int] | None:
    """Channels, height and width that timm's or DeiT's script trained with; None for those of the architecture."""
    size = trained.get("input_size") or trained.get("img_size")
    if isinstance(size, int):
        return (trained.get("in_chans") or 3, size, size)
    return (size[0], size[1], size[2]) if isinstance(size, list | tuple) and len(size) == 3 else None


def _channels(trained: Mapping[str, Any]) -> int | None:
    """Channels that a network was trained with, where they are not the architecture's own."""
    size = trained.get("input_size")
    return trained.get("in_chans") or (size[0] if isinstance(size, list | tuple) else None)


def _spread(values: Sequence[float], channels: int) -> tuple[float, ...]:
    """A statistic for each channel; their mean where there are other channels than values, as timm's loader does."""
    same = len(values) == channels
    return tuple(float(value) for value in values) if same else (sum(values) / len(values),) * channels
