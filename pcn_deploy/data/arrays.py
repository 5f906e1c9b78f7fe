"""Images that are in memory already: arrays, tensors, pictures, batches with labels, what yields them. No torch."""

from __future__ import annotations

import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from pcn_deploy.data.image_files import about_sizes
from pcn_deploy.data.sampling import Reservoir, spread, surveyed
from pcn_deploy.data.transform import FAR, Transform
from pcn_deploy.errors import DataError


class DataSet(Protocol):
    """A data set as torch's map-style ones: its images by index."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


ArraysLike: TypeAlias = Iterable[Any] | Callable[[], Iterable[Any]] | DataSet
"""Arrays, tensors or pictures, single or in batches, alone or with labels; a function that returns or yields them; a
data set with a length."""

MOST_KEPT = 100_000
"""Images of a stream that are all kept in memory; more are taken from a folder."""

MOST_SEEN = 1_000_000
"""Images of a stream of which some are kept: each of them is looked at, so it must end."""

_IMAGE_KEYS = ("images", "image", "pixel_values", "img", "inputs", "input", "x")
_LABEL_KEYS = ("labels", "label", "targets", "target", "y")


@dataclass(frozen=True)
class ArrayImage:
    """One image in memory, uint8 `(H, W, C)`, float32 `(C, H, W)` or a picture of Pillow, and its class if known."""

    pixels: Any
    name: str
    label: int | None
    may_fail = False

    def read(self, transform: Transform) -> npt.NDArray[np.float32]:
        """Transform what are pixels; floats are taken to be transformed."""
        try:
            if not isinstance(self.pixels, np.ndarray):
                return transform(self.pixels)
            if self.pixels.dtype == np.uint8:
                return transform.of_array(self.pixels)
        except DataError as error:
            msg = f"{self.name} {error}"
            raise DataError(msg) from error
        return np.ascontiguousarray(self.pixels, dtype=np.float32)


def is_stream(source: Any) -> bool:
    """Whether images come one after the other and need not all be in memory, as of a loader, a function, a data set."""
    return not isinstance(source, str | Path | list | tuple | np.ndarray) and not hasattr(source, "shape")


def open_arrays(source: ArraysLike, transform: Transform, limit: int | None) -> list[ArrayImage]:
    """Take images out of whatever holds or yields them.

    Args:
        source: Where they come from; a generator is used up.
        transform: Tells the number of channels, by which the axes of pixels are recognised.
        limit: Of a stream, keep no more than twice as many, whichever they are; more of them need not fit into memory.

    Raises:
        DataError: If something in it is no image, or a stream does not end.
    """
    streamed = is_stream(source)
    size = 2 * limit if limit is not None and streamed else None
    kept: Reservoir[ArrayImage] = Reservoir(size)
    for element in _elements(source, limit):
        for image in _images(element, transform, "array"):
            place = kept.place()
            if streamed:
                _check_end(kept.seen, kept_all=size is None)
            if place is None:
                continue
            pixels = image.pixels
            if size is not None and kept.seen > size and isinstance(pixels, np.ndarray):
                pixels = pixels.copy()  # a view would keep all of its batch in memory
            kept.put(place, replace(image, pixels=pixels, name=f"array[{kept.seen - 1}]"))
    return kept.items()


def all_of(images: Iterator[Any]) -> list[Any]:
    """What an iterator gives, to be gone through twice.

    Raises:
        DataError: If it does not end.
    """
    kept: list[Any] = []
    for image in images:
        kept.append(image)
        _check_end(len(kept), kept_all=True)
    return kept


def _check_end(seen: int, *, kept_all: bool) -> None:
    """Refuse a stream that goes on and on.

    Raises:
        DataError: If it has given more than `MOST_KEPT` images, all of which are kept, or more than `MOST_SEEN`.
    """
    if seen > (MOST_KEPT if kept_all else MOST_SEEN):
        msg = (
            f"The images have not ended after {seen - 1:,}. Give something that ends, such as "
            "itertools.islice(images, 5000), or a folder."
        )
        raise DataError(msg)


def survey_arrays(items: Sequence[ArrayImage], transform: Transform) -> list[str]:
    """What a user should know of images in memory: of pixels that they have another size, of floats their range."""
    some = [item.pixels for item in surveyed(items)]
    floats = [image for image in some if getattr(image, "dtype", None) == np.float32 and image.size]
    sizes = Counter(
        (image.shape[1], image.shape[0]) if isinstance(image, np.ndarray) else image.size
        for image in some
        if getattr(image, "dtype", None) != np.float32
    )
    return about_sizes(sizes, transform) + (_about_range(floats, transform) if floats else [])


def _about_range(floats: list[npt.NDArray[np.float32]], transform: Transform) -> list[str]:
    """Whether floats look as if nobody had normalised them."""
    low, high = min(float(image.min()) for image in floats), max(float(image.max()) for image in floats)
    black, white = transform.range
    plain = low >= 0 and high <= 1 and (black, white) != (0.0, 1.0)
    if not plain and max(-low, high) <= FAR * max(-black, white):
        return []
    return [
        f"the floats looked at run from {low:.3g} to {high:.3g}, normalised images from {black:.3g} to {white:.3g}. "
        "Floats are taken as they are: normalise them first, or give uint8 pixels."
    ]


def open_npz(path: Path, transform: Transform) -> list[ArrayImage]:
    """The array `images` of an archive, or its first, with `labels` if it has them.

    Raises:
        DataError: If it cannot be read, or labels are not one whole number per image.
    """
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
    items = _images((images, labels), transform, str(path))
    return [replace(item, name=f"{path}[{index}]") for index, item in enumerate(items)]


def _elements(source: Any, limit: int | None) -> Iterator[Any]:
    """What a source holds or yields, one after the other."""
    if isinstance(source, Mapping) or _is_labelled_batch(source):
        yield source
    elif hasattr(source, "__iter__"):
        yield from source
    elif hasattr(source, "__getitem__") and hasattr(source, "__len__"):  # a data set of torch: it may have no end
        count = len(source)
        yield from (source[int(index)] for index in spread(count, limit or count))
    elif callable(source):
        made = source()
        yield from made if hasattr(made, "__iter__") and not hasattr(made, "shape") else [made]
    else:
        msg = (
            f"Images were given as {type(source).__name__}. Expected a folder, an .npz file, arrays or tensors, "
            "something that yields them (a DataLoader, a generator, a function), or a data set with a length."
        )
        raise DataError(msg)


def _is_labelled_batch(pair: Any) -> bool:
    """Whether a pair is one batch with its labels, and not two batches."""
    return isinstance(pair, tuple) and len(pair) == 2 and _axes(pair[0]) >= 3 and _axes(pair[1]) <= 1


def _images(element: Any, transform: Transform, origin: str) -> Iterator[ArrayImage]:
    """The images of one element of a source, with their labels."""
    images, labels = _split(element)
    if isinstance(images, list | tuple):
        for one in images:
            yield from _images(one, transform, origin)
        return
    if hasattr(images, "getexif"):  # a picture of Pillow
        yield ArrayImage(images, origin, _label(labels, 0, 1))
        return
    array = _plain(images)
    pixels = array.dtype == np.uint8
    if not pixels and not np.issubdtype(array.dtype, np.floating):
        msg = (
            f"{origin} holds {array.dtype} of shape {array.shape}. Expected uint8 images (N, H, W, C), "
            f"or normalised float32 (N, C, H, W) with (C, H, W) = {transform.shape}."
        )
        raise DataError(msg)
    batch = array if array.ndim == 4 else array[None]
    if pixels and batch.ndim == 4:
        batch = _channels_last(batch, len(transform.mean), first=hasattr(images, "detach"))
    if batch.ndim != 4 or (pixels and batch.shape[-1] not in (1, 3, len(transform.mean))):
        msg = (
            f"{origin} has shape {array.shape}; expected (N, H, W, C) of uint8, or (N, C, H, W) of float32, for a "
            f"network of {len(transform.mean)} channels. Set --channels, or give a mean and std for each channel."
        )
        raise DataError(msg)
    with np.errstate(over="ignore"):  # infinity is refused when it is read
        batch = batch if pixels else batch.astype(np.float32, copy=False)
    for index, image in enumerate(batch):
        yield ArrayImage(image, origin, _label(labels, index, len(batch)))


def _split(element: Any) -> tuple[Any, Any]:
    """Image or images, and labels or None, of what data sets and loaders yield."""
    if isinstance(element, Mapping):
        image = next((key for key in _IMAGE_KEYS if key in element), None)
        if image is None:
            msg = (
                f"A batch has the keys {', '.join(map(repr, element))}. Expected its images under 'image' or 'images'."
            )
            raise DataError(msg)
        return element[image], next((element[key] for key in _LABEL_KEYS if key in element), None)
    if isinstance(element, list | tuple) and element:
        first, *others = element
        if any(_axes(one) == _axes(first) for one in others):
            return list(element), None  # several images
        return first, others[0] if others else None
    return element, None


def _axes(value: Any) -> int:
    """Number of axes; of a picture as of an array of its pixels."""
    return 3 if hasattr(value, "getexif") else int(value.ndim) if hasattr(value, "ndim") else np.ndim(value)


def _plain(value: Any) -> npt.NDArray[Any]:
    """As an array; tensors of any device and type, with or without gradients."""
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        value = value.float().numpy() if value.is_floating_point() else value.numpy()
    return np.asarray(value)


def _label(labels: Any, index: int, count: int) -> int | None:
    """The class of one image of a batch; None if there is none, or what is there is no whole number."""
    if labels is None:
        return None
    numbers = _plain(labels).reshape(-1)
    whole = np.issubdtype(numbers.dtype, np.integer) and len(numbers) == count
    return int(numbers[index]) if whole else None


def _channels_last(batch: npt.NDArray[Any], channels: int, *, first: bool) -> npt.NDArray[Any]:
    """Pixels as `(N, H, W, C)`; where both ends could be channels, tensors have them first and arrays last."""
    possible = (channels, *((1, 3) if channels in (1, 3) else ()))
    ends = batch.shape[1] in possible, batch.shape[3] in possible
    return np.moveaxis(batch, 1, 3) if ends[0] and (first or not ends[1]) else batch
