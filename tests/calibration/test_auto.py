"""The calibrator chosen by what the logits lose."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from small_builds import images, network, options

import pcn_deploy
from pcn_deploy.calibration import auto as choose
from pcn_deploy.calibration import paired
from pcn_deploy.calibration.calibrators import CALIBRATORS
from pcn_deploy.calibration.quantized import apply_scales
from pcn_deploy.data.images import ImageSource
from pcn_deploy.errors import OptionError
from pcn_deploy.progress import silent
from pcn_deploy.tasks.classification import LogitsMeter
from pcn_deploy.verbs.steps.preparation import prepare


def loss(calibrator: str, percentile: float = 99.99) -> tuple[float, str]:
    """SQNR of the logits on the calibration images, and the calibrator that was used."""
    chosen = options(precision="int8", calibrator=calibrator, percentile=percentile)
    ready = prepare(network(), chosen, ImageSource([images(16)], chosen.transform), silent)
    with torch.inference_mode():
        batch = torch.from_numpy(images(16))
        quantized = apply_scales(ready.deployed, ready.scales)(batch).numpy()
        meter = LogitsMeter()
        meter.update(ready.deployed(batch).numpy(), quantized)
    assert ready.calibration is not None
    return meter.metrics()["sqnr_db"], ready.calibration.calibrator


@pytest.mark.parametrize("gain", [0.0, 1.0, 100.0])
@pytest.mark.parametrize("percentile", [99.99, 60.0])
def test_the_best_is_taken_if_it_gains_enough(monkeypatch: pytest.MonkeyPatch, percentile: float, gain: float) -> None:
    monkeypatch.setattr(choose, "GAIN_DB", gain)
    monkeypatch.setattr(paired, "CLEARLY", -1e9)
    alone = {name: loss(name, percentile)[0] for name in CALIBRATORS}
    best = max(alone, key=lambda one: alone[one])
    found, name = loss("auto", percentile)
    assert name == (best if alone[best] - alone["mse"] >= gain else "mse")
    np.testing.assert_allclose(found, alone[name])
    assert max(alone.values()) > min(alone.values())


def test_a_gain_that_may_be_chance_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose, "GAIN_DB", -1e9)
    monkeypatch.setattr(paired, "CLEARLY", 1e9)
    assert loss("auto")[1] == "mse"


def test_the_bundle_says_which_and_why() -> None:
    result = pcn_deploy.compile(network(), options(precision="int8", calibrator="auto"), calibration=images(16))
    kept = result.bundle.read_json("calibration.json")
    assert kept["calibrator"] in CALIBRATORS
    (note,) = [note for note in kept["notes"] if "was chosen" in note]
    assert note.startswith(f"calibrator {kept['calibrator']} was chosen by the SQNR of the logits, in dB: mse ")


def test_the_percentile_is_checked() -> None:
    with pytest.raises(OptionError, match=r"^Percentile 20\.0"):
        options(precision="int8", calibrator="auto", percentile=20.0)
