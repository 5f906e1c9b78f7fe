from __future__ import annotations

from dataclasses import FrozenInstanceError
from typing import Any

import pytest

from pcn_deploy.errors import OptionError
from pcn_deploy.verbs.options import CompileOptions


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"precision": "int4"}, r"Precision 'int4'.*fp32, fp16, bf16, int8, fp8"),
        ({"remainder": "bf16"}, r"remainder 'bf16'.*fp16 or fp32"),
        ({"targets": ()}, "name at least one"),
        ({"targets": ("cpu", "cpu")}, "each only once"),
        ({"targets": ("cpu", "gpu")}, "Unknown target 'gpu'.*cpu, torchscript, tensorrt, tensorrt-rtx"),
        ({"calibrator": "median"}, "Unknown calibrator 'median'.*max, percentile, entropy, mse"),
        ({"percentile": 50}, "Percentile 50: .*above 50"),
        ({"percentile": 101.0, "calibrator": "percentile"}, "Percentile 101"),
        ({"percentile": float("nan")}, "Percentile nan"),
        ({"weight_calibrator": "entropy"}, "Unknown weight calibrator 'entropy'.*max, mse"),
        ({"calibration_images": 0}, "0 calibration images.*expected at least 1"),
        ({"golden_images": 0}, "0 golden images"),
        ({"max_unreadable": -0.1}, r"unreadable share -0\.1"),
        ({"max_unreadable": 1.1}, r"unreadable share 1\.1"),
        ({"max_unreadable": float("nan")}, "unreadable share nan"),
        ({"max_drop": -1.0}, r"--max-drop -1\.0"),
        ({"max_drop": float("nan")}, "--max-drop nan"),
    ],
    ids=str,
)
def test_each_option_is_checked(given: dict[str, Any], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        CompileOptions(**given)


def test_the_edges_are_allowed() -> None:
    options = CompileOptions(max_unreadable=0, max_drop=0, calibration_images=1, golden_images=1)
    assert (options.max_unreadable, options.max_drop) == (0, 0)


@pytest.mark.parametrize(
    ("precision", "remainder", "graph_type"),
    [
        ("fp32", "fp16", "fp32"),
        ("fp16", "fp32", "fp16"),
        ("bf16", "fp16", "bf16"),
        ("int8", "fp16", "fp16"),
        ("int8", "fp32", "fp32"),
    ],
)
def test_the_remainder_counts_with_int8_only(precision: str, remainder: str, graph_type: str) -> None:
    assert CompileOptions(precision=precision, remainder=remainder).graph_type == graph_type


def test_options_are_frozen_and_named() -> None:
    with pytest.raises(FrozenInstanceError):
        CompileOptions().precision = "fp32"  # type: ignore[misc]
    with pytest.raises(TypeError):
        CompileOptions("fp32")  # type: ignore[call-arg]


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_torchscript_is_never_called_what_it_is_not(precision: str) -> None:
    with pytest.raises(OptionError, match="TorchScript module is FP32"):
        CompileOptions(precision=precision, targets=("torchscript",))


def test_recovery_goes_with_int8_and_known_names() -> None:
    assert CompileOptions(precision="int8", recovery=("bias-correction",)).recovery == ("bias-correction",)
    with pytest.raises(OptionError, match=r"Recovery smoothquant.*precision is fp16.*--precision int8"):
        CompileOptions(recovery=("smoothquant",))
    with pytest.raises(OptionError, match=r"Unknown recovery 'adaround'; known are equalisation, smoothquant"):
        CompileOptions(precision="int8", recovery=("adaround",))
