"""The quantised module: scales, codes, and the layers it replaces."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from pcn_deploy.calibration.plan.facts import inspect_layers
from pcn_deploy.calibration.plan.rules import PlanEntry, PrecisionPlan, make_plan
from pcn_deploy.calibration.quantized import (
    QuantConv2d,
    Quantization,
    QuantLinear,
    apply_scales,
    plan_scales,
)
from pcn_deploy.calibration.scales import round_up_to_fp16
from pcn_deploy.errors import DataError, OptionError
from pcn_deploy.graph.torchscript import to_torchscript
from pcn_deploy.models.patchconvnet import PatchConvNet
from pcn_deploy.network.deploy import to_deploy

MakeNet = Callable[..., PatchConvNet]


def plan_for(path: str, amax: float | None, remainder: str = "fp16") -> PrecisionPlan:
    entry = PlanEntry(op=path, kind="Conv2d", precision="int8", reason="", input_amax=amax)
    return PrecisionPlan(precision="int8", remainder=remainder, entries=(entry,))


@settings(max_examples=200, deadline=None)
@given(st.floats(1e-30, 60000))
def test_scales_are_rounded_up_to_fp16(value: float) -> None:
    given_scale = np.array([value], np.float32)
    (rounded,) = round_up_to_fp16(given_scale)
    assert rounded == np.float32(np.float16(rounded)), "representable"
    assert rounded >= given_scale[0], "nothing is clipped"
    below = np.nextafter(np.float16(rounded), np.float16(0))
    assert np.float32(below) < given_scale[0], "the smallest such value"


@pytest.mark.parametrize("amax", [1e-12, 1e-3, 1.0, 250.0])
@pytest.mark.parametrize("remainder", ["fp16", "fp32"])
def test_scales_cover_the_ranges(amax: float, remainder: str) -> None:
    net = nn.Sequential(nn.Conv2d(3, 5, 1))
    with torch.no_grad():
        net[0].weight.copy_(torch.randn(5, 3, 1, 1) * torch.tensor([1e-12, 1e-4, 1.0, 30.0, 0.0])[:, None, None, None])  # type: ignore[operator]
    scales = plan_scales(net, plan_for("0", amax, remainder))["0"]
    assert scales.weight.dtype == np.float32
    assert scales.weight.shape == (5,)
    every = np.append(scales.weight, np.float32(scales.input))
    largest = np.append(net[0].weight.detach().abs().flatten(1).amax(1).numpy(), amax)  # type: ignore[operator]
    assert (every > 0).all()
    assert (every.astype(np.float64) * 127 >= largest * (1 - 1e-6)).all()
    if remainder == "fp16":
        np.testing.assert_array_equal(every, every.astype(np.float16).astype(np.float32))
    else:
        used = largest > 0
        np.testing.assert_allclose(every[used], largest[used] / 127, rtol=1e-6)


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Conv2d(6, 8, 3, stride=2, padding=1),
        lambda: nn.Conv2d(6, 4, (1, 3), padding=(0, 2), dilation=(1, 2), bias=False),
        lambda: nn.Conv2d(6, 6, 3, groups=3, padding="same", padding_mode="reflect"),
        lambda: nn.Linear(9, 4),
        lambda: nn.Linear(9, 4, bias=False),
    ],
)
def test_a_quantised_layer_is_the_layer_on_rounded_values(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(make())
    layer = net[0]
    before = copy.deepcopy(net.state_dict())
    x = torch.randn(2, 6, 7, 9)
    scales = plan_scales(net, plan_for("0", 2.0))
    quantized = apply_scales(net, scales)
    found = quantized.get_submodule("0")
    assert isinstance(found, QuantConv2d | QuantLinear)

    weight_scale = torch.from_numpy(scales["0"].weight).reshape(-1, *[1] * (found.weight.ndim - 1))
    codes = (found.weight / weight_scale).detach().numpy()
    np.testing.assert_allclose(codes, np.rint(codes), atol=1e-4)
    assert np.abs(codes).max() <= 127 + 1e-4
    assert np.abs(codes).max() > 120
    assert float((found.weight - before["0.weight"]).abs().div(weight_scale).max()) <= 0.5 + 1e-4

    literal = copy.deepcopy(layer)
    literal.weight.data = found.weight.detach().clone()
    rounded = (x / scales["0"].input).round().clamp(-128, 127) * scales["0"].input
    with torch.no_grad():
        torch.testing.assert_close(quantized(x), literal(rounded), atol=1e-5, rtol=0)
        assert not torch.allclose(quantized(x), layer(x), atol=1e-3)
    assert all(torch.equal(net.state_dict()[name], tensor) for name, tensor in before.items())
    assert type(net[0]) is type(layer)


def quantised_net(make_net: MakeNet, **form: Any) -> tuple[nn.Module, nn.Module]:
    net, _ = to_deploy(make_net(depth=2, **form), torch.rand(1, 3, 32, 48))
    plan = make_plan(inspect_layers(net, torch.zeros(1, 3, 32, 48)), "int8")
    plan = plan.with_ranges(dict.fromkeys(plan.quantized_entries, 4.0))
    return net, apply_scales(net, plan_scales(net, plan))


@pytest.mark.parametrize("form", [{}, {"multi_class_token": True, "num_classes": 20}])
def test_it_scripts_and_freezes(make_net: MakeNet, form: dict[str, Any]) -> None:
    plain, quantized = quantised_net(make_net, **form)
    images = torch.from_numpy(np.random.default_rng(0).standard_normal((2, 3, 32, 48)).astype(np.float32))
    frozen = torch.jit.load(io.BytesIO(to_torchscript(quantized, images)))  # type: ignore[no-untyped-call]
    with torch.inference_mode():
        expected: Tensor = quantized(images)
        torch.testing.assert_close(frozen(images), expected, atol=1e-4, rtol=0)
        difference = float((plain(images) - expected).abs().max())
    assert 1e-4 < difference < 1
    assert str(frozen.graph).count("fake_quantize_per_tensor_affine") == sum(
        isinstance(module, QuantConv2d | QuantLinear) for module in quantized.modules()
    )


def test_the_model_given_is_left_alone_and_its_other_weights_are_shared(make_net: MakeNet) -> None:
    plain, quantized = quantised_net(make_net)
    given_state, state = plain.state_dict(), quantized.state_dict()
    shared = {name for name in state if state[name].data_ptr() == given_state[name].data_ptr()}
    replaced = {
        f"{path}.weight" for path, layer in quantized.named_modules() if isinstance(layer, QuantConv2d | QuantLinear)
    }
    assert shared == state.keys() - replaced
    assert not any(isinstance(module, QuantConv2d | QuantLinear) for module in plain.modules())
    assert not quantized.training


@pytest.mark.parametrize("amax", [1e-45, 1e-40, 3e38])
def test_no_scale_is_zero_or_infinite(amax: float) -> None:
    net = nn.Sequential(nn.Conv2d(1, 3, 1))
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([1e-45, 1.0, 3e38])[:, None, None, None])  # type: ignore[operator]
    scales = plan_scales(net, plan_for("0", amax, "fp32"), "mse")["0"]
    every = np.append(scales.weight, np.float32(scales.input))
    assert np.isfinite(every).all()
    assert (every >= np.finfo(np.float32).tiny).all()
    assert torch.isfinite(apply_scales(net, {"0": scales})(torch.zeros(1, 1, 2, 2))).all()


def test_a_scale_beyond_fp16_is_refused() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1))
    with pytest.raises(DataError, match=r"0 needs a scale of 7\.87e\+04, beyond FP16.*--remainder fp32"):
        plan_scales(net, plan_for("0", 1e7))
    with torch.no_grad():
        net[0].weight[1, 1] = 1e8  # type: ignore[operator]
    with pytest.raises(DataError, match="beyond FP16"):
        plan_scales(net, plan_for("0", 1.0))
    assert plan_scales(net, plan_for("0", 1e7, "fp32"))["0"].input == pytest.approx(1e7 / 127)


@pytest.mark.parametrize("amax", [math.nan, math.inf, 0.0, -1.0, 1e39])
def test_a_range_that_is_none_is_refused(amax: float) -> None:
    with pytest.raises(DataError, match="The range of 0 is"):
        plan_scales(nn.Sequential(nn.Conv2d(3, 4, 1)), plan_for("0", amax))


def test_weights_are_clipped_where_that_is_asked_for() -> None:
    net = nn.Sequential(nn.Linear(20_000, 3))
    with torch.no_grad():
        net[0].weight.normal_(generator=torch.Generator().manual_seed(0))  # type: ignore[operator]
        net[0].weight[:, 0] = 9.0  # type: ignore[operator]
    errors = {}
    for calibrator in ("max", "mse"):
        scales = plan_scales(net, plan_for("0", 1.0), calibrator)
        np.testing.assert_array_equal(scales["0"].weight, scales["0"].weight.astype(np.float16))
        quantized = apply_scales(net, scales).get_submodule("0")
        errors[calibrator] = ((quantized.weight - net[0].weight) ** 2).sum(1)  # type: ignore[operator]
    assert (errors["mse"] < errors["max"]).all()
    with pytest.raises(OptionError, match="Unknown weight calibrator 'entropy'"):
        plan_scales(net, plan_for("0", 1.0), "entropy")


def test_what_cannot_be_quantised_is_refused() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.GELU())
    with pytest.raises(DataError, match="quantises 1, which is a GELU"):
        plan_scales(net, plan_for("1", 1.0))
    with pytest.raises(DataError, match="The range of 0 is"):
        plan_scales(net, plan_for("0", None))
    with pytest.raises(DataError, match="1 is a GELU"):
        apply_scales(net, {"1": Quantization(0.1, np.ones(4, np.float32))})
    with torch.no_grad():
        net[0].weight[2, 1, 0, 0] = math.nan  # type: ignore[operator]
    with pytest.raises(DataError, match="weights that are NaN"):
        plan_scales(net, plan_for("0", 1.0))
