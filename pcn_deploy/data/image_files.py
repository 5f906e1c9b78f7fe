"""Image files: which ones a folder holds, how one is read, and what a user should know of them before a run."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pcn_deploy.data.classes import Classes, by_number, class_folders, first_of
from pcn_deploy.data.pixels import KINDS, is_turned
from pcn_deploy.data.sampling import surveyed
from pcn_deploy.data.transform import Transform
from pcn_deploy.errors import DataError, DependencyError

EXTENSIONS = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm"})


@dataclass(frozen=True)
class ImageFile:
    """One file, and its class where that is known."""

    path: Path
    name: str
    label: int | None
    may_fail = True

    def read(self, transform: Transform) -> npt.NDArray[np.float32]:
        """As `read_image`."""
        return read_image(self.path, transform)


@dataclass(frozen=True, kw_only=True)
class Folder:
    """What a folder of images holds.

    Attributes:
        files: Its image files, sorted by path.
        folders: Its class folders in the order of their classes; empty where their classes were given, or are none.
        notes: What the user should know of the classes.
        fault: Why the folders cannot be the classes that were given.
        broken: Names of links beside the folders that lead nowhere: a class may be behind each.
    """

    files: list[ImageFile]
    folders: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    fault: str = ""
    broken: tuple[str, ...] = ()


def read_image(path: Path, transform: Transform) -> npt.NDArray[np.float32]:
    """Read and transform one image file.

    Returns:
        float32 `(C, H, W)`.

    Raises:
        DataError: If it cannot be read as an image, or nothing says how bright its values are.
        DependencyError: If Pillow is missing.
    """
    try:
        from PIL import Image, UnidentifiedImageError
    except ModuleNotFoundError as error:
        raise DependencyError.for_extra(error.name or "Pillow", "runtime", "reading images", ("pillow",)) from error
    try:
        with Image.open(path) as image:
            return transform(image)
    except DataError as error:
        msg = f"{path} {error}"
        raise DataError(msg) from error
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        msg = f"{path} cannot be read as an image: {error}"
        raise DataError(msg) from error


def open_folder(root: Path, classes: Classes | None) -> Folder:
    """Find the images under a folder; links are followed, hidden files and folders are not looked at.

    Args:
        root: The folder. Where all its images lie in sub-folders, those are their classes.
        classes: What each sub-folder stands for; by default the rule of `classes.py`.
    """
    paths = sorted(_walk(root))
    beside = sum(path.parent == root for path in paths)
    if not paths or beside == len(paths):
        return Folder(files=[ImageFile(path, str(path), None) for path in paths])
    folders = class_folders(root)
    notes = []
    if beside:
        notes.append(
            f"{beside} of the {len(paths)} images lie beside the folders of {root}, so no image has a label. Move them "
            "into a folder, or away, if the folders are classes."
        )
        return Folder(files=[ImageFile(path, str(path), None) for path in paths], notes=tuple(notes))
    broken = _broken_links(root)
    if broken:
        notes.append(f"{first_of(broken)} in {root} links to something that is not there, so it is no class.")
    held = Counter(path.relative_to(root).parts[0] for path in paths)
    fault = classes.unknown(held) if classes else ""
    index = classes.index if classes else {name: number for number, name in enumerate(folders)}
    empty = [name for name in folders if name not in held]
    if empty and not classes:
        notes.append(
            f"{len(empty)} of the {len(folders)} class folders of {root} hold no image of a known kind "
            f"({first_of(empty)}); they are counted as classes all the same."
        )
    if by_number(folders) and not classes:
        numbers = first_of([str(number) for number in range(len(folders))])
        notes.append(
            f"the class folders of {root} are numbers and are taken in the order of text, as torchvision's ImageFolder "
            f"does: {first_of(folders)} are the classes {numbers}. For a network trained in the order of the numbers, "
            "as timm takes them, give --classes FILE with one of them on each line, in that order."
        )
    files = [ImageFile(path, str(path), index.get(path.relative_to(root).parts[0])) for path in paths]
    return Folder(
        files=files, folders=() if classes else folders, notes=tuple(notes), fault=fault, broken=tuple(broken)
    )


def _broken_links(root: Path) -> list[str]:
    """Names of the links in a folder that lead nowhere, those of images apart."""
    with os.scandir(root) as entries:
        return sorted(
            entry.name
            for entry in entries
            if entry.is_symlink() and not _is_image(entry.name) and not Path(entry.path).exists()
        )


def _walk(folder: Path, above: frozenset[str] = frozenset()) -> Iterator[Path]:
    """The images under a folder; a link back to a folder above it is not followed, it would never end."""
    real = os.path.realpath(folder)
    if real in above:
        return
    try:
        with os.scandir(folder) as entries:
            shown = [entry for entry in entries if not entry.name.startswith(".")]
    except OSError:  # it may not be looked into: it holds no image for us
        return
    for entry in shown:
        if entry.is_dir():
            yield from _walk(folder / entry.name, above | {real})
        elif _is_image(entry.name):
            yield folder / entry.name


def _is_image(name: str) -> bool:
    return not name.startswith(".") and Path(name).suffix.lower() in EXTENSIONS


def survey(files: Sequence[ImageFile], transform: Transform, *, sizes_too: bool = True) -> list[str]:
    """What a user should know of images before they are read, by the headers of some of them."""
    from PIL import Image

    sizes: Counter[tuple[int, int]] = Counter()
    kinds: Counter[str] = Counter()
    for file in surveyed(files):
        try:
            with Image.open(file.path) as image:
                turned = is_turned(image)
                kinds.update(name for name, kind in KINDS.items() if kind.holds(image, transform))
                upright = image.size[::-1] if turned and transform.exif == "apply" else image.size
                sizes[upright] += 1
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
            continue
    count = sum(sizes.values())
    notes = [f"{kinds[name]} of {count} images looked at {kind.words}" for name, kind in KINDS.items() if kinds[name]]
    return notes + (about_sizes(sizes, transform) if sizes_too else [])


def about_sizes(sizes: Counter[tuple[int, int]], transform: Transform) -> list[str]:
    """Whether most images are made larger, or most are of one other size and cut.

    Args:
        sizes: Number of images of each width and height.
        transform: What they go through.
    """
    count = sum(sizes.values())
    if not count or transform.crop_mode == "border":  # all of each image is in it
        return []
    size, most = sizes.most_common(1)[0]
    scaled, (height, width) = transform.scaled(size), transform.resolution
    enlarged = sum(number for one, number in sizes.items() if transform.scaled(one)[0] > one[0])
    if 2 * most > count and scaled != size:
        what = (
            f"{most} of {count} images looked at are {size[0]}x{size[1]} (width x height): they become "
            f"{scaled[0]}x{scaled[1]}"
        )
        as_they_are = f"--resolution {size[1]}x{size[0]} --crop-pct 1 takes such images as they are"
        if scaled == (width, height):
            return [f"{what}. If the network was trained on others, {as_they_are}."]
        kept = 100 * width * height / (scaled[0] * scaled[1])
        what += f", of which the middle {width}x{height} is kept ({kept:.0f} % of the area)."
    elif 2 * enlarged > count:
        what = f"{enlarged} of {count} images looked at are smaller than {width}x{height} needs, and are enlarged."
        as_they_are = "--resolution HxW is the size it takes"
    else:
        return []
    return [
        f"{what} Give what the network was trained with: {as_they_are}, --crop-pct 1 cuts less, --crop-mode squash "
        "keeps no proportions."
    ]
