"""INT8 or FP16, whichever is faster among those that pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import invoke
from small_builds import images, needs_rtx, network, options

import pcn_deploy
from pcn_deploy import CompileOptions, CompileResult
from pcn_deploy.engines.registry import get_backend
from pcn_deploy.errors import OptionError
from pcn_deploy.verbs.steps import fastest as choice_module
from pcn_deploy.verbs.steps.fastest import compile_fastest, decide

torch = pytest.importorskip("torch")


@pytest.fixture(autouse=True)
def short_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """How long each is timed is no matter here."""
    monkeypatch.setattr(choice_module, "SECONDS", 0.01)


def build_with(model: Any, calibration: Any) -> Any:
    def build(chosen: CompileOptions) -> CompileResult:
        return pcn_deploy.compile(model, chosen, calibration=calibration)

    return build


@pytest.mark.parametrize(
    ("int8", "fp16", "kept", "words"),
    [
        (1.0, 2.0, "int8", "2.00 x as fast: 1.000 ms in INT8, 2.000 ms in FP16 on cpu"),
        (1.0, 1.01, "fp16", "not worth it here"),
        (3.0, 1.0, "fp16", "not worth it here: 3.000 ms in INT8, 1.000 ms in FP16 on cpu"),
    ],
)
def test_the_faster_is_kept_if_it_is_clearly_faster(int8: float, fp16: float, kept: str, words: str) -> None:
    choice = decide({"int8": int8, "fp16": fp16}, "cpu")
    assert choice.precision == kept
    assert words in choice.reason


def test_both_are_built_and_timed() -> None:
    result, choice = compile_fastest(
        build_with(network(), images()),
        options(batch=pcn_deploy.BatchRange(), recovery=("bias-correction",), precision="int8"),
    )
    assert result
    assert set(choice.latency_ms) == {"int8", "fp16"}
    assert choice.target == "cpu"
    assert result.bundle.manifest.precision == choice.precision
    faster = min(choice.latency_ms, key=lambda name: choice.latency_ms[name])
    assert choice.precision in (faster, "fp16")
    assert result.bundle.manifest.choice["reason"] == choice.reason


def test_a_network_without_int8_layers_becomes_fp16() -> None:
    narrow = torch.nn.Sequential(torch.nn.Conv2d(3, 6, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    result, choice = compile_fastest(build_with(narrow.eval(), images()), options())
    assert (choice.precision, result.bundle.manifest.precision) == ("fp16", "fp16")
    assert choice.reason.startswith("INT8 is not possible: No layer of this network gains from INT8")


def test_int8_that_breaks_its_budget_gives_way() -> None:
    """The INT8 result is replaced by one that failed, a fake, for our own decision."""
    passed = pcn_deploy.compile(network(), options(precision="fp16"))

    def build(chosen: CompileOptions) -> CompileResult:
        return _Failed(**vars(passed)) if chosen.precision == "int8" else passed

    result, choice = compile_fastest(build, options())
    assert (choice.precision, choice.reason) == ("fp16", "INT8 is not possible: INT8 broke its parity budget")
    assert result.bundle.manifest.precision == "fp16"


class _Failed(CompileResult):
    def __bool__(self) -> bool:
        return False


@needs_rtx
@pytest.mark.skipif(get_backend("tensorrt-rtx").availability().can_run, reason="TensorRT-RTX runs here: it is timed")
def test_a_target_that_cannot_run_here_is_not_timed() -> None:
    targets = options(targets=("cpu", "tensorrt-rtx"))
    _, choice = compile_fastest(build_with(network(), images()), targets)
    assert (choice.precision, choice.target, choice.latency_ms) == ("int8", "", {})
    assert "tensorrt-rtx cannot run here" in choice.reason


def test_the_command_says_which_was_kept_and_why(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file(network().state_dict(), tmp_path / "small.safetensors")
    np.savez(tmp_path / "images.npz", images=images(8))
    words = ["build", "patchconvnet", "--weights", tmp_path / "small.safetensors", "--resolution", 32]
    words += ["--precision", "auto", "--calibration", tmp_path / "images.npz", "-o", tmp_path / "out.pcn"]
    result = invoke(*words, "-q")
    assert result.exit_code == 0, result.output
    (line,) = [line for line in result.stdout.splitlines() if line.startswith("Kept ")]
    kept = line.split()[1].rstrip(":")
    assert line.startswith(f"Kept {kept}: ")
    manifest = pcn_deploy.Bundle.open(tmp_path / "out.pcn").manifest
    assert (manifest.precision, manifest.choice["precision"]) == (kept, kept)


def test_a_target_that_has_no_fp16_is_refused_before_anything_is_built() -> None:
    def build(_options: CompileOptions) -> CompileResult:
        pytest.fail("built for nothing")

    with pytest.raises(OptionError, match="target torchscript cannot be fp16"):
        compile_fastest(build, options(precision="int8", targets=("cpu", "torchscript")))
