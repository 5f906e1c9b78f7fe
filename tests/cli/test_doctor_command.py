"""`pcn-compile doctor`."""

from __future__ import annotations

import json
from importlib.metadata import version

import pytest
from click.testing import CliRunner

from pcn_deploy.cli.main import main
from pcn_deploy.engines.base import Availability
from pcn_deploy.engines.onnxruntime import OnnxRuntimeBackend
from pcn_deploy.engines.registry import TARGETS
from pcn_deploy.remedies import install
from pcn_deploy.verbs import doctor


def test_tables() -> None:
    result = CliRunner().invoke(main, ["doctor"])
    assert result.exit_code == 0
    assert result.stderr == ""
    for words in (*TARGETS, version("numpy"), "onnxruntime", "Targets", "Packages"):
        assert words in result.stdout


def test_json() -> None:
    result = CliRunner().invoke(main, ["doctor", "--json"])
    assert result.exit_code == 0
    found = json.loads(result.stdout)
    assert set(found) == {"system", "packages", "targets", "can_compile"}
    assert list(found["targets"]) == list(TARGETS)
    assert found["packages"]["numpy"] == version("numpy")
    assert found["targets"]["cpu"]["can_run"] is True


def test_what_is_missing_comes_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = Availability(can_build=False, can_run=False, detail="it is gone", remedy="pip install it")
    monkeypatch.setattr(OnnxRuntimeBackend, "availability", lambda self: missing)
    monkeypatch.setattr(doctor, "_version", lambda package: None)
    result = CliRunner().invoke(main, ["doctor"])
    assert result.exit_code == 0
    for words in ("it is gone", "pip install it", "missing", f"from checkpoints. {install('compile')}."):
        assert words in result.stdout
