"""How a missing library is installed: the rule, on machines that are made up."""

from __future__ import annotations

import platform
import sys
from importlib import metadata
from pathlib import Path

import pytest

from pcn_deploy import remedies
from pcn_deploy.engines.tensorrt.flavour import TENSORRT, TENSORRT_RTX
from pcn_deploy.errors import DependencyError
from pcn_deploy.remedies import LIBRARIES, Machine, install

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomllib")

CHECKOUT, INDEX = Machine(), Machine(from_index=True)
JETSON = Machine(jetson=True)


def test_in_a_checkout_the_libraries_are_named() -> None:
    assert install("plot", machine=CHECKOUT) == "Install it: pip install matplotlib"
    assert install("tensorrt", machine=CHECKOUT) == "Install it: pip install 'tensorrt>=10.3'"
    assert install("tensorrt-rtx", machine=CHECKOUT).startswith("Install it: pip install 'tensorrt-rtx-cu13==1.7.1.*' ")
    assert "'torch>=2.9,<2.16' onnx onnx-ir " in install("compile", machine=CHECKOUT)
    assert not any("pcn-deploy" in install(extra, machine=CHECKOUT) for extra in LIBRARIES)


def test_where_our_name_installs_something_it_is_used() -> None:
    assert install("compile", machine=INDEX) == "Install it: pip install 'pcn-deploy[compile]'"


def test_on_a_jetson_tensorrt_comes_from_apt() -> None:
    for machine in (JETSON, Machine(jetson=True, from_index=True)):
        line = install("tensorrt", machine=machine)
        assert "sudo apt-get install python3-libnvinfer" in line and "--system-site-packages" in line
        assert "pip" not in line
        assert install("tensorrt-rtx", machine=machine) == "There is no TensorRT-RTX for Jetson: take target tensorrt"
    assert install("runtime", machine=JETSON) == "Install it: pip install onnxruntime pillow"


def test_a_part_of_an_extra_and_a_broken_library() -> None:
    for machine in (CHECKOUT, INDEX, JETSON):
        line = install("compile", only=("onnx", "torch"), machine=machine)
        assert line == "Install it: pip install 'torch>=2.9,<2.16' onnx"
    again = install("runtime", only=("onnxruntime",), again=True, machine=CHECKOUT)
    assert again == "Install it again: pip install --force-reinstall onnxruntime"


@pytest.mark.parametrize(
    ("machine", "release", "file", "expected"),
    [
        ("aarch64", "5.15.148-tegra", False, True),
        ("aarch64", "6.8.0", True, True),
        ("aarch64", "6.11.0-1016-nvidia", False, False),  # a DGX Spark
        ("x86_64", "6.8.0", False, False),
        ("x86_64", "6.8.0-tegra", True, False),
    ],
)
def test_what_a_jetson_is_known_by(
    machine: str, release: str, file: bool, expected: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "nv_tegra_release"
    if file:
        path.touch()
    monkeypatch.setattr(remedies, "TEGRA_RELEASE", path)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(platform, "release", lambda: release)
    assert Machine.here().jetson is expected
    apt = "apt-get install python3-libnvinfer"
    assert (apt in TENSORRT.remedy) is expected
    assert ("no TensorRT-RTX for Jetson" in TENSORRT_RTX.remedy) is expected
    assert (apt in str(DependencyError.for_extra("tensorrt", "tensorrt", "building it"))) is expected


class Installed:
    """A fake of what pip left behind."""

    def __init__(self, **files: str) -> None:
        self.files = files

    def read_text(self, name: str) -> str | None:
        return self.files.get(name.partition(".")[0])


@pytest.mark.parametrize(
    ("installed", "expected"),
    [
        (Installed(INSTALLER="pip"), True),
        (Installed(INSTALLER="pip", direct_url='{"url": "file:///checkout"}'), False),
        (Installed(), False),  # an .egg-info beside a checkout
        (None, False),
    ],
)
def test_how_it_is_known_whether_our_name_installs_something(
    installed: Installed | None, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def distribution(_name: str) -> Installed:
        if installed is None:
            raise metadata.PackageNotFoundError
        return installed

    monkeypatch.setattr(metadata, "distribution", distribution)
    assert Machine.here().from_index is expected
    assert ("pcn-deploy[runtime]" in str(DependencyError.for_extra("Pillow", "runtime", "reading"))) is expected


def test_the_libraries_are_those_of_the_extras() -> None:
    from packaging.requirements import Requirement

    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())
    for extra, libraries in LIBRARIES.items():
        every = [Requirement(line) for line in project["project"]["optional-dependencies"][extra]]
        here = {each.name: each for each in every if each.marker is None or each.marker.evaluate()}
        named = [Requirement(line) for line in libraries]
        assert {each.name for each in named} == set(here), extra
        for each in named:
            assert each.specifier == here[each.name].specifier or not each.specifier, each


def test_every_extra_that_an_error_names_has_its_libraries() -> None:
    from pcn_deploy.engines.registry import TARGETS, get_backend

    assert {get_backend(target).extra for target in TARGETS} <= set(LIBRARIES)
