"""The images of a build: which calibrate, which judge, and what a calibration cache makes of that."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
from small_builds import images, network, options

import pcn_deploy
from pcn_deploy.errors import DataError
from pcn_deploy.verbs.analyze import analyze
from pcn_deploy.verbs.steps.sources import open_images

torch = pytest.importorskip("torch")


@pytest.fixture
def labelled(tmp_path: Path) -> Path:
    """90 images with the labels that the network gives them: 18 can be held out."""
    pixels = images(90)
    with torch.no_grad():
        labels = network().eval()(torch.from_numpy(pixels)).argmax(1).numpy()
    np.savez(tmp_path / "set.npz", images=pixels, labels=labels)
    return tmp_path / "set.npz"


def test_a_cache_serves_whether_or_not_images_are_held_out(labelled: Path, tmp_path: Path) -> None:
    cached = partial(options, precision="int8", calibration_cache=tmp_path / "cache.json")
    made = pcn_deploy.compile(network(), cached(), calibration=labelled).bundle.manifest.calibration
    assert made["images"] == 72
    for chosen, evaluation, judged in ((cached(), labelled, 90), (cached(max_drop=50.0), None, 45)):
        built = pcn_deploy.compile(network(), chosen, calibration=labelled, evaluation=evaluation)
        assert built.bundle.manifest.calibration == made
        assert built.proofs[0].counts.images == judged
    analyze(network(), cached(), labelled, images=4)


def test_a_cache_made_with_the_images_that_are_to_judge_is_refused_in_words(labelled: Path, tmp_path: Path) -> None:
    cached = options(precision="int8", calibration_cache=tmp_path / "cache.json")
    made = pcn_deploy.compile(network(), cached, calibration=labelled, evaluation=labelled)
    assert made.bundle.manifest.calibration["images"] == 90
    words = "all 90 calibration images; without --data and --max-drop 18 of them are held out"
    with pytest.raises(DataError, match=words):
        pcn_deploy.compile(network(), cached, calibration=labelled)


def test_what_holds_for_all_images_is_said_once() -> None:
    small, other = np.zeros((6, 16, 16, 3), np.uint8), np.zeros((9, 8, 8, 3), np.uint8)
    alike = open_images(small, small[:4], options(precision="int8"))
    (note,) = alike.notes
    assert note.startswith("6 of 6 images looked at are 16x16")
    assert len(open_images(small, other, options(precision="int8")).notes) == 2
