"""Which class a folder of images stands for: the rule of its place among the others, or the names of the classes.

The rule is that of torchvision's ImageFolder, by which most networks of the field got their outputs: the folders in the
order of their names as text, empty ones counted. Hidden ones (`.ipynb_checkpoints`) are no classes.
"""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from pcn_deploy.errors import DataError

ClassesLike: TypeAlias = str | Path | Sequence[str] | Mapping[str, int]
"""A file of `read_classes`, the names of all classes in the order of the outputs, or the output of each name."""

_SYNSET = re.compile(r"(n\d{8})[\s,:]+(\S.*)")
_BARE_SYNSET = re.compile(r"n\d{8}")
_NUMBER_FIRST = re.compile(r"(\d+)\s*[\s:,;]\s*(\S.*)")
_NUMBER_LAST = re.compile(r"(.*\S)\s*[\s:,;]\s*(\d+)")
_SHOWN = 5
"""Names of a list that a message shows."""

_INSIDE = ("class_to_idx", "idx_to_class", "label2id", "id2label", "class_names", "classes", "names", "labels")
"""Where files of JSON and checkpoints keep their classes, such as the `config.json` of transformers."""

_AROUND = (("meta", "dataset_meta"), ("meta",), ("hyper_parameters",), ("config",), ("args",), ())
"""Where a checkpoint keeps those: mmengine, mmcv, Lightning, and scripts of one's own."""

REMEDY = (
    "Say which output each class is: --classes FILE with the name of every class on a line, in the order of the "
    "network's outputs (in Python `classes`). Images without labels are judged by the network's own answers."
)


@dataclass(frozen=True, kw_only=True)
class Classes:
    """The output of a network that each name stands for.

    Attributes:
        index: Output of each name, from 0; several names may mean one output.
        origin: What messages call this.
        count: Number of outputs, where all of them were named; None if only some were.
    """

    index: Mapping[str, int]
    origin: str
    count: int | None

    @classmethod
    def of(cls, classes: ClassesLike | Classes) -> Classes:
        """Classes from what a user gives.

        Raises:
            DataError: If a file cannot be read, or names or numbers are impossible.
        """
        if isinstance(classes, Classes):
            return classes
        if isinstance(classes, str | Path):
            return read_classes(Path(classes))
        if isinstance(classes, Mapping):
            return _numbered(classes.items(), "the list of classes")
        return _in_order([(str(name),) for name in classes], "the list of classes")

    def fault(self, outputs: int) -> str:
        """Why these cannot be the classes of a network with so many outputs; empty if they can."""
        largest = max(self.index.values())
        if self.count is not None and self.count != outputs:
            return f"{self.origin} names {self.count} classes; the network has {outputs}."
        if largest >= outputs:
            return f"{self.origin} numbers classes up to {largest}; those of the network run from 0 to {outputs - 1}."
        return ""

    def unknown(self, folders: Iterable[str]) -> str:
        """Which of the folders are no class, in words; empty if all are."""
        missing = [name for name in folders if name not in self.index]
        if not missing:
            return ""
        close = difflib.get_close_matches(missing[0], self.index, n=1)
        hint = f" (it has {close[0]!r})" if close else f" (it has {first_of(list(map(repr, self.index)))})"
        named = first_of([repr(name) for name in missing])
        if len(missing) == 1:
            return f"The folder {named} is not in {self.origin}{hint}."
        return f"{len(missing)} folders are not in {self.origin}: {named}{hint}."

    def names(self, outputs: int) -> tuple[str, ...]:
        """What to call each of so many outputs; its number where it has no name."""
        by_number: dict[int, list[str]] = {}
        for name, number in self.index.items():
            by_number.setdefault(number, []).append(name)
        return _called(by_number, outputs)


def names_in_checkpoint(content: Any) -> tuple[str, ...]:
    """The names of all outputs, in their order, that a checkpoint holds beside its weights; empty if it has none.

    Args:
        content: What the file holds: names in a list, output to name, or name to output.
    """
    for path in _AROUND:
        place = content
        for key in path:
            place = place.get(key) if isinstance(place, Mapping) else None
        for key, value in place.items() if isinstance(place, Mapping) else ():
            listed = _from_content(value) if isinstance(key, str) and key.lower() in _INSIDE else None
            if listed is not None and listed.complete:
                by_number = {number: aliases for aliases, number in listed.names}
                return _called(by_number, len(by_number))
    return ()


def first_of(names: Sequence[str]) -> str:
    """The first names, with an ellipsis where there are more."""
    return ", ".join(names[:_SHOWN]) + (", …" if len(names) > _SHOWN else "")


def class_folders(root: Path) -> tuple[str, ...]:
    """Names of the folders directly in `root`, in the order of their classes."""
    with os.scandir(root) as entries:
        return tuple(sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith(".")))


def by_number(folders: Sequence[str]) -> list[str]:
    """Folders in the order of their numbers, as timm takes them; an empty list where that is the order of text too."""
    if not folders or not all(name.isdecimal() for name in folders):
        return []
    ordered = sorted(folders, key=lambda name: (int(name), name))
    return [] if ordered == list(folders) else ordered


@dataclass(frozen=True)
class _Listed:
    """What a file says: the names of each output, in any order, and whether it is said of every output."""

    names: list[tuple[tuple[str, ...], int]]
    ordered: bool
    complete: bool


def read_classes(path: Path) -> Classes:
    """Read which output each name means.

    Text, one class on a line: its name, in the order of the outputs; or its output and its name (`3 cat`, `cat,3`). A
    line of ImageNet (`n01440764 tench, Tinca tinca`) is known by its synset and by its words. JSON: a list of names,
    name to output (torchvision's `class_to_idx`), or output to name (`id2label` of transformers, Keras' index).

    Raises:
        DataError: If it cannot be read, or names or outputs are impossible; the message holds what is expected.
    """
    listed = _read(path)
    if listed.ordered:
        return _in_order([aliases for aliases, _ in listed.names], str(path))
    named = [(alias, number) for aliases, number in listed.names for alias in aliases]
    return _numbered(named, str(path), complete=listed.complete)


def read_names(path: Path, outputs: int) -> list[str]:
    """Read what to call each output of a network: the files of `read_classes`, but several outputs may share a name.

    Args:
        path: The file.
        outputs: Number of outputs.

    Returns:
        A name for each output; its number where the file has none for it.

    Raises:
        DataError: As `read_classes`, or if the file names other outputs than those.
    """
    listed = _read(path)
    names: dict[int, list[str]] = {}
    for aliases, number in listed.names:
        _check_number(aliases[0], number, str(path))
        names.setdefault(number, []).extend(aliases)
    every = Classes(
        index={str(number): number for number in names},
        origin=str(path),
        count=max(names, default=0) + 1 if listed.complete else None,
    )
    if fault := every.fault(outputs) if names else f"{path}: no class is named.":
        msg = f"{fault} Expected a name for each output."
        raise DataError(msg)
    return list(_called(names, outputs))


def _called(by_number: Mapping[int, Sequence[str]], outputs: int) -> tuple[str, ...]:
    """What to call each of so many outputs, by its names; its number where it has none."""
    return tuple(_best(by_number.get(number, [str(number)])) for number in range(outputs))


def _best(names: Sequence[str]) -> str:
    """The first of the names that is no bare synset."""
    return next((name for name in names if not _BARE_SYNSET.fullmatch(name)), names[0])


def _read(path: Path) -> _Listed:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        msg = f"The classes {path} cannot be read as text in UTF-8: {error}"
        raise DataError(msg) from error
    if path.suffix.lower() == ".json" or text.lstrip()[:1] in ("{", "["):
        return _from_json(text, path)
    lines = [line.strip() for line in text.rstrip().splitlines()]
    if "" in lines or not lines:
        where = f"line {lines.index('') + 1} is empty" if lines else "it is empty"
        msg = f"The classes {path}: {where}. Expected the name of one class on each line, in the order of the outputs."
        raise DataError(msg)
    return _pairs(lines) or _by_place(lines)


def _by_place(names: Sequence[str]) -> _Listed:
    """Names in the order of the outputs."""
    return _Listed([(_aliases(name), number) for number, name in enumerate(names)], ordered=True, complete=True)


def _pairs(lines: list[str]) -> _Listed | None:
    """Lines of an output and a name, in either order; None if they are something else."""
    first = [_NUMBER_FIRST.fullmatch(line) for line in lines]
    if all(first):
        pairs = [(match[2], int(match[1])) for match in first if match]
        if _distinct(pairs):
            complete = {number for _, number in pairs} == set(range(len(pairs)))
            return _Listed([(_aliases(name), number) for name, number in pairs], ordered=False, complete=complete)
    last = [_NUMBER_LAST.fullmatch(line) for line in lines]
    if all(last):
        pairs = [(match[1], int(match[2])) for match in last if match]
        if _distinct(pairs) and {number for _, number in pairs} == set(range(len(pairs))):
            return _Listed([((name,), number) for name, number in pairs], ordered=False, complete=True)
    return None


def _distinct(pairs: list[tuple[str, int]]) -> bool:
    return len({name for name, _ in pairs}) == len({number for _, number in pairs}) == len(pairs)


def _aliases(name: str) -> tuple[str, ...]:
    """The names by which a line is known: itself, and for ImageNet its synset, its words and the first of those."""
    match = _SYNSET.fullmatch(name)
    return (name,) if match is None else (name, match[1], match[2], match[2].partition(",")[0].strip())


def _in_order(names: Sequence[tuple[str, ...]], origin: str) -> Classes:
    """Each entry holds the names of one output; what several outputs share is the name of none."""
    index: dict[str, int] = {}
    shared: set[str] = set()
    for number, aliases in enumerate(names):
        shared |= index.keys() & set(aliases)
        index |= dict.fromkeys(aliases, number)
        if aliases[0] in shared:
            msg = f"{origin} names {aliases[0]!r} twice. Each class needs a name of its own."
            raise DataError(msg)
    if not index:
        msg = f"{origin}: no class is named. Expected the name of every class, in the order of the outputs."
        raise DataError(msg)
    return Classes(
        index={name: number for name, number in index.items() if name not in shared}, origin=origin, count=len(names)
    )


def _numbered(pairs: Iterable[tuple[str, int]], origin: str, *, complete: bool = False) -> Classes:
    index: dict[str, int] = {}
    for name, number in pairs:
        _check_number(name, number, origin)
        index.setdefault(str(name), number)
    if not index:
        msg = f"{origin}: no class is named. Expected a class for every name."
        raise DataError(msg)
    return Classes(index=index, origin=origin, count=max(index.values()) + 1 if complete else None)


def _check_number(name: str, number: object, origin: str) -> None:
    if isinstance(number, bool) or not isinstance(number, int) or number < 0:
        msg = f"{origin}: {name!r} has the class {number!r}. Expected a whole number from 0."
        raise DataError(msg)


def _from_json(text: str, path: Path) -> _Listed:
    try:
        content = json.loads(text)
    except ValueError as error:
        msg = f"The classes {path} are not JSON: {error}"
        raise DataError(msg) from error
    for key in _INSIDE:
        if isinstance(content, dict) and isinstance(content.get(key), dict | list):
            content = content[key]
            break
    listed = _from_content(content)
    if listed is None:
        msg = (
            f"The classes {path}: expected a list of names, an object from name to class such as class_to_idx, or from "
            "class to name such as id2label."
        )
        raise DataError(msg)
    return listed


def _from_content(content: Any) -> _Listed | None:
    """Plain values: a list of names, name to output, or output to name; None if they are something else."""
    names: list[tuple[Any, int]] = []
    if isinstance(content, list | tuple) and all(isinstance(name, str) for name in content):
        return _by_place(content)
    if isinstance(content, Mapping) and all(isinstance(number, int) for number in content.values()):
        names = list(content.items())
    elif isinstance(content, Mapping) and all(str(key).isdecimal() for key in content):
        for key, value in content.items():
            names += [(name, int(key)) for name in (value if isinstance(value, list) else [value])]
    if not names or not all(isinstance(name, str) for name, _ in names):
        return None
    numbers = {number for _, number in names}
    complete = numbers == set(range(len(numbers)))
    return _Listed([((name,), number) for name, number in names], ordered=False, complete=complete)
