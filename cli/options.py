"""Options shared by commands, one name each, and the parameter types that read them.

Options of the network and of calibration: build, analyze. Those of its transform: `transforms.py`.
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
from pcn_deploy.engines.base import BackendOptions
from pcn_deploy.engines.registry import TARGETS
from pcn_deploy.engines.tensorrt.flavour import PORTABLE
from pcn_deploy.errors import OptionError
from pcn_deploy.models.registry import check_weights_choice
from pcn_deploy.specs import BatchRange

ALL_RECOVERIES = "all"
CHECKPOINT_WEIGHTS = ("auto", "ema", "raw")
"""`models.containers.CHOICES`, which needs torch."""

Command = TypeVar("Command", bound=Callable[..., Any])


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


def with_decorators(command: Command, decorators: Sequence[Callable[[Any], Any]]) -> Command:
    """Decorate a command so that its help lists the options in the order given."""
    for decorator in reversed(decorators):
        command = decorator(command)
    return command


def verbosity_options(command: Command) -> Command:
    """-v and -q."""
    command = click.option("-q", "--quiet", is_flag=True, help="No progress bars, no notes.")(command)
    return click.option("-v", "--verbose", count=True, help="More log lines on stderr; twice for all.")(command)


def backend_options(command: Command) -> Command:
    """How engines are built, where their target leaves a choice."""
    return with_decorators(command, (compute_capability_option, tf32_option))


def backend_of(parameters: dict[str, Any]) -> BackendOptions:
    """Take the `backend_options` out of the arguments of a command."""
    return BackendOptions(compute_capabilities=parameters.pop("compute_capabilities"), tf32=parameters.pop("tf32"))


def network_options(command: Command) -> Command:
    """Which network, with which weights."""
    decorators = [
        weights_option,
        click.option(
            "--checkpoint-weights",
            type=click.Choice(CHECKPOINT_WEIGHTS),
            default="auto",
            show_default=True,
            help="Which weights to take from a checkpoint that also holds an average (EMA): the averaged or the raw "
            "ones. auto takes those that the library which wrote the file evaluates, and says which.",
        ),
        click.option("--random-weights", is_flag=True, help="Use freshly initialised weights instead of --weights."),
        click.option(
            "--num-classes",
            type=click.IntRange(min=1),
            metavar="N",
            help="Number of classes, which the checkpoint must have too; your own factory is called with "
            "num_classes=N. [default: as the checkpoint has, or as your own factory makes]",
        ),
        click.option(
            "--seed",
            type=click.IntRange(0, 2**32 - 1),
            default=0,
            show_default=True,
            help="Seed of random weights and images.",
        ),
    ]
    return with_decorators(command, decorators)


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
            help="Use at most N calibration images, spread over all of them.",
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
            help="Save the calibration to this file, or reuse it if the file exists. A bundle can be reused too.",
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
    return with_decorators(command, decorators)


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


def source_of(parameters: dict[str, Any]) -> ModelSource:
    """The network that `network_options` and the argument MODEL describe.

    Raises:
        OptionError: If weights are missing, or there are weights and --random-weights.
        CheckpointError, ModelError: If a file that they name is not there.
    """
    check_weights_choice(parameters["model"], parameters["weights"], random_weights=parameters["random_weights"])
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
