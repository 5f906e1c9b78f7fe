"""Where images come from: a folder, an `.npz` file, or any iterable of arrays. No torch.

Every source yields transformed float32 images `(C, H, W)` one by one, with the class where it is known, so memory
does not depend on how many there are.
"""

from __future__ import annotations

import copy
import hashlib
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pcn_deploy.calibration.transform import Transform
from pcn_deploy.errors import DataError, DependencyError

ImageArray = npt.NDArray[np.float32]

EXTENSIONS = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm"})
MAX_UNREADABLE_SHARE = 0.05
"""Above this share of unreadable images a run stops: the set is then not what the user believes it is."""

_SHA256_BYTES = 32


@dataclass(frozen=True)
class Sample:
    """One transformed image `(C, H, W)`, float32, and its class if known."""

    image: ImageArray
    label: int | None


class ImageSource:
    """A finite, repeatable stream of transformed images.

    Args:
        source: Folder of images (sub-folders are classes), `.npz` file (`images`, optionally `labels`), or an
            iterable of float32 arrays `(C, H, W)` or `(N, C, H, W)`, already normalised.
        transform: Applied to image files and to uint8 arrays `(N, H, W, C)`; float arrays must fit its shape.
        limit: Use at most so many images, spread evenly over the source; all of them if None.
        max_unreadable: Share of unreadable image files above which the run stops.
        name: What reports call the images; by default the path, or that they are arrays.

    Attributes:
        unreadable: Names of the image files that could not be read so far.
        fingerprints: SHA-256 of each transformed image of the last pass, uint8 `(len(self), 32)`; zero where it was
            not read.
        digest: SHA-256 over the fingerprints of the last complete pass, in order, as hexadecimal text.

    Raises:
        DataError: If there are no images, or arrays of an unusable kind.
    """

    def __init__(
        self,
        source: str | Path | Iterable[npt.NDArray[np.float32]],
        transform: Transform,
        *,
        limit: int | None = None,
        max_unreadable: float = MAX_UNREADABLE_SHARE,
        name: str = "",
    ) -> None:
        self.transform = transform
        self.max_unreadable = max_unreadable
        self.unreadable: list[str] = []
        self.fingerprints = np.zeros((0, _SHA256_BYTES), np.uint8)
        self.digest = ""
        self._items: Sequence[_File | _Array]
        found, self._items = _open(source, transform)
        self.name = name or found
        self.has_labels = bool(self._items) and all(item.label is not None for item in self._items)
        if not self._items:
            msg = f"No images in {self.name}. Expected files such as .png or .jpg, or an .npz with 'images'."
            raise DataError(msg)
        if limit is not None and limit < 1:
            msg = f"{limit} images were asked for; at least 1 is needed."
            raise DataError(msg)
        self._spread(limit or len(self._items))

    def _spread(self, count: int) -> None:
        """Keep `count` items at even distances."""
        if count < len(self._items):
            chosen = np.linspace(0, len(self._items) - 1, count).round().astype(int)
            self._items = [self._items[index] for index in chosen]

    def select(self, indices: Iterable[int]) -> ImageSource:
        """Some of the images, in the order of `indices`."""
        part, items = copy.copy(self), self._items
        part._items = [items[index] for index in indices]
        return part

    def readable(self) -> ImageSource:
        """The images that the last complete pass could read."""
        unreadable = set(self.unreadable)
        return self.select(index for index, item in enumerate(self._items) if item.name not in unreadable)

    def subset(self, count: int) -> ImageSource:
        """At most `count` of the images, spread evenly; unreadable ones are skipped, as they were counted before."""
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
    ) -> Iterator[tuple[ImageArray, npt.NDArray[np.int64] | None]]:
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
            msg = f"None of the {len(self._items)} images in {self.name} can be read."
            raise DataError(msg)
        self.digest = hashlib.sha256(fingerprints[read].tobytes()).hexdigest()

    def _begin(self) -> None:
        self.unreadable = []
        self.fingerprints = np.zeros((len(self._items), _SHA256_BYTES), np.uint8)

    def _read(self, indices: range) -> Iterator[Sample]:
        for index in indices:
            item = self._items[index]
            image = item.read(self.transform)
            if image is None:
                self.unreadable.append(item.name)
                self._check_unreadable()
                continue
            self._check(image, item.name)
            self.fingerprints[index] = np.frombuffer(hashlib.sha256(image.data).digest(), np.uint8)
            yield Sample(image, item.label)

    def _stack(self, group: list[Sample]) -> tuple[ImageArray, npt.NDArray[np.int64] | None]:
        images = np.stack([sample.image for sample in group])
        labels = np.array([sample.label for sample in group], np.int64) if self.has_labels else None
        return images, labels

    def _check_unreadable(self) -> None:
        if len(self.unreadable) > self.max_unreadable * len(self._items):
            msg = (
                f"{len(self.unreadable)} of {len(self._items)} images in {self.name} cannot be read so far, such as "
                f"{self.unreadable[0]}; the run stops above {self.max_unreadable:.0%}. Mend or remove them."
            )
            raise DataError(msg)

    def _check(self, image: ImageArray, name: str) -> None:
        if image.shape != self.transform.shape:
            msg = f"{name} has shape {image.shape}; the network takes {self.transform.shape}. Set --resolution HxW."
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


def read_image(path: Path, transform: Transform) -> ImageArray:
    """Read and transform one image file.

    Returns:
        float32 `(C, H, W)`.

    Raises:
        DataError: If it cannot be read as an image.
        DependencyError: If Pillow is missing.
    """
    try:
        from PIL import Image, UnidentifiedImageError
    except ModuleNotFoundError as error:
        raise DependencyError.for_extra(error.name or "Pillow", "runtime", "reading images") from error
    try:
        with Image.open(path) as image:
            return transform(image)
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        msg = f"{path} cannot be read as an image: {error}"
        raise DataError(msg) from error


@dataclass(frozen=True)
class _File:
    path: Path
    name: str
    label: int | None

    def read(self, transform: Transform) -> ImageArray | None:
        try:
            return read_image(self.path, transform)
        except DataError:
            return None


@dataclass(frozen=True)
class _Array:
    array: npt.NDArray[np.generic]
    name: str
    label: int | None

    def read(self, transform: Transform) -> ImageArray | None:
        if self.array.dtype == np.uint8:
            from PIL import Image

            pixels = np.asarray(self.array)
            return transform(Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels))
        return np.ascontiguousarray(self.array, dtype=np.float32)


def _open(
    source: str | Path | Iterable[npt.NDArray[np.float32]], transform: Transform
) -> tuple[str, list[_File] | list[_Array]]:
    if not isinstance(source, str | Path):
        return "the given arrays", _from_arrays(source, transform)
    path = Path(source)
    if path.is_dir():
        return str(path), _from_folder(path)
    if path.suffix == ".npz" and path.is_file():
        return str(path), _from_npz(path, transform)
    msg = f"{str(path)!r} is neither a folder of images nor an .npz file. Check the path."
    raise DataError(msg)


def _from_folder(root: Path) -> list[_File]:
    files = sorted(path for path in root.rglob("*") if path.suffix.lower() in EXTENSIONS and path.is_file())
    folders = sorted({path.relative_to(root).parts[0] for path in files if path.parent != root})
    labelled = bool(folders) and all(path.parent != root for path in files)
    if labelled and all(name.isdecimal() for name in folders):
        classes = {name: int(name) for name in folders}
    else:
        classes = {name: index for index, name in enumerate(folders)}
    return [_File(path, str(path), classes[path.relative_to(root).parts[0]] if labelled else None) for path in files]


def _from_npz(path: Path, transform: Transform) -> list[_Array]:
    try:
        with np.load(path, allow_pickle=False) as archive:
            names = archive.files
            images = archive["images" if "images" in names else names[0]] if names else np.zeros(0)
            labels = archive["labels"] if "labels" in names else None
    except (OSError, ValueError, zipfile.BadZipFile, EOFError) as error:
        msg = f"{path} is not a readable .npz file ({error}). Write it with numpy.savez(path, images=...)."
        raise DataError(msg) from error
    if labels is not None and (labels.shape != images.shape[:1] or not np.issubdtype(labels.dtype, np.integer)):
        msg = f"{path} holds {len(images)} images but labels {labels.dtype} of shape {labels.shape}; one integer each."
        raise DataError(msg)
    arrays = _from_arrays([images], transform, str(path))
    if labels is None:
        return arrays
    return [_Array(item.array, item.name, int(label)) for item, label in zip(arrays, labels, strict=True)]


def _from_arrays(
    arrays: Iterable[npt.NDArray[np.generic]], transform: Transform, origin: str = "array"
) -> list[_Array]:
    items: list[_Array] = []
    for given in arrays:
        array = np.asarray(given)
        pixels = array.dtype == np.uint8
        if not pixels and not np.issubdtype(array.dtype, np.floating):
            msg = (
                f"{origin} holds {array.dtype} of shape {array.shape}. Expected uint8 images (N, H, W, C), "
                f"or normalised float32 (N, C, H, W) with (C, H, W) = {transform.shape}."
            )
            raise DataError(msg)
        batch = array if array.ndim == 4 else array[None]
        if batch.ndim != 4 or (pixels and batch.shape[-1] not in (1, 3)):
            msg = f"{origin} has shape {array.shape}; expected (N, H, W, C) of uint8, or (N, C, H, W) of float32."
            raise DataError(msg)
        items += [_Array(image, f"{origin}[{len(items) + index}]", None) for index, image in enumerate(batch)]
    return items
