"""FP8 (E4M3): its codes, its plan, builds, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
from helpers import invoke, refused
from hypothesis import given
from hypothesis import strategies as st
from small_builds import images, needs_rtx, network, options
from torch import Tensor, nn

import pcn_deploy
from pcn_deploy import CompileResult, Engine
from pcn_deploy.calibration.plan.recipe import parse_recipe, write_recipe
from pcn_deploy.calibration.plan.rules import LayerFacts, make_plan
from pcn_deploy.calibration.quantized import fake_quantize, quantize_weight, round_to_e4m3
from pcn_deploy.engines.tensorrt.backend import TensorRTRTXBackend
from pcn_deploy.errors import OptionError

FP8 = onnx.TensorProto.FLOAT8E4M3FN


def build(**given: Any) -> CompileResult:
    return pcn_deploy.compile(network(), options(precision="fp8", **given), calibration=images(16))


def test_codes_at_the_edges() -> None:
    values = [0.0, 448.0, 464.0, 1e9, -1e9, 2.0**-9, 2.0**-10, 1.5 * 2.0**-10, 1.0625, 1.1875, -1.0625]
    wanted = [0.0, 448.0, 448.0, 448.0, -448.0, 2.0**-9, 0.0, 2.0**-9, 1.0, 1.25, -1.0]
    assert round_to_e4m3(torch.tensor(values)).tolist() == wanted


@given(st.lists(st.floats(-500, 500, width=32), min_size=1, max_size=50), st.floats(2.0**-10, 2.0**10, width=32))
def test_codes_are_those_of_the_graph(values: list[float], scale: float) -> None:
    """The graph's weights are rounded by numpy, the quantised module's by torch."""
    array = np.array(values, np.float32)
    stored = (array / np.float32(scale)).clip(-448, 448).astype(ml_dtypes.float8_e4m3fn)
    expected = stored.astype(np.float32) * np.float32(scale)
    np.testing.assert_array_equal(fake_quantize(torch.from_numpy(array), scale, "fp8").numpy(), expected)
    rounded = quantize_weight(torch.from_numpy(array), torch.tensor([scale]), "fp8")
    np.testing.assert_array_equal(rounded.numpy(), expected)


def test_the_plan() -> None:
    def one(**facts: Any) -> str:
        wide = {"rows": 49, "in_channels": 64, "out_channels": 64, **facts}
        layers = [LayerFacts(path="other", kind="Linear", rows=49, in_channels=64, out_channels=64)]
        plan = make_plan([*layers, LayerFacts(path="a", kind="Conv2d", **wide)], "fp8")
        return f"{plan.entries[1].precision}: {plan.entries[1].reason}"

    assert one(kernel=(3, 3)) == "fp8: dense product of enough rows and channels"
    assert one(kernel=(7, 7)) == "fp16: a kernel of 49 positions; FP8 takes 32"
    assert one(in_channels=3, reads_image=True) == "fp16: FP8 kernels take multiples of 16 channels"
    assert one(groups=64).startswith("fp16: depthwise")


@pytest.mark.parametrize("remainder", ["fp16", "fp32"])
def test_a_build_keeps_parity_and_stores_fp8(remainder: str) -> None:
    result = build(remainder=remainder, targets=("cpu", "torchscript"))
    assert result
    assert all(30 < report.metrics["sqnr_db"] < 60 for report in result.reports)
    graph = onnx.load_from_string(result.bundle.read("model.onnx")).graph
    codes = [tensor for tensor in graph.initializer if tensor.name.endswith(".weight.fp8")]
    quantized = result.plan.quantized_entries
    assert len(codes) == len(quantized) > 2
    assert {tensor.data_type for tensor in codes} == {FP8}
    assert all(not scale.dims for scale in graph.initializer if scale.name.endswith(".weight.scale")), "one per weight"
    types = {tensor.name: tensor.data_type for tensor in graph.initializer}
    assert {types[node.input[2]] for node in graph.node if node.op_type == "QuantizeLinear"} == {FP8}
    assert result.bundle.manifest.calibration["calibrator"] == "max"
    assert result.bundle.manifest.remainder == remainder


class Rectified(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.ReLU())
        self.head = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.layers(x).mean((2, 3)))
        return y


def test_a_relu_before_the_codes_is_executed() -> None:
    """ONNX Runtime 1.31.1 drops it unless told not to: then the graphs differ and the build stops."""
    chosen = options(precision="fp8", remainder="fp32")
    given = images(8) * np.linspace(0.2, 2, 8, dtype=np.float32).reshape(8, 1, 1, 1)  # images that differ
    assert pcn_deploy.compile(Rectified(), chosen, calibration=given)


@needs_rtx
def test_tensorrt_rtx_builds_for_the_gpus_that_have_it() -> None:
    result = build(targets=("tensorrt-rtx",))
    assert result
    (built,) = (engine.built_with for engine in result.bundle.manifest.engines)
    assert built["compute_capabilities"] == "SM89, SM120"
    assert "FP8" in built["layers"]


def test_gpus_without_it_are_refused() -> None:
    with pytest.raises(OptionError, match=r"SM80, SM86 cannot compute in FP8; Ada \(SM89\)"):
        TensorRTRTXBackend(compute_capabilities=("SM80", "SM86")).check_precision("fp8")
    with pytest.raises(OptionError, match=r"^SM86 cannot compute in FP8"):
        TensorRTRTXBackend(compute_capabilities=("SM86", "SM89")).check_precision("fp8")
    TensorRTRTXBackend(compute_capabilities=("SM86",)).check_precision("int8")
    TensorRTRTXBackend().check_precision("fp8")


@pytest.mark.parametrize("calibrator", ["entropy", "mse", "auto"])
def test_calibrators_for_equal_steps_are_refused(calibrator: str) -> None:
    with pytest.raises(OptionError, match=r"those of FP8 grow with the value\. Take max or percentile"):
        options(precision="fp8", calibrator=calibrator)


def test_weights_and_recovery_for_int8_are_refused() -> None:
    with pytest.raises(OptionError, match="weight calibrator 'mse'"):
        options(precision="fp8", weight_calibrator="mse")
    with pytest.raises(OptionError, match="makes up for INT8"):
        options(precision="fp8", recovery=("bias-correction",))


def test_a_recipe_builds_the_same_graph() -> None:
    first = build()
    recipe = parse_recipe(write_recipe(first.plan), "plan.toml")
    assert (recipe.precision, recipe.remainder) == ("fp8", "fp16")
    second = pcn_deploy.compile(network(), options(precision="fp8", recipe=recipe))
    assert second.bundle.read("model.onnx") == first.bundle.read("model.onnx")
    edited = write_recipe(first.plan).replace('precision = "fp8"\ninput_amax', 'precision = "int8"\ninput_amax')
    with pytest.raises(OptionError, match="precision is 'int8'; expected fp8 or fp16 or fp32"):
        parse_recipe(edited, "plan.toml")


def test_a_budget_is_searched_and_proven() -> None:
    result = pcn_deploy.compile(
        network(), options(precision="fp8", max_drop=6.0), calibration=images(16), evaluation=[images(160)]
    )
    assert result
    assert result.search is not None
    assert len(result.proofs) == 1


def test_the_command(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file(network().state_dict(), tmp_path / "small.safetensors")
    np.savez(tmp_path / "images.npz", images=images(16))
    given = ["build", "patchconvnet", "--weights", tmp_path / "small.safetensors", "--resolution", 32]
    out = tmp_path / "small.pcn"
    refused(invoke(*given, "--precision", "fp8", "-o", out), 1, "INT8 and FP8 need calibration images")
    result = invoke(*given, "--precision", "fp8", "--calibration", tmp_path / "images.npz", "-o", out, "--explain")
    assert result.exit_code == 0, result.output
    assert "Ranges: max on 16 images" in result.output
    shown = invoke("inspect", out)
    assert "fp8, rest fp16" in shown.output
    with Engine.open(pcn_deploy.Bundle.open(out), "cpu") as engine:
        assert engine.predict(images(3)).shape == (3, 5)
