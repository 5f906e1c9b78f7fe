"""All recoveries together, in a build, in the search, on the command line."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import invoke, refused
from small_builds import images, network, options

from pcn_deploy import Bundle, ImageSource
from pcn_deploy.calibration.quantized import apply_scales
from pcn_deploy.calibration.recovery import RECOVERIES
from pcn_deploy.calibration.recovery.trial import EVERY
from pcn_deploy.data.sampling import spread
from pcn_deploy.errors import OptionError
from pcn_deploy.progress import silent
from pcn_deploy.verbs.steps.preparation import prepare
from pcn_deploy.verbs.steps.prepared import Prepared

LAYER = "blocks.0.attn.qkv_pos.5"


def prepared(recovery: tuple[str, ...], given: np.ndarray[tuple[int, ...], np.dtype[np.float32]]) -> Prepared:
    chosen = options(precision="int8", recovery=recovery)
    return prepare(network().eval(), chosen, ImageSource([given], chosen.transform), silent)


@pytest.mark.usefixtures("every_recovery_kept")
def test_together_they_keep_the_caller_s_network_and_its_answers() -> None:
    """Whether they gain is for the trials to say, which are overruled here; they must not spoil each other's work."""
    net = network().eval()
    state = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    chosen = options(precision="int8", recovery=RECOVERIES, calibrator="entropy")
    found = prepare(net, chosen, ImageSource([images(64)], chosen.transform), silent)
    assert all(torch.equal(tensor, state[name]) for name, tensor in net.state_dict().items())
    assert tuple(found.recovered) == RECOVERIES
    assert found.recovered["weight-rounding"] > 0
    assert found.recovered["bias-correction"] == len(found.scales)
    plain = prepare(net, replace(chosen, recovery=()), ImageSource([images(64)], chosen.transform), silent)
    assert plain.recovered == {}
    x = torch.from_numpy(images(320)[64:])
    with torch.inference_mode():
        exact = net(x)
        torch.testing.assert_close(found.unrounded(x), exact, rtol=0, atol=1e-5 * float(exact.abs().max()))
        errors = [float((apply_scales(one.deployed, one.scales)(x) - exact).square().sum()) for one in (plain, found)]
    assert errors[1] < 2 * errors[0]


@pytest.mark.usefixtures("every_recovery_kept")
def test_the_largest_input_of_every_layer_stays() -> None:
    """So that what FP16 could hold it still holds."""
    given = images()
    given[spread(len(given), len(given) // EVERY)] = given[0]  # what only judges has its own peaks
    plain, moved = prepared((), given), prepared(("smoothquant",), given)
    assert moved.recovered["smoothquant"] > 0
    assert plain.calibration is not None
    assert moved.calibration is not None
    for path, seen in plain.calibration.statistics.items():
        assert moved.calibration.statistics[path].amax == pytest.approx(seen.amax, rel=1e-4)


@pytest.mark.usefixtures("every_recovery_kept")
def test_the_order_given_does_not_matter_and_a_repeat_is_equal_to_the_bit() -> None:
    one, other = (prepared(names, images()) for names in (RECOVERIES, RECOVERIES[::-1]))
    first, second = one.deployed.state_dict(), other.deployed.state_dict()
    assert list(first) == list(second)
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    assert one.recovered == other.recovered
    for path, scale in one.scales.items():
        assert scale.input == other.scales[path].input
        np.testing.assert_array_equal(scale.weight, other.scales[path].weight)


@pytest.mark.parametrize("given", [np.full((3, 3, 32, 32), 0.5, np.float32), images(1), 1e-6 * images(2)])
def test_images_that_say_little(given: np.ndarray[tuple[int, ...], np.dtype[np.float32]]) -> None:
    found = prepared(RECOVERIES, given)
    assert all(tensor.isfinite().all() for tensor in found.deployed.state_dict().values())
    assert all(scale.input > 0 and (scale.weight > 0).all() for scale in found.scales.values())
    with torch.inference_mode():
        assert apply_scales(found.deployed, found.scales)(torch.from_numpy(given)).isfinite().all()


@pytest.mark.usefixtures("every_recovery_kept")
def test_a_layer_left_out_gets_its_float_weights_back() -> None:
    found = prepared(RECOVERIES, images())
    assert not torch.equal(
        found.deployed.get_submodule(LAYER).weight,  # type: ignore[arg-type]
        found.unrounded.get_submodule(LAYER).weight,  # type: ignore[arg-type]
    )
    left = found.leave_out(frozenset({LAYER}), "a test")
    assert left.plan.quantized_entries.keys() == found.scales.keys() - {LAYER} == left.scales.keys()
    expected, kept = found.unrounded.state_dict(), left.deployed.state_dict()
    others = found.deployed.state_dict()
    for name, tensor in kept.items():
        assert torch.equal(tensor, (expected if name.startswith(LAYER) else others)[name]), name


def test_unknown_or_without_int8() -> None:
    with pytest.raises(OptionError, match=r"Unknown recovery 'magic'; known are equalisation"):
        options(precision="int8", recovery=("magic",))
    with pytest.raises(OptionError, match="makes up for INT8; the precision is fp16"):
        options(recovery=("bias-correction",))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("recovery")
    save_file(network().state_dict(), folder / "small.safetensors")
    np.savez(folder / "images.npz", images=images(12))
    return {"weights": folder / "small.safetensors", "images": folder / "images.npz"}


@pytest.mark.usefixtures("every_recovery_kept")
def test_command_line(files: dict[str, Path], tmp_path: Path) -> None:
    common = ["patchconvnet", "--weights", files["weights"], "--calibration", files["images"], "--resolution", 32]
    build = ["build", *common, "-o", tmp_path / "out.pcn"]
    result = invoke(*build, "--precision", "int8", "--recover", "all")
    assert result.exit_code == 0, result.output
    text = " ".join(result.output.split())
    assert "Recovery: equalisation (0 layers), smoothquant (" in text
    assert "bias-correction (6 layers)" in text
    kept = Bundle.open(tmp_path / "out.pcn").manifest.calibration["recovery"]
    assert tuple(kept) == RECOVERIES
    assert kept["bias-correction"] == 6
    result = invoke("analyze", *common, "--recover", "bias-correction", "--sample", 4, "-o", tmp_path / "out.json")
    assert result.exit_code == 0, result.output
    with_recovery = json.loads((tmp_path / "out.json").read_text())
    result = invoke("analyze", *common, "--sample", 4, "-o", tmp_path / "plain.json")
    plain = json.loads((tmp_path / "plain.json").read_text())
    assert with_recovery["all_quantized"]["sqnr_db"] != plain["all_quantized"]["sqnr_db"]
    refused(invoke(*build, "--overwrite", "--recover", "bias-correction"), 2, "makes up for INT8", "--precision int8")
