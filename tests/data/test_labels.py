"""Labels that cannot be the network's classes are told by what it answers; plausible ones pass, poor networks too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from pcn_deploy.calibration.search.evaluation import Answers
from pcn_deploy.data.images import ImageSource
from pcn_deploy.data.labels import LabelCheck
from pcn_deploy.data.transform import Transform
from pcn_deploy.errors import DataError

TRANSFORM = Transform(resolution=(2, 2), crop_pct=1.0, mean=(0.0,) * 3, std=(1.0,) * 3)
Truth = npt.NDArray[np.int64]


def network(truth: Truth, classes: int, accuracy: float, seed: int = 0) -> npt.NDArray[np.float32]:
    """Logits of a fake network that is right on a share of the images and otherwise answers anything."""
    random = np.random.default_rng(seed)
    logits = random.standard_normal((len(truth), classes)).astype(np.float32)
    answer = np.where(random.random(len(truth)) < accuracy, truth, random.integers(0, classes, len(truth)))
    logits[np.arange(len(truth)), answer] += 9
    return logits


def check(labels: Truth, logits: npt.NDArray[np.float32], folders: tuple[str, ...] = ()) -> tuple[str, ...]:
    """The notes on the labels."""
    source = ImageSource(
        (np.zeros((len(labels), 3, 2, 2), np.float32), labels.reshape(-1)), TRANSFORM, name="the pictures"
    )
    source.folders = folders
    labelling, before = LabelCheck(source), source.notes
    for part in np.array_split(np.arange(len(labels)), 5):
        labelling.update(labels[part], logits[part])
    labelling.check(logits.shape[1])
    return source.notes[len(before) :]


def shuffled(count: int, classes: int, seed: int = 1) -> Truth:
    return np.random.default_rng(seed).integers(0, classes, count)


@pytest.mark.parametrize(
    ("classes", "accuracy", "count"),
    [(2, 0.6, 400), (5, 0.3, 200), (10, 0.95, 60), (1000, 0.02, 2000), (1000, 0.8, 1000)],
)
def test_right_labels_pass_whatever_the_network_is_worth(classes: int, accuracy: float, count: int) -> None:
    truth = shuffled(count, classes)
    assert check(truth, network(truth, classes, accuracy)) == ()


def test_one_image_of_each_class_passes() -> None:
    truth = np.arange(1000)
    check(truth, network(truth, 1000, 0.7))


def test_a_network_that_takes_one_class_for_another_passes() -> None:
    truth = shuffled(1000, 5)
    check(truth, network(np.where(truth == 3, 1, truth), 5, 0.95))


def test_a_few_classes_of_many_pass() -> None:
    truth = np.random.default_rng(0).choice([7, 300], 100)
    check(truth, network(truth, 1000, 0.4))


def test_chance_is_that_among_the_classes_which_have_images() -> None:
    truth = np.random.default_rng(0).choice([100, 200, 300, 400, 500], 400)
    random = np.random.default_rng(1).permutation(truth)  # knows nothing of the labels, and is right on 20 %
    with pytest.raises(
        DataError, match=r"right on \d+\.\d % of the 400 labelled images of the pictures, no more than by"
    ):
        check(truth, network(random, 1000, 1.0))


@pytest.mark.parametrize("accuracy", [1.0, 0.99])
def test_a_right_network_passes_where_one_class_has_nearly_all_images(accuracy: float) -> None:
    truth = (np.arange(300) >= 297).astype(np.int64)
    assert check(truth, network(truth, 2, accuracy)) == ()


def test_a_network_that_knows_nothing_is_noted_where_one_class_has_most_images() -> None:
    truth = (np.random.default_rng(0).random(500) < 0.2).astype(np.int64)  # 80 % are class 0
    (note,) = check(truth, network(np.zeros(500, np.int64), 2, 0.9))
    assert "knows how frequent the classes are and nothing else" in note and "--classes FILE" in note


@pytest.mark.parametrize("classes", [2, 5])
def test_a_network_that_always_answers_one_class_is_refused(classes: int) -> None:
    with pytest.raises(DataError, match="no more than by chance"):
        check(np.arange(400) % classes, network(np.ones(400, np.int64), classes, 1.0))


def test_few_images_that_fit_by_chance_are_noted() -> None:
    truth = np.arange(40) % 2
    answers = np.random.default_rng(4).permutation(truth)
    (note,) = check(truth, network(answers, 2, 1.0))
    assert "of the 40 labelled images" in note and "so few cannot tell whether the labels are its classes" in note
    assert check(truth, network(truth, 2, 0.9)) == ()


def test_a_network_that_knows_half_of_the_classes_passes_with_a_note() -> None:
    """In another domain it takes the others for classes that have no images: twice as often right if paired."""
    truth = shuffled(1000, 10)
    outputs = np.array([0, 1, 2, 3, 4, 50, 71, 38, 22, 90])[truth]
    (note,) = check(truth, network(outputs, 100, 0.77))
    assert "right on 40.3 %" in note and "but on 79.7 %" in note and "paired with another output" in note


def test_a_class_that_takes_the_place_of_others_is_no_order() -> None:
    """All others are answered as class 9 in nine of ten images: nothing that pairs each with its own explains it."""
    truth = shuffled(1000, 10)
    random = np.random.default_rng(3).random(1000)
    assert check(truth, network(np.where(random < 0.9, 9, truth), 10, 1.0)) == ()


def test_the_plainer_order_is_named_where_a_pairing_fits_a_little_better() -> None:
    labels = shuffled(2000, 20)
    with pytest.raises(DataError, match="if 1 is added to each label"):
        check(labels, network((labels + 1) % 20, 20, 0.95))


ORDERS: dict[str, Truth] = {
    "another language": np.array([2, 0, 3, 4, 1]),
    "two swapped of two": np.array([1, 0]),
    "counted from one": (np.arange(10) + 1) % 10,
    "an empty folder left out": np.where(np.arange(50) < 20, np.arange(50), (np.arange(50) + 1) % 50),
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("accuracy", [0.5, 0.95])
def test_labels_in_another_order_are_refused(order: str, accuracy: float) -> None:
    outputs = ORDERS[order]
    labels = shuffled(1000, len(outputs))
    with pytest.raises(DataError, match=r"but on \d+\.\d % if .*--classes FILE"):
        check(labels, network(outputs[labels], len(outputs), accuracy))


def test_another_order_shows_where_the_images_are_one_of_each_class_in_turn() -> None:
    labels, outputs = np.arange(1000) % 6, np.array([2, 0, 4, 5, 3, 1])
    with pytest.raises(DataError, match=r"but on 9\d\.\d % if each label is paired with another output"):
        check(labels, network(outputs[labels], 6, 0.95))


def test_a_shift_shows_with_one_image_of_each_class() -> None:
    with pytest.raises(DataError, match=r"but on [78]\d\.\d % if 1 is taken from each label"):
        check(np.arange(1, 1000), network(np.arange(999), 1000, 0.8))


def test_folders_by_number_are_recognised() -> None:
    folders = tuple(sorted(str(number) for number in range(12)))
    labels = shuffled(240, 12)
    outputs = np.array([int(name) for name in folders])[labels]
    with pytest.raises(DataError, match=r"if the folders are taken by their numbers \(2 before 10\)"):
        check(labels, network(outputs, 12, 0.9), folders)
    check(outputs, network(outputs, 12, 0.9), folders)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twelve grey levels, twenty images of each, in folders named by the level."""
    for level in range(12):
        (tmp_path / str(level)).mkdir()
        for index in range(20):
            Image.new("RGB", (2, 2), (level * 20,) * 3).save(tmp_path / str(level) / f"{index}.png")
    return tmp_path


def test_answers_are_taken_from_the_right_folders_only(folder: Path) -> None:
    by_text = np.argsort([str(level) for level in range(12)])  # class of torchvision to level

    def trained_by_torchvision(images: npt.NDArray[np.float32]) -> Any:
        level = np.rint(images[:, 0, 0, 0] * 255 / 20).astype(int)
        return np.eye(12, dtype=np.float32)[np.argsort(by_text)[level]]

    def trained_by_timm(images: npt.NDArray[np.float32]) -> Any:
        return np.eye(12, dtype=np.float32)[np.rint(images[:, 0, 0, 0] * 255 / 20).astype(int)]

    assert Answers.of(trained_by_torchvision, ImageSource(folder, TRANSFORM)).top1 == 100
    with pytest.raises(DataError, match="by their numbers"):
        Answers.of(trained_by_timm, ImageSource(folder, TRANSFORM))
    numbers = [str(level) for level in range(12)]
    assert Answers.of(trained_by_timm, ImageSource(folder, TRANSFORM, classes=numbers)).top1 == 100


def test_folders_of_another_head_stop_before_the_images_are_through(folder: Path) -> None:
    calls = []

    def thousand(images: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        calls.append(len(images))
        return np.zeros((len(images), 1000), np.float32)

    with pytest.raises(DataError, match="12 class folders"):
        Answers.of(thousand, ImageSource(folder, TRANSFORM))
    assert len(calls) == 1


def test_labels_can_be_forgotten(folder: Path) -> None:
    source = ImageSource(folder, TRANSFORM).without_labels()
    assert not source.has_labels and len(source) == 240
    source.check_classes(1000)
    assert {sample.label for sample in source} == {None}
