"""A recovery stays only if it gains on images that did not choose it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from small_builds import images, network, options

import pcn_deploy
from pcn_deploy.calibration.paired import Errors
from pcn_deploy.calibration.quantized import apply_scales
from pcn_deploy.calibration.recovery import AFTER, BEFORE, RECOVERIES, equalisation, smoothquant
from pcn_deploy.calibration.recovery import bias_correction as bias_module
from pcn_deploy.calibration.recovery import weight_rounding as rounding_module
from pcn_deploy.calibration.recovery.trial import EVERY, Trials
from pcn_deploy.data.images import ImageSource
from pcn_deploy.data.sampling import spread
from pcn_deploy.progress import silent
from pcn_deploy.verbs.steps.preparation import prepare
from pcn_deploy.verbs.steps.prepared import Prepared

HEAD = "blocks.1.attn.qkv_pos.5"
FUNCTIONS = {
    "equalisation": (equalisation, "equalise"),
    "smoothquant": (smoothquant, "smooth"),
    "weight-rounding": (rounding_module, "round_weights"),
    "bias-correction": (bias_module, "correct_bias"),
}


def prepared(recovery: tuple[str, ...], count: int = 32) -> Prepared:
    chosen = options(precision="int8", recovery=recovery)
    return prepare(network().eval(), chosen, ImageSource([images(count)], chosen.transform), silent)


def replaced(monkeypatch: pytest.MonkeyPatch, name: str, change: float, seen: list[ImageSource]) -> None:
    """A fake recovery: it scales the weights of one layer."""

    def recover(model: Any, *given: Any) -> int:
        seen.extend(one for one in given if isinstance(one, ImageSource))
        layer = model.get_submodule(HEAD)
        layer.weight = torch.nn.Parameter(layer.weight.detach() * change, requires_grad=False)
        return 1

    monkeypatch.setattr(*FUNCTIONS[name], recover)


@pytest.mark.parametrize("name", RECOVERIES)
def test_one_that_makes_it_worse_is_dropped_and_said(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    plain, seen = prepared(()), list[ImageSource]()
    replaced(monkeypatch, name, 1.5, seen)
    found = prepared((name,))
    assert found.recovered == {name: 0}
    (trial,) = found.trials
    assert (trial.name, trial.layers, trial.kept, trial.images) == (name, 1, False, 32 // EVERY)
    assert trial.after_db < trial.before_db - 3
    assert any(f"recovery {name} was tried on 1 layers and dropped" in note for note in found.notes)
    expected = plain.deployed.state_dict()
    assert all(torch.equal(tensor, expected[path]) for path, tensor in found.deployed.state_dict().items())
    assert {path: own.input for path, own in found.scales.items()} == {
        path: own.input for path, own in plain.scales.items()
    }


@pytest.mark.parametrize("name", RECOVERIES)
def test_the_images_that_judge_choose_nothing(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    seen: list[ImageSource] = []
    replaced(monkeypatch, name, 1.5, seen)
    prepared((name,))
    (choosing,) = seen
    chose = next(choosing.batches(64))[0]
    np.testing.assert_array_equal(chose, np.delete(images(32), spread(32, 32 // EVERY), 0))


def test_each_class_chooses_and_judges_whatever_the_order() -> None:
    classes = np.arange(64) % 4
    trials = Trials(network().eval(), ImageSource((images(64), classes), options().transform))
    assert trials.judging is not None
    parts = [list(part) for part in (trials.choosing, trials.judging)]
    assert [len(part) for part in parts] == [48, 16]
    assert [{sample.label for sample in part} for part in parts] == [{0, 1, 2, 3}] * 2
    assert not set.intersection(*({sample.name for sample in part} for part in parts))


@pytest.mark.parametrize("name", AFTER)
def test_one_that_gains_is_kept(name: str) -> None:
    """From a spoiled network to the network itself: a clear gain, and the other way round none."""
    net = network().eval()
    chosen = options(precision="int8", recovery=(name,))
    source = ImageSource([images(32)], chosen.transform)
    trials = Trials(net, source)
    with torch.no_grad():
        worse = network().eval()
        worse.get_submodule(HEAD).weight.mul_(1.3)
    trials.start(worse)
    assert trials.gains(name, 1, lambda: net)
    assert not trials.gains(name, 1, lambda: worse), "the next must be better than what was kept"
    assert [one.kept for one in trials.outcomes] == [True, False]


def test_a_gain_by_chance_is_none() -> None:
    """Half of the images gain a decibel, the others lose it."""
    squares, noise = np.ones(64), np.full(64, 1e-3)
    before, factor = Errors(noise, squares), 10 ** (0.1 * np.where(np.arange(64) % 2, 1.0, -1.0))
    assert not Errors(noise * factor, squares).clearly_less_than(before)
    assert not before.clearly_less_than(before)
    assert Errors(noise * factor / 2, squares).clearly_less_than(before)
    assert not Errors(noise[:1] / 2, squares[:1]).clearly_less_than(Errors(noise[:1], squares[:1]))


def test_too_few_images_to_judge_keep_none() -> None:
    found = prepared(("bias-correction",), EVERY)
    assert found.recovered == {"bias-correction": 0}
    assert any("it takes 8 images or more to judge it" in note for note in found.notes)


def test_real_ones_never_cost_on_the_images_that_judge() -> None:
    found, plain = prepared(RECOVERIES, 64), prepared((), 64)
    assert tuple(found.recovered) == RECOVERIES
    assert all(one.after_db > one.before_db for one in found.trials if one.kept)
    judged = torch.from_numpy(images(64)[spread(64, 64 // EVERY)])
    with torch.inference_mode():
        exact = network().eval()(judged)
        errors = [
            float((apply_scales(one.deployed, one.scales)(judged) - exact).square().sum()) for one in (found, plain)
        ]
    assert errors[0] <= errors[1] * 1.05
    if not any(found.recovered[name] for name in BEFORE):
        assert errors[0] <= errors[1]


def test_the_manifest_says_what_was_tried() -> None:
    chosen = options(precision="int8", recovery=("bias-correction",))
    result = pcn_deploy.compile(network(), chosen, calibration=images(16))
    kept = result.bundle.manifest.calibration
    trial = kept["recovery_trials"]["bias-correction"]
    assert trial.keys() == {"layers", "kept", "images", "before_db", "after_db"}
    assert kept["recovery"]["bias-correction"] == (trial["layers"] if trial["kept"] else 0)
