"""Weight rounding and bias correction: less error, on the grid, the same bits in every graph, nothing infinite."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from recovery_networks import SHAPE, TRANSFORM, images, logits_sqnr, prepared, source
from torch import Tensor, nn

from pcn_deploy.calibration.quantized import Quantization, apply_scales, quantize_weight
from pcn_deploy.calibration.recovery import RECOVERIES, apply_after
from pcn_deploy.calibration.recovery.trial import EVERY
from pcn_deploy.data.sampling import spread
from pcn_deploy.graph.export import to_onnx
from pcn_deploy.specs import BatchRange
from pcn_deploy.verbs.steps.prepared import Prepared

AFTER = ("weight-rounding", "bias-correction")


def correlated(*, bias: bool = True) -> Any:
    """A wide first layer makes channels that depend on each other, which is what GPTQ uses."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 64, 3, bias=bias), nn.ReLU(), nn.Conv2d(64, 32, 3, padding=1, bias=bias)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 16)).eval()


def layer_errors(net: nn.Module, network: Prepared) -> dict[str, float]:
    """Squared error of each layer's output by its weights alone, on its quantised inputs."""
    quantized, found = apply_scales(network.deployed, network.scales), {}

    def hook(path: str) -> Any:
        def compare(layer: Any, inputs: tuple[Tensor, ...]) -> None:
            x = torch.fake_quantize_per_tensor_affine(inputs[0], layer.input_scale, 0, -128, 127)
            plain: Any = network.unrounded.get_submodule(path)
            found[path] = float((layer._conv_forward(x, layer.weight - plain.weight, None)).square().sum())

        return compare

    for path in network.scales:
        quantized.get_submodule(path).register_forward_pre_hook(hook(path))
    with torch.inference_mode():
        quantized(torch.from_numpy(images()))
    return found


@pytest.mark.parametrize("remainder", ["fp16", "fp32"])
@pytest.mark.usefixtures("every_recovery_kept")
def test_rounding_lowers_the_output_error_and_stays_on_the_grid(remainder: str) -> None:
    net = correlated()
    nearest, rounded = (prepared(net, names, remainder=remainder) for names in ((), AFTER[:1]))
    before, after = layer_errors(net, nearest), layer_errors(net, rounded)
    assert after["2"] < 0.5 * before["2"]
    assert all(after[path] <= before[path] * 1.001 for path in before)
    assert rounded.recovered == {"weight-rounding": 2}
    for path, scale in rounded.scales.items():
        changed: Any = rounded.deployed.get_submodule(path)
        weight: Tensor = changed.weight.detach()
        shaped = torch.from_numpy(scale.weight).reshape(-1, 1, 1, 1)
        codes = (weight / shaped).round()
        assert codes.abs().max() <= 127
        assert torch.equal(codes * shaped, weight)
        assert torch.equal(quantize_weight(weight, torch.from_numpy(scale.weight)), weight)
        np.testing.assert_array_equal(scale.weight, nearest.scales[path].weight)


@pytest.mark.usefixtures("every_recovery_kept")
def test_the_graph_holds_the_codes_of_the_module() -> None:
    network = prepared(correlated(), RECOVERIES)
    quantized = apply_scales(network.deployed, network.scales)
    graph = to_onnx(network.deployed, SHAPE, BatchRange(), network.scales).graph
    for path, scale in network.scales.items():
        layer: Any = quantized.get_submodule(path)
        codes = graph.initializers[f"{path}.weight.int8"].const_value
        assert codes is not None
        shaped = torch.from_numpy(scale.weight).reshape(-1, 1, 1, 1)
        assert torch.equal(torch.from_numpy(codes.numpy().astype(np.float32)) * shaped, layer.weight)
        plain: Any = network.unrounded.get_submodule(path)
        nearest = quantize_weight(plain.weight.detach(), torch.from_numpy(scale.weight))
        assert not torch.equal(nearest, layer.weight)


def skewed() -> Any:
    """Weights that are all rounded down, on inputs above zero: the mean of the output falls."""
    torch.manual_seed(0)
    net: Any = nn.Sequential(nn.Conv2d(3, 16, 1), nn.ReLU(), nn.Conv2d(16, 16, 1, bias=False)).eval()
    with torch.no_grad():
        net[0].bias.add_(2.0)
        net[2].weight.fill_(0.45 / 127)
        net[2].weight[:, 0] = 1.0
    return nn.Sequential(*net, nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()


@pytest.mark.usefixtures("every_recovery_kept")
def test_bias_correction_takes_back_a_shift() -> None:
    net = skewed()
    assert logits_sqnr(net, ("bias-correction",)) > logits_sqnr(net, ()) + 6
    network = prepared(net, ("bias-correction",))
    assert network.recovered == {"bias-correction": 2}
    assert isinstance(network.deployed.get_submodule("2").bias, nn.Parameter), "a layer without bias is given one"
    x = torch.from_numpy(np.delete(images(), spread(len(images()), len(images()) // EVERY), 0))  # those that choose
    with torch.inference_mode():
        shift = apply_scales(network.deployed, network.scales)(x).mean(0) - net(x).mean(0)
    assert float(shift.abs().max()) < 1e-5, "downstream of every correction"


@pytest.mark.usefixtures("every_recovery_kept")
def test_only_what_is_int8_changes_and_a_layer_left_out_is_itself_again() -> None:
    net = correlated()
    network = prepared(net, AFTER)
    assert "5.weight" in network.deployed.state_dict()  # the head is no INT8 layer
    assert torch.equal(network.deployed.state_dict()["5.weight"], net.state_dict()["5.weight"])
    left = network.leave_out(frozenset({"2"}), "a test")
    state = left.deployed.state_dict()
    assert torch.equal(state["2.weight"], net.state_dict()["2.weight"])
    assert torch.equal(state["2.bias"], net.state_dict()["2.bias"])
    assert torch.equal(state["0.weight"], network.deployed.state_dict()["0.weight"])
    assert "2" not in left.scales


@pytest.mark.usefixtures("every_recovery_kept")
def test_the_caller_s_network_is_left_alone_and_runs_repeat_to_the_bit() -> None:
    net = correlated(bias=False)
    state = {key: tensor.clone() for key, tensor in net.state_dict().items()}
    first, second = prepared(net, RECOVERIES), prepared(net, RECOVERIES)
    assert state.keys() == net.state_dict().keys()
    assert all(torch.equal(tensor, state[key]) for key, tensor in net.state_dict().items())
    again = second.deployed.state_dict()
    assert first.deployed.state_dict().keys() == again.keys() > state.keys()
    assert all(torch.equal(tensor, again[key]) for key, tensor in first.deployed.state_dict().items())


@pytest.mark.parametrize(
    "given",
    [images(1), np.ones((3, *SHAPE), np.float32), np.full((2, *SHAPE), 1e-30, np.float32)],
    ids=["a single image", "constant images", "tiny values"],
)
def test_poor_images_give_finite_weights(given: np.ndarray[tuple[int, ...], np.dtype[np.float32]]) -> None:
    net = correlated()
    with torch.no_grad():
        net[2].weight[:, 5] = 0
        net[0].weight[7] = 0
        net[0].bias[7] = 0
    network = prepared(net, RECOVERIES, given)
    assert all(tensor.isfinite().all() for tensor in network.deployed.state_dict().values())
    assert all(scale.input > 0 and (scale.weight > 0).all() for scale in network.scales.values())
    with torch.inference_mode():
        assert apply_scales(network.deployed, network.scales)(torch.from_numpy(images())).isfinite().all()


def test_inputs_that_round_to_zero_leave_the_weights() -> None:
    """H is zero: there is nothing to weigh errors with."""
    net = correlated()
    network = prepared(net, ())
    scales = {path: Quantization(100.0, scale.weight) for path, scale in network.scales.items()}
    changed, counts = apply_after(net, scales, source(), ("weight-rounding",))
    assert counts == {"weight-rounding": 0}
    assert torch.equal(changed.state_dict()["2.weight"], net.state_dict()["2.weight"])


def test_more_second_moments_than_fit_take_several_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    net = correlated()
    whole = prepared(net, ("weight-rounding",))
    monkeypatch.setattr("pcn_deploy.calibration.recovery.weight_rounding.MEMORY", 1)
    parts = prepared(net, ("weight-rounding",))
    assert parts.recovered == whole.recovered
    assert torch.equal(parts.deployed.state_dict()["0.weight"], whole.deployed.state_dict()["0.weight"])
    assert TRANSFORM.resolution == SHAPE[1:]
