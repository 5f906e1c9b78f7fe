"""Options shared by commands, one name each, and the parameter types that read them.

Options of the network, of its transform and of calibration: build, analyze.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

from pcn_deploy.artefact.provenance import ModelSource
from pcn_deploy.calibration.calibrators import AUTO, CALIBRATORS, PERCENTILE, WEIGHT_CALIBRATORS
from pcn_deploy.calibration.recovery import RECOVERIES
from pcn_deploy.data.images import MAX_UNREADABLE_SHARE
from pcn_deploy.data.pixels import ALPHAS, CHANNEL_ORDERS, EXIFS
from pcn_deploy.data.transform import CROP_MODES, IMAGENET_MEAN, IMAGENET_STD, INTERPOLATIONS, Transform
from pcn_deploy.engines.base import BackendOptions
from pcn_deploy.engines.registry import TARGETS
from pcn_deploy.engines.tensorrt.flavour import PORTABLE
from pcn_deploy.errors import OptionError
from pcn_deploy.models.registry import check_weights_choice, find_model
from pcn_deploy.specs import BatchRange

ALL_RECOVERIES = "all"
CHECKPOINT_WEIGHTS = ("auto", "ema", "raw")
"""`models.containers.CHOICES`, which needs torch."""

Command = TypeVar("Command", bound=Callable[..., Any])


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


class Batch(click.ParamType[BatchRange]):
    """`MIN:OPT:MAX`, or one number."""

    name = "MIN:OPT:MAX"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> BatchRange:
        """Return the range."""
        if isinstance(value, BatchRange):
            return value
        try:
            return BatchRange.parse(str(value))
        except OptionError as error:
            self.fail(str(error), param, ctx)


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


bundle_argument = click.argument("file", type=click.Path(path_type=Path), metavar="FILE.pcn")

compute_capability_option = click.option(
    "--compute-capability",
    "compute_capabilities",
    multiple=True,
    metavar="SM89",
    help=f"GPU that the tensorrt-rtx engine is built for; may be given several times. [default: {', '.join(PORTABLE)}]",
)
tf32_option = click.option(
    "--tf32",
    is_flag=True,
    help="Let convolutions and products in FP32 round their inputs to TF32 (tensorrt, tensorrt-rtx).",
)
target_option = click.option(
    "--target",
    type=click.Choice(TARGETS),
    help="Engine of the bundle; the fastest that runs here by default.",
)
weights_option = click.option(
    "--weights",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Checkpoint: .safetensors, or a PyTorch state dict (read without executing anything in it).",
)
max_drop_option = click.option(
    "--max-drop",
    type=float,
    metavar="PCT",
    help="Largest loss of top-1, in percentage points, on labelled images. [default: by precision, kept in the bundle]",
)
data_option = click.option(
    "--data",
    type=click.Path(path_type=Path),
    metavar="DIR|FILE.npz",
    help="Images that judge the accuracy (sub-folders are classes).",
)
changed_option = click.option(
    "--changed",
    type=click.Path(path_type=Path),
    metavar="OUT.csv",
    help="Write the images that judge the accuracy and to which an engine answers another class: file, true class, "
    "both answers with their margins (logit of the answer less the next one), the gravest first.",
)
classes_option = click.option(
    "--classes",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Which output each class folder is: names or synsets line by line in the order of the outputs, `index name` "
    "pairs, or JSON such as class_to_idx or id2label. [default: folders in the order of their names, as torchvision's "
    "ImageFolder]",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout, nothing else.")
overwrite_option = click.option("--overwrite", is_flag=True, help="Replace the output file if it exists.")


def _with(command: Command, decorators: Sequence[Callable[[Any], Any]]) -> Command:
    for decorator in reversed(decorators):
        command = decorator(command)
    return command


def verbosity_options(command: Command) -> Command:
    """-v and -q."""
    command = click.option("-q", "--quiet", is_flag=True, help="No progress bars, no notes.")(command)
    return click.option("-v", "--verbose", count=True, help="More log lines on stderr; twice for all.")(command)


def backend_options(command: Command) -> Command:
    """How engines are built, where their target leaves a choice."""
    return _with(command, (compute_capability_option, tf32_option))


def backend_of(parameters: dict[str, Any]) -> BackendOptions:
    """Take the `backend_options` out of the arguments of a command."""
    return BackendOptions(compute_capabilities=parameters.pop("compute_capabilities"), tf32=parameters.pop("tf32"))


_TRANSFORM = (
    click.option(
        "--resolution",
        type=Resolution(),
        help="Height and width of the input, in pixels. [default: by model]",
    ),
    click.option(
        "--crop-pct",
        type=float,
        default=0.875,
        show_default=True,
        metavar="SHARE",
        help="Share of the resized image that the centre crop keeps.",
    ),
    click.option(
        "--crop-mode",
        type=click.Choice(CROP_MODES),
        default="center",
        show_default=True,
        help="Keep the proportions and cut what is too much, or squash to the very size.",
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
        help="Mean per channel, of values in [0, 1]; with --channels one for all. [default: ImageNet's, or 0]",
    ),
    click.option(
        "--std",
        type=Floats(),
        help="Standard deviation per channel; with --channels one for all. [default: ImageNet's, or 1]",
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
        default="bicubic",
        show_default=True,
        help="How images are resized.",
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
    return _with(command, _TRANSFORM)


def network_options(command: Command) -> Command:
    """Which network, with which weights."""
    decorators = [
        weights_option,
        click.option(
            "--checkpoint-weights",
            type=click.Choice(CHECKPOINT_WEIGHTS),
            default="auto",
            show_default=True,
            help="Of a checkpoint that holds an average (EMA) too: the averaged or the raw weights; auto takes those "
            "that the tools of the field evaluate, and says which.",
        ),
        click.option("--random-weights", is_flag=True, help="Use freshly initialised weights instead of --weights."),
        click.option(
            "--num-classes", type=click.IntRange(min=1), metavar="N", help="Logits. [default: as the checkpoint]"
        ),
        click.option(
            "--seed",
            type=click.IntRange(0, 2**32 - 1),
            default=0,
            show_default=True,
            help="Seed of random weights and images.",
        ),
    ]
    return _with(command, decorators)


def calibration_options(command: Command) -> Command:
    """Which images calibrate, and how."""
    decorators = [
        click.option(
            "--calibration",
            type=click.Path(path_type=Path),
            metavar="DIR|FILE.npz",
            help="Images to calibrate with (sub-folders are classes); required for int8 and fp8.",
        ),
        click.option(
            "--images",
            type=click.IntRange(min=1),
            default=512,
            show_default=True,
            metavar="N",
            help="Use at most so many calibration images, spread over all of them.",
        ),
        click.option(
            "--calibrator",
            type=click.Choice((*CALIBRATORS, AUTO)),
            help="Ranges; auto tries them all and takes the one of largest SQNR of the logits. [default: mse; for "
            "fp8 max]",
        ),
        click.option(
            "--percentile",
            type=float,
            metavar="P",
            help=f"With --calibrator percentile: share of magnitudes inside the range. [default: {PERCENTILE}]",
        ),
        click.option(
            "--weight-calibrator",
            type=click.Choice(WEIGHT_CALIBRATORS),
            default="max",
            show_default=True,
            help="Range of each output channel of the weights.",
        ),
        click.option(
            "--calibration-cache",
            type=click.Path(path_type=Path),
            metavar="FILE.json",
            help="Keep what calibration sees in this file; if it is there, run nothing. A bundle can be read too.",
        ),
        click.option(
            "--recover",
            type=click.Choice((*RECOVERIES, ALL_RECOVERIES)),
            multiple=True,
            help="With int8: win accuracy back without training; repeat for several.",
        ),
        click.option(
            "--max-unreadable",
            type=click.FloatRange(0, 1),
            default=MAX_UNREADABLE_SHARE,
            show_default=True,
            metavar="SHARE",
            help="Stop if more than this share of the images cannot be read.",
        ),
    ]
    return _with(command, decorators)


def calibration_of(parameters: dict[str, Any]) -> dict[str, Any]:
    """What `calibration_options` say, as `CompileOptions` takes it.

    Raises:
        OptionError: If there is a percentile for another calibrator.
    """
    percentile = parameters["percentile"]
    if percentile is not None and parameters["calibrator"] != "percentile":
        msg = "--percentile goes with --calibrator percentile."
        raise OptionError(msg)
    return {
        "calibrator": parameters["calibrator"] or "",
        "percentile": PERCENTILE if percentile is None else percentile,
        "weight_calibrator": parameters["weight_calibrator"],
        "calibration_cache": parameters["calibration_cache"],
        "recovery": RECOVERIES if ALL_RECOVERIES in parameters["recover"] else parameters["recover"],
        "calibration_images": parameters["images"],
        "max_unreadable": parameters["max_unreadable"],
    }


def transform_of(parameters: dict[str, Any]) -> Transform:
    """The transform that `transform_options` describe; the resolution is that of the model if none is given.

    Raises:
        OptionError: If values are impossible, or mean and std are not one for each channel.
    """
    info = find_model(parameters["model"])
    return Transform(
        resolution=parameters["resolution"] or (info.resolution if info else (224, 224)),
        crop_pct=parameters["crop_pct"],
        crop_mode=parameters["crop_mode"],
        mean=_per_channel(parameters["mean"], IMAGENET_MEAN, 0.0, parameters["channels"], "--mean"),
        std=_per_channel(parameters["std"], IMAGENET_STD, 1.0, parameters["channels"], "--std"),
        interpolation=parameters["interpolation"],
        channel_order=parameters["channel_order"],
        alpha=parameters["alpha"],
        exif=parameters["exif"],
        white=parameters["white"],
    )


def _per_channel(
    values: tuple[float, ...] | None, imagenet: tuple[float, ...], neutral: float, channels: int | None, option: str
) -> tuple[float, ...]:
    """One value for each channel, from as many or, where their number is given, from one or none."""
    if channels is None:
        return values or imagenet
    values = values or (imagenet if channels == len(imagenet) else (neutral,))
    if len(values) not in (1, channels):
        msg = f"{option} has {len(values)} values; --channels is {channels}. Give one for each, or one for all."
        raise OptionError(msg)
    return values if len(values) == channels else values * channels


def source_of(parameters: dict[str, Any]) -> ModelSource:
    """The network that `network_options` and the argument MODEL describe.

    Raises:
        OptionError: If weights are missing, or there are weights and --random-weights.
        CheckpointError, ModelError: If a file that they name is not there.
    """
    check_weights_choice(
        find_model(parameters["model"]), parameters["weights"], random_weights=parameters["random_weights"]
    )
    source = ModelSource(
        model=parameters["model"],
        weights=parameters["weights"],
        num_classes=parameters["num_classes"],
        seed=parameters["seed"],
        random_weights=parameters["random_weights"],
        checkpoint_weights=parameters["checkpoint_weights"],
    )
    source.check_files()
    return source
