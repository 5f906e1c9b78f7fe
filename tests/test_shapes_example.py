"""The drawn shapes and the networks trained on them."""

from __future__ import annotations

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

torch = pytest.importorskip("torch")

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "shapes"


def load(name: str) -> ModuleType:
    spec = spec_from_file_location(f"shapes_{name}", EXAMPLE / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def data() -> ModuleType:
    return load("data")


def test_an_image_depends_on_its_split_and_index_alone(data: ModuleType) -> None:
    pixels, labels = data.images("test", 20)
    assert pixels.shape == (20, 64, 64, 3)
    assert pixels.dtype == np.uint8
    assert labels.tolist() == [*range(16), 0, 1, 2, 3]
    again, label = data.draw("test", 17)
    np.testing.assert_array_equal(again, pixels[17])
    assert label == 1
    for split in ("train", "calibration"):
        assert not np.array_equal(data.draw(split, 17)[0], pixels[17])
    assert len(np.unique(pixels.reshape(20, -1), axis=0)) == 20


MEANS = {
    "train": [115.62, 129.85, 112.79, 107.07, 163.0, 127.91, 151.88, 122.98],
    "calibration": [144.77, 203.61, 118.66, 155.46, 180.52, 111.41, 160.37, 113.64],
    "test": [157.4, 113.51, 99.79, 136.15, 105.03, 122.43, 136.98, 136.31],
}
"""Mean of the first images of each split, as the weights beside it were trained on them."""


@pytest.mark.parametrize("split", MEANS)
def test_the_images_are_those_of_the_weights(data: ModuleType, split: str) -> None:
    pixels, _ = data.images(split, 8)
    np.testing.assert_allclose(pixels.mean(axis=(1, 2, 3)), MEANS[split], atol=0.02)  # Versions of Pillow: 0.003


def test_no_image_is_in_two_splits_and_the_classes_are_even(data: ModuleType) -> None:
    drawn = {split: data.images(split, 64) for split in data.SPLITS}
    seen = {pixels.tobytes() for images, _ in drawn.values() for pixels in images}
    assert len(seen) == 64 * len(drawn)
    for _, labels in drawn.values():
        assert np.bincount(labels, minlength=16).tolist() == [4] * 16


@pytest.mark.parametrize("output", ["shapes.npz", "shapes"])
def test_a_written_split_is_what_the_commands_read(data: ModuleType, tmp_path: Path, output: str) -> None:
    from pcn_deploy import ImageSource

    data.write("test", tmp_path / output, 18)
    images, labels = next(ImageSource(tmp_path / output, data.TRANSFORM).batches(18))
    pixels, classes = data.images("test", 18)
    assert labels is not None
    assert sorted(labels.tolist()) == sorted(classes.tolist())
    first = np.flatnonzero(labels == 5)[0]
    expected = (pixels[5].transpose(2, 0, 1) / 255 - 0.5) / 0.25
    np.testing.assert_allclose(images[first], expected, atol=1e-5)


@pytest.mark.parametrize(("name", "least"), [("patchconvnet", 70), ("aa_resnet", 80)])
def test_the_weights_classify(data: ModuleType, name: str, least: float) -> None:
    from pcn_deploy.models.checkpoint import load_strict, read_state_dict

    network = load("networks").NETWORKS[name]().eval()
    path = EXAMPLE / f"{name}.safetensors"
    load_strict(network, read_state_dict(path), str(path))
    pixels, labels = data.images("test", 512)
    with torch.inference_mode():
        logits = network((torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255 - 0.5) / 0.25)
    assert 100 * (logits.argmax(1).numpy() == labels).mean() > least
