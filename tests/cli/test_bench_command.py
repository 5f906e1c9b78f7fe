"""`pcn-compile bench`: what it reports, not how fast."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers import invoke, refused

from pcn_deploy.engines.base import Availability
from pcn_deploy.engines.onnxruntime import OnnxRuntimeBackend
from pcn_deploy.engines.torchscript import TorchScriptBackend

pytest.importorskip("torch")


def test_json_keeps_its_keys(path: Path) -> None:
    result = invoke("bench", path, "--seconds", "0.01", "--batch", "2", "--json")
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    found = json.loads(result.stdout)
    assert set(found) == {"cpu", "torchscript", "skipped"}
    assert found["skipped"] == {}
    for target in ("cpu", "torchscript"):
        latency = found[target]["latency_ms"]
        assert 0 < latency["p50"] <= latency["p90"] <= latency["p99"]
        assert found[target]["batch"] == 2
        assert found[target]["throughput_ips"] == pytest.approx(2000 / latency["p50"])


def test_one_target_in_a_table(path: Path) -> None:
    result = invoke("bench", path, "--seconds", "0.01", "--target", "torchscript", "-q")
    assert result.exit_code == 0
    assert "torchscript" in result.stdout
    assert "p99 ms" in result.stdout
    assert "cpu" not in result.stdout
    assert result.stderr == ""


def test_what_cannot_run_is_named(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = Availability(can_build=False, can_run=False, detail="no device", remedy="pip install it")
    monkeypatch.setattr(OnnxRuntimeBackend, "availability", lambda self: missing)
    result = invoke("bench", path, "--seconds", "0.01")
    assert result.exit_code == 0
    assert "cpu was not measured: no device." in result.stdout
    found = json.loads(invoke("bench", path, "--seconds", "0.01", "--json").stdout)
    assert found["skipped"] == {"cpu": "no device"}
    refused(invoke("bench", path, "--target", "cpu"), 7, "'cpu' cannot run here: no device. pip install it")
    monkeypatch.setattr(TorchScriptBackend, "availability", lambda self: missing)
    refused(invoke("bench", path), 7, "None of the engines", "cpu: no device; torchscript: no device")


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--batch", "5"], "takes batches 1:1:4"),
        (["--batch", "0"], "0 is not in the range"),
        (["--seconds", "0"], "time is above 0"),
        (["--seconds", "nan"], "time is above 0"),
    ],
    ids=str,
)
def test_measurements_that_cannot_be(path: Path, words: list[str], text: str) -> None:
    refused(invoke("bench", path, "-q", *words), 2, text)


def test_a_target_the_bundle_lacks(path: Path) -> None:
    refused(invoke("bench", path, "--target", "tensorrt"), 5, "no engine for 'tensorrt'")
