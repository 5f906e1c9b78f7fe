"""The images of a build: those that calibrate, those that judge, and what stands in where there are none."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pcn_deploy.aliases import Indices
from pcn_deploy.artefact.bundle import read_calibration
from pcn_deploy.artefact.golden import NOISE
from pcn_deploy.calibration.record import from_json
from pcn_deploy.data.arrays import ArraysLike, all_of, is_stream
from pcn_deploy.data.classes import REMEDY, Classes
from pcn_deploy.data.images import ImageSource
from pcn_deploy.data.processes import current
from pcn_deploy.data.transform import drawn_images
from pcn_deploy.errors import DataError
from pcn_deploy.proof.budget import check_count
from pcn_deploy.verbs.options import CompileOptions

CalibrationImages = str | Path | ArraysLike | ImageSource

HELD_OUT = 270
"""Most calibration images that are held out: the fewest that prove a drop within 1.0 points if none of them is lost."""

HELD_OUT_OF = 5
"""One of so many labelled images is held out where all of them would calibrate."""

LEAST_CALIBRATION = 64
"""With fewer images left to calibrate, none is held out."""

_COUNTED = re.compile(r"^\d+ of \d+ (?=images looked at)")
"""The counts at the beginning of a note."""

NO_IMAGES = (
    "INT8 and FP8 need calibration images: without them the ranges would be guesses. "
    "Give --calibration DIR or FILE.npz with a few hundred images like those the network will see."
)


@dataclass(frozen=True, kw_only=True)
class BuildImages:
    """The images of a build.

    Attributes:
        calibrating: Those that calibrate, if any.
        judging: Those that judge the accuracy, as was asked for.
        held_out: Labelled calibration images that do not calibrate, so that they may judge it.
        unseen: Those of `judging` and `held_out` that did not calibrate.
    """

    calibrating: ImageSource | None
    judging: ImageSource | None
    held_out: ImageSource | None
    unseen: ImageSource | None

    @property
    def shown(self) -> ImageSource | None:
        """Where the golden set comes from."""
        return self.unseen or self.calibrating

    @property
    def notes(self) -> list[str]:
        """What the user should know of them; what holds for both alike is said of the calibration images alone."""
        notes: dict[str, str] = {}
        for source in filter(None, (self.calibrating, self.judging)):
            for note in source.notes:
                notes.setdefault(_COUNTED.sub("", note), note)
        return list(notes.values())


def as_source(images: CalibrationImages, options: CompileOptions, limit: int | None = None) -> ImageSource:
    """Images of any kind as a source; at most `limit` of them, where they are no source yet.

    Raises:
        DataError: If images are unusable.
        OptionError: If a source has another transform than the options.
    """
    if isinstance(images, ImageSource):
        images.check_transform(options.transform, "the options")
        return images
    return ImageSource(
        images, options.transform, limit=limit, max_unreadable=options.max_unreadable, classes=options.classes
    )


def repeatable(images: CalibrationImages | None) -> CalibrationImages | None:
    """Images that can be gone through twice: what a generator yields, in a list.

    Raises:
        DataError: If it does not end.
    """
    return all_of(images) if isinstance(images, Iterator) else images


def open_source(calibration: CalibrationImages | None, options: CompileOptions) -> ImageSource | None:
    """The calibration images, if there are any.

    Raises:
        DataError: If INT8 is asked for without images, or images are unusable.
    """
    if calibration is not None:
        return as_source(calibration, options, options.calibration_images)
    if options.quantizes and options.recipe is None:
        raise DataError(NO_IMAGES)
    return None


def open_sources(
    calibration: CalibrationImages | None, evaluation: CalibrationImages | None, options: CompileOptions
) -> tuple[ImageSource | None, ImageSource | None]:
    """The calibration images, if there are any, and labelled ones held out from them to judge the accuracy.

    None are held out where others judge it, or with a budget all of them.

    Raises:
        DataError: As `open_source` and `hold_out`.
    """
    if calibration is None:
        return open_source(calibration, options), None
    return hold_out(calibration, options, judged=evaluation is not None or options.max_drop is not None)


def hold_out(
    calibration: CalibrationImages, options: CompileOptions, *, judged: bool
) -> tuple[ImageSource, ImageSource | None]:
    """The calibration images, and labelled ones held out from them, unless the accuracy is judged otherwise.

    Where more are labelled than calibrate, the others are held out; where all would calibrate, one of `HELD_OUT_OF` is.
    Where that would leave too few to calibrate, none is. Each class has its share of both, whatever the order. A
    calibration cache that was made with images held out serves where none need be, with the images it was made with.

    Raises:
        DataError: If images are unusable, or the cache was made with those that are to judge.
        OptionError: As `as_source`.
    """
    cache = options.calibration_cache if options.quantizes else None
    if judged and cache is None:
        return as_source(calibration, options, options.calibration_images), None
    streamed = not isinstance(calibration, ImageSource) and is_stream(calibration)
    every = as_source(calibration, options, options.calibration_images + HELD_OUT if streamed else None)
    # who gives a source has chosen how many
    limit = len(every) if isinstance(calibration, ImageSource) else options.calibration_images
    whole = every.spread(limit)
    chosen, others = _split(every, whole)
    if len(others) == 0:
        return every.select(whole), None
    kept = _images_kept(Path(cache)) if cache else None
    if judged:
        return every.select(chosen if kept == len(chosen) else whole), None
    if kept == len(whole) != len(chosen):
        msg = (
            f"{cache} was made with all {kept} calibration images; without --data and --max-drop {len(others)} of them "
            "are held out to judge the accuracy, which images that calibrate cannot. Give --data, or another cache."
        )
        raise DataError(msg)
    held_out = every.select(others)
    return every.select(chosen), held_out.select(held_out.spread(HELD_OUT))


def _split(every: ImageSource, whole: Indices) -> tuple[Indices, Indices]:
    """Indices of those that calibrate and of the others, which may judge; `whole` would calibrate if none were to."""
    everything = np.arange(len(every))
    chosen, others = whole, np.setdiff1d(everything, whole)
    if len(others) == 0:
        others = every.spread(len(every) // HELD_OUT_OF)
        chosen = np.setdiff1d(everything, others)
    if not every.has_labels or len(chosen) < min(len(whole), LEAST_CALIBRATION):
        return whole, everything[:0]
    return chosen, others


def check_cache(cache: str | Path) -> None:
    """Refuse a calibration cache that can be neither read nor written.

    Raises:
        DataError: If it is malformed or cannot be read.
        OutputError: If it could not be written.
        BundleError: If it is a bundle that has no calibration.
    """
    _images_kept(Path(cache))


def _images_kept(cache: Path) -> int | None:
    """Number of images a calibration cache was made with, unreadable ones included; None if there is none yet."""
    text = current().gather(read_calibration(cache) if current().first else b"")[0]
    if not text:
        return None
    kept = from_json(text, str(cache))
    return kept.images + kept.unreadable


def open_evaluation(
    evaluation: CalibrationImages | None, calibration: CalibrationImages | None, options: CompileOptions
) -> ImageSource | None:
    """The images that judge the accuracy: those given for it, or with a budget asked for all calibration images.

    Raises:
        DataError: If images are unusable, or there are none to prove a budget that was asked for.
    """
    if evaluation is None and options.max_drop is not None:
        evaluation = calibration
        if evaluation is None:
            msg = f"--max-drop {options.max_drop} must be proven on images: give --data DIR or FILE.npz."
            raise DataError(msg)
    return None if evaluation is None else as_source(evaluation, options)


def open_images(
    calibration: CalibrationImages | None, evaluation: CalibrationImages | None, options: CompileOptions
) -> BuildImages:
    """Open all images, and find out whether they can prove what was asked for.

    Raises:
        DataError: As the functions above; if the calibration cache cannot be read, or a folder of `evaluation` is none
            of the classes given.
        OutputError: If the calibration cache could not be written.
    """
    if options.calibration_cache and options.quantizes and calibration is not None:
        check_cache(options.calibration_cache)
    if options.max_drop is not None and evaluation is None:
        calibration = repeatable(calibration)  # it calibrates and judges
    calibrating, held_out = open_sources(calibration, evaluation, options)
    judging = open_evaluation(evaluation, calibration, options)
    if judging is not None:
        judging.check_folders()
    if judging is not None and options.max_drop is not None:
        check_count(len(judging), options.max_drop)
    unseen = held_out if evaluation is None else judging
    return BuildImages(calibrating=calibrating, judging=judging, held_out=held_out, unseen=unseen)


def check_classes(
    calibrating: ImageSource | None,
    judging: ImageSource | None,
    options: CompileOptions,
    outputs: int,
    told: Sequence[str] = (),
) -> None:
    """Refuse classes that cannot be those of the network, before the images that judge are read.

    Args:
        calibrating: Images that calibrate: their folders tell what the classes are called, where they are as many.
        judging: Images that were given to judge; where they have labels, those must be of the network.
        options: What is built.
        outputs: Number of classes of the network; 0 where it has none.
        told: What the checkpoint calls them, if it does.

    Raises:
        DataError: If the file of the classes names more or fewer, or the folders of the images are more or fewer.
    """
    if not outputs:
        return
    if isinstance(options.classes, Classes) and (fault := options.classes.fault(outputs)):
        msg = f"{fault} {REMEDY}"
        raise DataError(msg)
    if judging is None or not judging.has_labels:
        return
    folders = calibrating.folders if calibrating else ()
    known = next((names for names in (told, folders) if len(names) == outputs), ())
    judging.check_classes(outputs, known)


def synthetic_source(options: CompileOptions) -> ImageSource:
    """As many synthetic images as would calibrate: what stands in for images where the weights are random too."""
    return ImageSource([synthetic_images(options.calibration_images, options)], options.transform, name=NOISE)


def synthetic_images(count: int, options: CompileOptions) -> npt.NDArray[np.float32]:
    """Standard normal images `(count, C, H, W)`, float32: what is compared where the user gives no images."""
    shape = (count, *options.transform.shape)
    return np.random.default_rng(options.seed).standard_normal(shape, dtype=np.float32)


def real_images(options: CompileOptions, source: ImageSource | None) -> dict[str, npt.NDArray[np.float32]]:
    """Those of the golden set, `(C, H, W)`, by name, that of a file within its folder; noise where there are none."""
    count = options.golden_images
    if source is None:
        return {f"noise {index}": image for index, image in enumerate(synthetic_images(count, options))}
    root = f"{source.name}{os.sep}"
    return {sample.name.removeprefix(root): sample.image for sample in source.subset(count)}


def two_images(options: CompileOptions, source: ImageSource | None) -> npt.NDArray[np.float32]:
    """Two different images, of those that calibrate or drawn: noise is far from any image to a trained network."""
    if source is not None:
        images: npt.NDArray[np.float32] = next(source.subset(2).batches(2))[0]
        if len(images) == 2 and not np.array_equal(images[0], images[1]):
            return images
    return drawn_images(2, options.transform, options.seed)
