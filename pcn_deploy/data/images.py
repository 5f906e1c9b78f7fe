"""Where images come from: a folder, an `.npz` file, or whatever holds or yields arrays. No torch.

Every source yields transformed float32 images `(C, H, W)` one by one, with the class where it is known, so memory
does not depend on how many there are.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pcn_deploy.aliases import Images
from pcn_deploy.data.arrays import ArrayImage, ArraysLike, open_arrays, open_npz, survey_arrays
from pcn_deploy.data.classes import REMEDY, Classes, ClassesLike, first_of
from pcn_deploy.data.image_files import Folder, ImageFile, open_folder, survey
from pcn_deploy.data.sampling import spread_by_class
from pcn_deploy.data.transform import Transform
from pcn_deploy.errors import DataError, OptionError

MAX_UNREADABLE_SHARE = 0.05
"""Above this share of unreadable images a run stops: the set is then not what the user believes it is."""

_SHA256_BYTES = 32


@dataclass(frozen=True)
class Sample:
    """One transformed image `(C, H, W)`, float32, its class if known, and its name."""

    image: Images
    label: int | None
    name: str = ""


class ImageSource:
    """A finite, repeatable stream of transformed images.

    Args:
        source: Folder of images (sub-folders are classes, see `classes.py`), `.npz` file (`images`, optionally
            `labels`), or whatever holds or yields arrays, tensors or pictures, alone or with labels (`arrays.py`):
            floats `(C, H, W)` or `(N, C, H, W)`, already normalised, or uint8 pixels `(H, W, C)`.
        transform: Applied to image files, pictures and uint8 pixels; float arrays must fit its shape.
        classes: What the sub-folders stand for; by default their place in the order of their names.
        limit: Use at most so many images, from all over it and of each class in proportion; all of them if None.
        max_unreadable: Share of unreadable image files above which the run stops.
        name: What reports call the images; by default the path, or that they are arrays.

    Attributes:
        unreadable: Names of the image files that could not be read so far.
        fingerprints: SHA-256 of each transformed image of the last pass, uint8 `(len(self), 32)`; zero where it was
            not read.
        digest: SHA-256 over the fingerprints of the last complete pass, in order, as hexadecimal text.
        folders: The class folders in the order of their classes, where that order gave the labels.

    Raises:
        DataError: If there are no images, or arrays of an unusable kind.
    """

    def __init__(
        self,
        source: str | Path | ArraysLike,
        transform: Transform,
        *,
        limit: int | None = None,
        max_unreadable: float = MAX_UNREADABLE_SHARE,
        name: str = "",
        classes: ClassesLike | Classes | None = None,
    ) -> None:
        self.transform = transform
        self.max_unreadable = max_unreadable
        self.unreadable: list[str] = []
        self.fingerprints = np.zeros((0, _SHA256_BYTES), np.uint8)
        self.digest = ""
        self._reasons: dict[str, str] = {}
        self._remarks: list[str] = []
        self._items: Sequence[ImageFile | ArrayImage]
        if limit is not None and limit < 1:
            msg = f"{limit} images were asked for; at least 1 is needed."
            raise DataError(msg)
        self._classes = None if classes is None else Classes.of(classes)
        origin, self._items, folder = _open(source, transform, self._classes, limit)
        self.folders, self._class_notes, self._class_fault = folder.folders, folder.notes, folder.fault
        self._broken_links = folder.broken
        self.name = name or origin
        self.has_labels = bool(self._items) and all(item.label is not None for item in self._items)
        if not self._items:
            msg = f"No images in {self.name}. Expected files such as .png or .jpg, or an .npz with 'images'."
            raise DataError(msg)
        self._spread(limit or len(self._items))

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know of the images, by the headers of some files and by what showed in a run."""
        return (*self._survey, *self._remarks)

    def remark(self, note: str) -> None:
        """Add a note, to those of the source too of which these images are a part."""
        if note not in self._remarks:
            self._remarks.append(note)

    @cached_property
    def _survey(self) -> tuple[str, ...]:
        files = [item for item in self._items if isinstance(item, ImageFile)]
        arrays = [item for item in self._items if isinstance(item, ArrayImage)]
        unused: tuple[str, ...] = ()
        if self._classes and not any(isinstance(item, ImageFile) and item.label is not None for item in self._items):
            unused = (f"{self.name} has no class folders, so {self._classes.origin} is not used for it.",)
        return (*unused, *self._class_notes, *survey(files, self.transform), *survey_arrays(arrays, self.transform))

    @property
    def classes_present(self) -> npt.NDArray[np.int64]:
        """The classes of which there are images, sorted; none where images have no labels."""
        return np.unique([item.label for item in self._items if item.label is not None]).astype(np.int64)

    def check_folders(self) -> None:
        """Refuse folders that are none of the classes given; no network is needed to tell.

        Raises:
            DataError: If there are any.
        """
        if self._class_fault:
            msg = f"{self.name}: {self._class_fault} {REMEDY}"
            raise DataError(msg)

    def check_classes(self, outputs: int, known: Sequence[str] = ()) -> None:
        """Refuse labels that cannot be the classes of a network with so many outputs; no image is read.

        Args:
            outputs: Number of its outputs.
            known: What its classes are called, if that is known: then the folders that are none of them are named.

        Raises:
            DataError: If the folders are more or fewer, are not among the classes given, or a label is out of range.
        """
        self.check_folders()
        fault = self._classes.fault(outputs) if self._classes else ""
        labels = self.classes_present
        if self.folders and len(self.folders) != outputs:
            fault = (
                f"{self.name} has {len(self.folders)} class folders ({first_of(self.folders)}); the network "
                f"has {outputs} classes. {self._which_differ(known)}Numbered in the order of their names, some would "
                "have the label of another."
            )
        elif not fault and len(labels) and not 0 <= labels[0] <= labels[-1] < outputs:
            fault = f"Labels run from {labels[0]} to {labels[-1]}; the network has {outputs} classes ({self.name})."
        if fault:
            msg = f"{fault} {REMEDY}"
            raise DataError(msg)

    def _which_differ(self, known: Sequence[str]) -> str:
        """Which folders are no class, and which classes have no folder, in words."""
        extra = [repr(name) for name in self.folders if known and name not in known]
        absent = [repr(name) for name in known if name not in self.folders]
        if len(extra) == len(self.folders):  # the classes go by other names
            extra = absent = []
        words = f"Not among its classes: {first_of(extra)}. " if extra else ""
        words += f"Without a folder: {first_of(absent)}. " if absent else ""
        if self._broken_links:
            words += f"Links that lead nowhere: {first_of([repr(name) for name in self._broken_links])}. "
        return words

    def check_transform(self, expected: Transform, whose: str) -> None:
        """Refuse images that went through another transform than an engine states.

        Raises:
            OptionError: If it is another; what differs is named.
        """
        mine, theirs = self.transform.to_json(), expected.to_json()
        different = [f"{key} {mine[key]} instead of {theirs[key]}" for key in mine if mine[key] != theirs[key]]
        if different:
            msg = (
                f"{self.name} was opened with another transform than that of {whose}: {'; '.join(different)}. Open it "
                "with that transform, or give the folder or the arrays themselves."
            )
            raise OptionError(msg)

    def _spread(self, count: int) -> None:
        """Keep `count` items from all over, of each class in proportion."""
        if count < len(self._items):
            self._items = [self._items[index] for index in self.spread(count)]

    def spread(self, count: int) -> npt.NDArray[np.int64]:
        """Indices of at most `count` of the images, of each class in proportion where all have labels."""
        return spread_by_class([item.label for item in self._items], count)

    def select(self, indices: Iterable[int]) -> ImageSource:
        """Some of the images, in the order of `indices`."""
        part, items = copy.copy(self), self._items
        part._items = [items[index] for index in indices]
        return part

    def without_labels(self) -> ImageSource:
        """The same images, their classes forgotten."""
        part = copy.copy(self)
        part._items = [replace(item, label=None) for item in self._items]
        part.has_labels, part.folders, part._classes, part._class_fault = False, (), None, ""
        part._remarks = []
        return part

    def readable(self) -> ImageSource:
        """The images that the last complete pass could read."""
        unreadable = set(self.unreadable)
        return self.select(index for index, item in enumerate(self._items) if item.name not in unreadable)

    def subset(self, count: int) -> ImageSource:
        """At most `count` of the images, as by `spread`; unreadable ones are skipped, as they were counted before."""
        part = copy.copy(self)
        part.max_unreadable = 1.0
        part._spread(count)
        return part

    def __len__(self) -> int:
        """Number of images, unreadable ones included."""
        return len(self._items)

    def __iter__(self) -> Iterator[Sample]:
        """Read, transform and check one image after the other.

        Raises:
            DataError: If an image has the wrong size or holds NaN or infinity, if none can be read, or if more than
                the allowed share is unreadable.
        """
        self._begin()
        yield from self._read(range(len(self._items)))
        self.complete(self.fingerprints)

    def batches(
        self, size: int, *, part: int = 0, parts: int = 1
    ) -> Iterator[tuple[Images, npt.NDArray[np.int64] | None]]:
        """Batches `(n, C, H, W)`, n at most `size`, with labels `(n,)` where all images have one.

        Where one image would be left over alone, the last two batches share theirs: the arithmetic of a batch of one
        differs from that of others in the last digits, and the outcome would depend on which image is the last.

        Args:
            size: Most images in a batch.
            part: Of several processes that share the images, the number of this one.
            parts: Number of the processes; each takes every `parts`-th batch, and `complete` ends their pass.

        Raises:
            DataError: As by iteration; for one of several processes, if its own images show it.
        """
        self._begin()
        for start, stop in _bounds(len(self._items), size)[part::parts]:
            group = list(self._read(range(start, stop)))
            if group:
                yield self._stack(group)
        if parts == 1:
            self.complete(self.fingerprints)

    def complete(self, fingerprints: npt.NDArray[np.uint8]) -> None:
        """End a pass, perhaps of several processes.

        Args:
            fingerprints: Those of all images, as in the attribute.

        Raises:
            DataError: If none could be read, or more than the allowed share is unreadable.
        """
        self.fingerprints = fingerprints
        read = np.asarray(fingerprints.any(axis=1))
        self.unreadable = [self._items[index].name for index in np.flatnonzero(~read).tolist()]
        self._check_unreadable()
        if not read.any():
            msg = f"None of the {len(self._items)} images in {self.name} can be read. The first: {self._reason()}"
            raise DataError(msg)
        self.digest = hashlib.sha256(fingerprints[read].tobytes()).hexdigest()

    def item_name(self, index: int) -> str:
        """Name of the image with this number."""
        return self._items[index].name

    def name_of(self, image: Images) -> str:
        """Name of an image that this process read in the current pass."""
        digest = np.frombuffer(hashlib.sha256(np.ascontiguousarray(image).data).digest(), np.uint8)
        (indices,) = np.nonzero((self.fingerprints == digest).all(1))
        return self._items[indices[0]].name if len(indices) else self.name

    def _begin(self) -> None:
        self.unreadable = []
        self.fingerprints = np.zeros((len(self._items), _SHA256_BYTES), np.uint8)

    def _read(self, indices: range) -> Iterator[Sample]:
        for index in indices:
            item = self._items[index]
            try:
                image = item.read(self.transform)
            except DataError as error:
                if not item.may_fail:
                    raise
                self._reasons[item.name] = str(error)
                self.unreadable.append(item.name)
                self._check_unreadable()
                continue
            self._check(image, item.name)
            self.fingerprints[index] = np.frombuffer(hashlib.sha256(image.data).digest(), np.uint8)
            yield Sample(image, item.label, item.name)

    def _stack(self, group: list[Sample]) -> tuple[Images, npt.NDArray[np.int64] | None]:
        images = np.stack([sample.image for sample in group])
        labels = np.array([sample.label for sample in group], np.int64) if self.has_labels else None
        return images, labels

    def _check_unreadable(self) -> None:
        if len(self.unreadable) > self.max_unreadable * len(self._items):
            msg = (
                f"{len(self.unreadable)} of {len(self._items)} images in {self.name} cannot be read so far; the run "
                f"stops above {self.max_unreadable:.0%}. Mend or remove them. The first: {self._reason()}"
            )
            raise DataError(msg)

    def _reason(self) -> str:
        """The first image that could not be read, and why where this process read it; a sentence."""
        return self._reasons.get(self.unreadable[0], self.unreadable[0]).rstrip(".") + "."

    def _check(self, image: Images, name: str) -> None:
        if image.shape != self.transform.shape:
            way = "Set --resolution HxW."
            if image.shape[0] != self.transform.shape[0]:
                way = "Set --channels, or give a mean and std for each channel."
            if (image.shape[2], *image.shape[:2]) == self.transform.shape:
                way = "Its last axis seems to be the channels: np.moveaxis(images, -1, -3)."
            msg = f"{name} has shape {image.shape}; the network takes {self.transform.shape}. {way}"
            raise DataError(msg)
        if not np.isfinite(image).all():
            msg = f"{name} holds NaN or infinite values. Remove it, or mend what produced it."
            raise DataError(msg)


def _bounds(count: int, size: int) -> list[tuple[int, int]]:
    """First index and end of each batch."""
    edges = [*range(0, count, size), count]
    if size > 2 and count > size and count % size == 1:
        edges[-2] = count - (size + 1) // 2
    return list(pairwise(edges))


def _open(
    source: str | Path | ArraysLike, transform: Transform, classes: Classes | None, limit: int | None
) -> tuple[str, Sequence[ImageFile | ArrayImage], Folder]:
    if not isinstance(source, str | Path):
        return "the given arrays", open_arrays(source, transform, limit), Folder(files=[])
    path = Path(source)
    check_place(path)
    if path.is_dir():
        folder = open_folder(path, classes)
        return str(path), folder.files, folder
    return str(path), open_npz(path, transform), Folder(files=[])


def check_place(path: Path) -> None:
    """Refuse a path where there can be no images; nothing is read.

    Raises:
        DataError: If it is neither a folder nor an `.npz` file.
    """
    if path.is_dir() or (path.suffix == ".npz" and path.is_file()):
        return
    found = "" if path.exists() else ": there is nothing"
    msg = f"{str(path)!r} is neither a folder of images nor an .npz file{found}. Check the path."
    raise DataError(msg)
