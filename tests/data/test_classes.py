"""Which class a folder is: the rule of ImageFolder, and files that say otherwise."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from pcn_deploy.data.classes import Classes, read_classes
from pcn_deploy.data.images import ImageSource
from pcn_deploy.data.transform import Transform
from pcn_deploy.errors import DataError

TRANSFORM = Transform(resolution=(8, 8), crop_pct=1.0)


def tree(root: Path, folders: dict[str, int]) -> Path:
    """A folder for each class with so many images; the files tell their class."""
    for name, count in folders.items():
        (root / name).mkdir(parents=True)
        for index in range(count):
            Image.new("RGB", (8, 8)).save(root / name / f"{index}.png")
    return root


def expected(root: Path) -> list[int]:
    """The labels of torchvision's ImageFolder by a plain loop, hidden folders left out."""
    folders = sorted(name for name in os.listdir(root) if (root / name).is_dir() and name[0] != ".")  # noqa: PTH208
    return [number for number, name in enumerate(folders) for _ in sorted((root / name).glob("[!.]*.png"))]


def labels(source: ImageSource) -> list[int | None]:
    return [sample.label for sample in source]


@pytest.mark.parametrize(
    "folders",
    [
        {"ant": 1, "bee": 0, "cat": 2, "dog": 1},
        {".ipynb_checkpoints": 2, "ant": 1, "bee": 1},
        {str(number): 1 for number in range(12)},
        {str(number): 1 for number in range(1, 13)},
        {f"{number:02}": 1 for number in range(1, 13)},
        {"7": 1, "10": 1, "2": 1},
        {"Zebra": 1, "ant": 1, "Ärmel": 1, "_x": 1},
    ],
)
def test_classes_are_the_sorted_folders(tmp_path: Path, folders: dict[str, int]) -> None:
    root = tree(tmp_path, folders)
    source = ImageSource(root, TRANSFORM)
    assert labels(source) == expected(root)
    source.check_classes(len([name for name in folders if name[0] != "."]))


def test_a_folder_of_another_kind_of_files_is_a_class_and_is_named(tmp_path: Path) -> None:
    root = tree(tmp_path, {"ant": 1, "bee": 0, "cat": 1})
    (root / "bee" / "x.heic").write_bytes(b"apple")
    source = ImageSource(root, TRANSFORM)
    assert labels(source) == [0, 2]
    assert any("1 of the 3 class folders" in note and "(bee)" in note for note in source.notes)


def test_linked_folders_are_followed_and_a_loop_ends(tmp_path: Path) -> None:
    real = tree(tmp_path / "real", {"x": 2, "y": 1})
    root = tmp_path / "subset"
    root.mkdir()
    for name, target in (("ant", "y"), ("bee", "x")):
        (root / name).symlink_to(real / target)
    (real / "x" / "loop").symlink_to(root)
    assert labels(ImageSource(root, TRANSFORM)) == [0, 1, 1]


def test_a_folder_that_two_links_lead_to_is_both_classes(tmp_path: Path) -> None:
    real, root = tree(tmp_path / "real", {"x": 2}), tmp_path / "subset"
    root.mkdir()
    for name in ("ant", "bee"):
        (root / name).symlink_to(real / "x")
    (root / "cat").mkdir()
    (root / "cat" / "linked.png").symlink_to(real / "x" / "0.png")
    (tmp_path / "way").symlink_to(root)
    for place in (root, tmp_path / "way"):
        assert labels(ImageSource(place, TRANSFORM)) == [0, 0, 1, 1, 2]


def test_a_link_that_leads_nowhere_is_named(tmp_path: Path) -> None:
    root = tree(tmp_path / "images", {"ant": 1, "cat": 1})
    (root / "bee").symlink_to(tmp_path / "gone")
    (root / "ant" / "gone.png").symlink_to(tmp_path / "gone.png")
    source = ImageSource(root, TRANSFORM)
    assert len(source) == 3, "a missing image counts as one that cannot be read"
    assert any("bee in" in note and "not there" in note for note in source.notes)
    with pytest.raises(DataError, match="Links that lead nowhere: 'bee'"):
        source.check_classes(3)


def test_folders_that_are_no_class_and_classes_without_folder_are_named(tmp_path: Path) -> None:
    source = ImageSource(tree(tmp_path, {"ant": 1, "bee": 1, "old": 1}), TRANSFORM)
    with pytest.raises(DataError, match=r"Not among its classes: 'old'\. Without a folder: 'cat'\. Numbered"):
        source.check_classes(4, ["ant", "bee", "cat"])
    with pytest.raises(DataError, match=r"the network has 2 classes\. Numbered"):
        source.check_classes(2, ["tench", "goldfish"])


def test_hidden_files_are_no_images(tmp_path: Path) -> None:
    root = tree(tmp_path, {"ant": 1, "bee": 1})
    (root / "ant" / "._0.png").write_bytes(b"a resource fork")
    assert len(ImageSource(root, TRANSFORM)) == 2


def test_numbers_out_of_order_are_told(tmp_path: Path) -> None:
    note = ImageSource(tree(tmp_path / "a", {str(n): 1 for n in range(12)}), TRANSFORM).notes[0]
    assert "0, 1, 10, 11, 2, … are the classes 0, 1, 2, 3, 4, …" in note
    for names in ({str(n): 1 for n in range(10)}, {f"{n:02}": 1 for n in range(12)}):
        assert not any(
            "numbers" in note for note in ImageSource(tree(tmp_path / str(len(names)), names), TRANSFORM).notes
        )


def test_more_or_fewer_folders_than_outputs_are_refused(tmp_path: Path) -> None:
    source = ImageSource(tree(tmp_path, {"ant": 1, "bee": 1}), TRANSFORM)
    with pytest.raises(DataError, match=r"2 class folders \(ant, bee\); the network has 1000 classes.*--classes FILE"):
        source.check_classes(1000)


def test_images_beside_the_folders_are_told(tmp_path: Path) -> None:
    root = tree(tmp_path, {"ant": 1})
    Image.new("RGB", (8, 8)).save(root / "x.png")
    assert "1 of the 2 images lie beside the folders" in ImageSource(root, TRANSFORM).notes[0]


FILES: list[tuple[str, dict[str, int]]] = [
    ("cat\ndog\nant\n", {"cat": 0, "dog": 1, "ant": 2}),
    ("golden retriever\nBoeing 737\n", {"golden retriever": 0, "Boeing 737": 1}),
    ("\ufeff0\n1\n2\n10\n", {"0": 0, "1": 1, "2": 2, "10": 3}),
    ("3 cat\n0 dog\n", {"cat": 3, "dog": 0}),
    ("0: cat\r\n1: big dog\r\n", {"cat": 0, "big dog": 1}),
    ("1,cat\n0,dog\n", {"cat": 1, "dog": 0}),
    ("cat 1\ndog 0\n", {"cat": 1, "dog": 0}),
    ("/a/airfield\t0\n/a/alley\t1\n", {"/a/airfield": 0, "/a/alley": 1}),
    ("3 series\n5 series\n7 series\n", {"3 series": 0, "5 series": 1, "7 series": 2}),
    ("n01440764\nn01443537\n", {"n01440764": 0, "n01443537": 1}),
    ("n01443537 goldfish, Carassius\nn01440764 tench\n", {"n01443537": 0, "goldfish": 0, "n01440764": 1, "tench": 1}),
    ("0 n01440764 tench, Tinca tinca\n1 n01443537 goldfish\n", {"n01440764": 0, "tench": 0, "n01443537": 1}),
    ("n02012849 crane\nn03126707 crane\n", {"n02012849": 0, "n03126707": 1}),
    (json.dumps(["b", "a"]), {"b": 0, "a": 1}),
    (json.dumps({"b": 0, "a": 1}), {"b": 0, "a": 1}),
    (json.dumps({"0": 0, "1": 1, "10": 2, "2": 3}), {"10": 2, "2": 3}),
    (json.dumps({"class_to_idx": {"b": 0, "a": 1}, "epoch": 3}), {"b": 0, "a": 1}),
    (json.dumps({"id2label": {"1": "b", "0": "a"}, "model_type": "vit"}), {"a": 0, "b": 1}),
    (json.dumps({"0": ["n01440764", "tench"], "1": ["n01443537", "goldfish"]}), {"n01440764": 0, "goldfish": 1}),
]


@pytest.mark.parametrize(("text", "index"), FILES)
def test_files_of_classes(tmp_path: Path, text: str, index: dict[str, int]) -> None:
    (tmp_path / "classes.txt").write_text(text, encoding="utf-8")
    found = read_classes(tmp_path / "classes.txt")
    assert {name: found.index[name] for name in index} == index


def test_a_name_of_two_synsets_is_that_of_none(tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text("n02012849 crane\nn03126707 crane\n")
    assert "crane" not in read_classes(tmp_path / "classes.txt").index


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("cat\n\ndog", "line 2 is empty"),
        ("", "it is empty"),
        ("cat\ndog\ncat", "names 'cat' twice"),
        ("{", "are not JSON"),
        ('{"a": "b"}', "expected a list of names"),
        ('{"a": -1}', "whole number from 0"),
        ("[]", "no class is named"),
    ],
)
def test_unusable_files_of_classes_are_refused(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "classes.txt").write_text(text)
    with pytest.raises(DataError, match=words):
        read_classes(tmp_path / "classes.txt")


@pytest.mark.parametrize("given", [["dog", "cat", "ant"], {"ant": 2, "cat": 1, "dog": 0}, "file"])
def test_given_classes_decide(tmp_path: Path, given: Any) -> None:
    root = tree(tmp_path / "images", {"ant": 1, "cat": 1})
    (tmp_path / "classes.txt").write_text("dog\ncat\nant\n")
    source = ImageSource(root, TRANSFORM, classes=tmp_path / "classes.txt" if given == "file" else given)
    assert labels(source) == [2, 1]
    assert source.classes_present.tolist() == [1, 2]
    source.check_classes(3)
    with pytest.raises(DataError, match=r"the network has 2\.|up to 2; those of the network run from 0 to 1"):
        source.check_classes(2)


def test_folders_that_are_not_among_the_classes_are_refused_where_labels_count(tmp_path: Path) -> None:
    source = ImageSource(tree(tmp_path, {"ant": 1, "cats": 1}), TRANSFORM, classes=["ant", "cat"])
    assert len(list(source)) == 2, "for calibration they are good"
    with pytest.raises(DataError, match=r"The folder 'cats' is not in the list of classes \(it has 'cat'\)"):
        source.check_classes(2)


def test_an_ellipsis_stands_for_more(tmp_path: Path) -> None:
    many = ImageSource(tree(tmp_path / "many", {f"class{n}": 1 for n in range(6)}), TRANSFORM)
    with pytest.raises(DataError, match=r"6 class folders \(class0, class1, class2, class3, class4, …\)"):
        many.check_classes(9)
    for classes, shown in ((["ant", "bee"], r"\(it has 'ant', 'bee'\)"), (list("abcdef"), r"'e', …\)")):
        source = ImageSource(tree(tmp_path / str(len(classes)), {"zzzz": 1}), TRANSFORM, classes=classes)
        with pytest.raises(DataError, match=shown):
            source.check_classes(len(classes))
    few = ImageSource(tree(tmp_path / "few", {"10": 1, "9": 1}), TRANSFORM)
    assert any("10, 9 are the classes 0, 1. For" in note for note in few.notes)


def test_classes_without_folders_are_noted(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
    assert (
        "has no class folders, so the list of classes is not used"
        in ImageSource(tmp_path, TRANSFORM, classes=["a", "b"]).notes[0]
    )


def test_an_incomplete_list_of_names_is_refused() -> None:
    assert "names 2 classes; the network has 3" in Classes.of(["a", "b"]).fault(3)
    assert Classes.of({"a": 0, "b": 1}).fault(3) == ""
