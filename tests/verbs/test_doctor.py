from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

import pytest

from pcn_deploy.engines.registry import TARGETS
from pcn_deploy.verbs import doctor
from pcn_deploy.verbs.doctor import PACKAGES, diagnose


def test_it_reports_what_is_installed() -> None:
    found = diagnose()
    assert tuple(found.targets) == TARGETS
    assert set(found.packages) == set(PACKAGES)
    assert found.packages["numpy"] == version("numpy")
    assert found.packages["onnxruntime"] == version("onnxruntime")
    assert found.targets["cpu"].can_build
    assert found.targets["cpu"].can_run
    assert version("onnxruntime") in found.targets["cpu"].detail


def test_what_cannot_run_says_why_and_what_to_do() -> None:
    for target, state in diagnose().targets.items():
        assert state.detail
        assert state.can_build or state.remedy, target


@pytest.mark.parametrize("missing", ["torch", "onnx-ir"])
def test_a_package_that_is_missing(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    def without(package: str) -> str:
        if package == missing:
            raise PackageNotFoundError(package)
        return version(package)

    assert diagnose().can_compile
    monkeypatch.setattr(doctor, "version", without)
    found = diagnose()
    assert found.packages[missing] is None
    assert not found.can_compile
    assert found.packages["numpy"] == version("numpy")
