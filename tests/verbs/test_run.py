"""The verb `run`: most likely classes of image files."""

from __future__ import annotations

import builtins
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pcn_deploy.data.transform import Transform
from pcn_deploy.errors import DataError, DependencyError
from pcn_deploy.specs import BatchRange, EngineSpec, TensorSpec
from pcn_deploy.verbs.run import Prediction, classify


@dataclass
class FakeEngine:
    """Gives one class per image the mean of its red channel, the rest constants."""

    transform: Transform = field(
        default_factory=lambda: Transform(resolution=(4, 4), crop_pct=1.0, mean=(0.0,) * 3, std=(1.0,) * 3)
    )
    class_names: tuple[str, ...] = ()

    @property
    def spec(self) -> EngineSpec:
        tensors = (TensorSpec(name=name, dtype="float32", shape=("batch", 4)) for name in ("images", "logits"))
        return EngineSpec(inputs=(next(tensors),), outputs=(next(tensors),), batch=BatchRange())

    def outputs(self, images: Any) -> Any:
        assert images.shape == (1, 3, 4, 4)
        return {"logits": np.array([[0.25, float(images[0, 0].mean()), -1.0, 0.25]], np.float32)}


def run(images: list[Path], **given: Any) -> list[Prediction]:
    return classify(FakeEngine(), images, **given)  # type: ignore[arg-type]


@pytest.fixture
def white(tmp_path: Path) -> Path:
    path = tmp_path / "white.png"
    Image.new("RGB", (8, 8), "white").save(path)
    return path


@pytest.fixture
def black(tmp_path: Path) -> Path:
    path = tmp_path / "black.png"
    Image.new("L", (8, 16), 0).save(path)
    return path


def test_classes_are_sorted_and_probabilities_are_softmax(white: Path, black: Path) -> None:
    first, second = run([white, black], top=3)
    assert (first.image, second.image) == (str(white), str(black))
    assert first.classes == (1, 0, 3), "ties keep the order of the classes"
    assert second.classes == (0, 3, 1)
    assert first.names == ("1", "0", "3")
    logits = np.array([0.25, 1.0, -1.0, 0.25])
    softmax = np.exp(logits) / np.exp(logits).sum()
    assert first.probabilities == pytest.approx(tuple(softmax[[1, 0, 3]]))


def test_more_classes_asked_for_than_there_are(white: Path) -> None:
    (found,) = run([white], top=50)
    assert found.classes == (1, 0, 3, 2)
    assert sum(found.probabilities) == pytest.approx(1.0)


def test_large_logits_do_not_overflow(white: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logits = np.array([[5000.0, 0.0]], np.float32)
    monkeypatch.setattr(FakeEngine, "outputs", lambda self, images: {"logits": logits})
    assert run([white])[0].probabilities == (1.0, 0.0)


def test_names_stand_for_the_classes(white: Path) -> None:
    (found,) = run([white], top=2, class_names=["ant", "bee", "cat", "dog"])
    assert found.names == ("bee", "ant")


def test_as_many_names_as_classes(white: Path) -> None:
    with pytest.raises(DataError, match=r"2 class names were given; the network has 4 classes"):
        run([white], class_names=["ant", "bee"])


def png_header_only(path: Path) -> None:
    path.write_bytes(b"\x89PNG\r\n\x1a\n")


def truncated(path: Path) -> None:
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:400])


@pytest.mark.parametrize(
    "spoil", [lambda path: None, lambda path: path.write_text("no image"), png_header_only, truncated, Path.mkdir]
)
def test_files_that_are_no_images(tmp_path: Path, spoil: Any) -> None:
    path = tmp_path / "bad.png"
    spoil(path)
    (found,) = run([path])
    assert isinstance(found.error, DataError)
    assert "bad.png cannot be read as an image" in str(found.error)


def test_an_image_too_large_to_be_honest(white: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    (found,) = run([white])
    assert "cannot be read as an image" in str(found.error)


def test_without_pillow(white: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any, **given: Any) -> Any:
        if name.split(".")[0] == "PIL":
            raise ModuleNotFoundError(name=name)
        return real(name, *rest, **given)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(DependencyError, match=r"reading images needs it\. Install it: pip install pillow$"):
        run([white])
