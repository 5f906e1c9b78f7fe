"""The options of the evaluation transform, and the transform that they and the configuration of MODEL give."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import click

from pcn_deploy.artefact.provenance import ModelSource
from pcn_deploy.cli import options
from pcn_deploy.cli.options import Command
from pcn_deploy.data.pixels import ALPHAS, CHANNEL_ORDERS, EXIFS
from pcn_deploy.data.transform import CROP_MODES, INTERPOLATIONS, Transform
from pcn_deploy.errors import OptionError
from pcn_deploy.models.libraries import arguments_at, configured_evaluation
from pcn_deploy.models.library import Evaluation
from pcn_deploy.models.registry import find_model

_DEFAULT = Transform()
_CONFIGURED = ("resolution", "crop_pct", "crop_mode", "interpolation", "mean", "std")
"""What the configuration of a library tells; the options have the same names."""


class Resolution(click.ParamType[tuple[int, int]]):
    """`HxW`, or one number for a square."""

    name = "HxW"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        """Return height and width in pixels."""
        if isinstance(value, tuple):
            return value
        sides = str(value).lower().split("x")
        if len(sides) not in (1, 2) or not all(side.isdecimal() and int(side) > 0 for side in sides):
            self.fail(f"{value!r} is not HxW in pixels, such as 224x224 or 192x256.", param, ctx)
        return int(sides[0]), int(sides[-1])


class Floats(click.ParamType[tuple[float, ...]]):
    """Numbers separated by commas."""

    name = "R,G,B"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, ...]:
        """Return the numbers."""
        if isinstance(value, tuple):
            return value
        try:
            return tuple(float(part) for part in str(value).split(","))
        except ValueError:
            self.fail(f"{value!r} is not numbers separated by commas, such as 0.485,0.456,0.406.", param, ctx)


_TRANSFORM = (
    click.option(
        "--resolution",
        type=Resolution(),
        help="Height and width of the input, in pixels. [default: by model]",
    ),
    click.option(
        "--crop-pct",
        type=float,
        metavar="SHARE",
        help=f"Share of the resized image that the centre crop keeps. [default: by model, else {_DEFAULT.crop_pct}]",
    ),
    click.option(
        "--crop-mode",
        type=click.Choice(CROP_MODES),
        help="Keep the proportions and cut what is too much, squash to the very size, or keep all of the image and pad "
        f"it with the mean colour. [default: by model, else {_DEFAULT.crop_mode}]",
    ),
    click.option(
        "--channels",
        type=click.IntRange(min=1),
        metavar="N",
        help="Channels of the input; files have 1 or 3, arrays any number. [default: as many as --mean has]",
    ),
    click.option(
        "--mean",
        type=Floats(),
        help="Mean per channel, of values in [0, 1]; with --channels one for all. [default: by model, else ImageNet's, "
        "or 0]",
    ),
    click.option(
        "--std",
        type=Floats(),
        help="Standard deviation per channel; with --channels one for all. [default: by model, else ImageNet's, or 1]",
    ),
    click.option(
        "--channel-order",
        type=click.Choice(CHANNEL_ORDERS),
        default="rgb",
        show_default=True,
        help="bgr for a network trained on what OpenCV reads; --mean and --std are in this order.",
    ),
    click.option(
        "--interpolation",
        type=click.Choice(INTERPOLATIONS),
        help=f"How images are resized. [default: by model, else {_DEFAULT.interpolation}]",
    ),
    click.option(
        "--exif",
        type=click.Choice(EXIFS),
        default="ignore",
        show_default=True,
        help="Orientation in EXIF: ignored as in torchvision and timm, or applied as in OpenCV.",
    ),
    click.option(
        "--alpha",
        type=click.Choice(ALPHAS),
        default="drop",
        show_default=True,
        help="Transparency: dropped as in torchvision, or laid over white or black.",
    ),
    click.option(
        "--white",
        type=float,
        metavar="VALUE",
        help="Which value is white in images of more than 8 bits. [default: 65535 for 16 bits; floats and 32 bits "
        "need it]",
    ),
)


def transform_options(command: Command) -> Command:
    """The evaluation transform; stored in the bundle and used by every later command."""
    return options.with_decorators(command, _TRANSFORM)


def network_of(parameters: dict[str, Any]) -> tuple[ModelSource, Transform]:
    """The network that MODEL and `network_options` describe, and the transform of its images.

    What `transform_options` leave open is as by default for MODEL. What the configuration of a library decided is told
    in the notes of the network.

    Raises:
        OptionError: If weights are missing or too many, or the transform is impossible.
        ModelError: If MODEL is unknown.
        CheckpointError: If the checkpoint of a network of a library cannot be read.
        DependencyError: If the library is not installed.
    """
    model, source = parameters["model"], options.source_of(parameters)
    evaluation = configured_evaluation(model, parameters["weights"])
    transform = _transform_of(parameters, evaluation)
    notes = (*evaluation.notes, _told(transform, evaluation)) if evaluation else ()
    arguments = arguments_at(model, transform.resolution)
    return replace(source, notes=notes, architecture=arguments), transform


def _transform_of(parameters: dict[str, Any], evaluation: Evaluation | None) -> Transform:
    """The transform that the options describe, by default that of a library.

    Raises:
        OptionError: If values are impossible, or mean and std are not one for each channel.
        ModelError: If MODEL is unknown.
    """
    info = find_model(parameters["model"])
    base = evaluation.transform if evaluation else Transform(resolution=info.resolution if info else (224, 224))
    keys = ("resolution", "crop_pct", "crop_mode", "interpolation")
    chosen = {key: parameters[key] for key in keys if parameters[key] is not None}
    return replace(
        base,
        **chosen,
        mean=_per_channel(parameters["mean"], base.mean, 0.0, parameters["channels"], "--mean"),
        std=_per_channel(parameters["std"], base.std, 1.0, parameters["channels"], "--std"),
        channel_order=parameters["channel_order"],
        alpha=parameters["alpha"],
        exif=parameters["exif"],
        white=parameters["white"],
    )


def _told(transform: Transform, evaluation: Evaluation) -> str:
    """The values that were taken, as the options that would say the same, and which the command line decided."""
    values = " ".join(_option(transform, key) for key in _CONFIGURED)
    note = f"images are transformed as {evaluation.origin}: {values}."
    changed = [_option(evaluation.transform, key) for key in _CONFIGURED if not _same(transform, evaluation, key)]
    return f"{note} The command line replaced {' '.join(changed)}." if changed else note


def _same(transform: Transform, evaluation: Evaluation, key: str) -> bool:
    return bool(getattr(transform, key) == getattr(evaluation.transform, key))


def _option(transform: Transform, key: str) -> str:
    value = getattr(transform, key)
    if isinstance(value, tuple):
        value = ("x" if key == "resolution" else ",").join(f"{part:g}" for part in value)
    return f"--{key.replace('_', '-')} {value}"


def _per_channel(
    values: tuple[float, ...] | None, default: tuple[float, ...], neutral: float, channels: int | None, option: str
) -> tuple[float, ...]:
    """One value for each channel, from as many or, where their number is given, from one or none."""
    if channels is None:
        return values or default
    values = values or (default if channels == len(default) else (neutral,))
    if len(values) not in (1, channels):
        msg = f"{option} has {len(values)} values; --channels is {channels}. Give one for each, or one for all."
        raise OptionError(msg)
    return values if len(values) == channels else values * channels
