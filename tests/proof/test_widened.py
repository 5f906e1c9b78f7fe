"""The graph without its rounding must be the network, to float32; its activation codes must be those planned."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
from helpers import copied
from small_builds import images, network, options

import pcn_deploy
from pcn_deploy import Bundle
from pcn_deploy.proof.executions import prove

pytest.importorskip("torch")

Change = Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]]


@pytest.fixture(scope="module", params=["fp16", "int8", "fp8"])
def built(request: pytest.FixtureRequest) -> Bundle:
    result = pcn_deploy.compile(network(), options(precision=request.param), calibration=[images()])
    assert result, result.reports
    assert result.reports[0].executions["widened"]["sqnr_db"] > 100
    return result.bundle


def changed(bundle: Bundle, suffix: str, change: Change) -> Bundle:
    """The bundle with the first initialiser of this name changed in its graph."""
    graph = onnx.load_from_string(bundle.read("model.onnx"))
    tensor = next(each for each in graph.graph.initializer if each.name.endswith(suffix))
    values = onnx.numpy_helper.to_array(tensor).copy()
    tensor.CopyFrom(onnx.numpy_helper.from_array(change(values).astype(values.dtype), tensor.name))
    wrong = copied(bundle)
    wrong.manifest.engines = []
    wrong.add_engine("cpu", "model.onnx", graph.SerializeToString(), {})
    return wrong


def one_channel(factor: float) -> Change:
    def change(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        flat = values.reshape(-1)
        flat[np.abs(flat.astype(np.float32)).argmax()] *= factor
        return values

    return change


def widened_failures(bundle: Bundle) -> list[str]:
    return [failure for failure in prove(bundle, "cpu").failures if failure.startswith("widened: ")]


@pytest.mark.parametrize("suffix", ["conv_expand.bias", "norm1.weight"])
def test_a_nudge_of_one_channel_is_seen(built: Bundle, suffix: str) -> None:
    assert not widened_failures(built)
    (failure,) = widened_failures(changed(built, suffix, one_channel(0.9)))
    assert "dB of" in failure


@pytest.mark.parametrize("built", ["int8", "fp8"], indirect=True)
@pytest.mark.parametrize(
    ("suffix", "change"), [(".input_scale", one_channel(0.5)), (".weight.scale", one_channel(0.9))]
)
def test_scales_are_seen(built: Bundle, suffix: str, change: Change) -> None:
    assert widened_failures(changed(built, suffix, change))


@pytest.mark.parametrize("built", ["int8"], indirect=True)
def test_a_zero_point_is_seen_and_named(built: Bundle) -> None:
    failures = widened_failures(changed(built, ".input_zero_point", lambda values: values + 1))
    assert any("zero point 1" in failure for failure in failures)


@pytest.mark.parametrize("built", ["int8"], indirect=True)
def test_codes_that_were_left_out_are_named(built: Bundle) -> None:
    """Taking a Q/DQ pair away makes the engine better, and is not what was planned."""
    graph = onnx.load_from_string(built.read("model.onnx"))
    quantize = next(node for node in graph.graph.node if node.op_type == "QuantizeLinear")
    dequantize = next(node for node in graph.graph.node if quantize.output[0] in node.input)
    source, taken = quantize.input[0], [dequantize, quantize]
    for node in graph.graph.node:
        if source in node.output and node.name.endswith(".widen"):  # old versions of ONNX Runtime make codes of FP32
            source = node.input[0]
            taken.append(node)
    for node in graph.graph.node:
        for index, name in enumerate(node.input):
            if name == dequantize.output[0]:
                node.input[index] = source
    for node in taken:
        graph.graph.node.remove(node)
    built.add_engine("cpu", "model.onnx", graph.SerializeToString(), {})
    assert any("nothing has the planned scale of" in failure for failure in widened_failures(built))
