"""The wheel holds what the checkout holds, under one name."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import pcn_deploy
from pcn_deploy.remedies import LIBRARIES

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomllib")

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SETUPTOOLS = PROJECT["tool"]["setuptools"]
MAPPED: dict[str, str] = SETUPTOOLS["package-dir"]


def packages_on_disk() -> set[str]:
    """Every folder with an `__init__.py` below a mapped folder, by the name it installs under. Links are not walked."""
    found = set()
    for package, folder in MAPPED.items():
        for place, folders, files in os.walk(ROOT / folder):
            folders[:] = [name for name in folders if not (Path(place) / name).is_symlink() and name != "__pycache__"]
            if "__init__.py" in files:
                found.add(".".join([package, *Path(place).relative_to(ROOT / folder).parts]))
    return found


def test_the_packages_listed_are_the_folders_there_are() -> None:
    listed = SETUPTOOLS["packages"]
    assert len(set(listed)) == len(listed)
    assert set(listed) == packages_on_disk()


def test_no_module_is_outside_a_package() -> None:
    """A folder without `__init__.py` is left out of the wheel without a word."""
    for folder in MAPPED.values():
        for module in (ROOT / folder).rglob("*.py"):
            assert (module.parent / "__init__.py").is_file(), module


def test_the_links_lead_to_the_mapped_folders() -> None:
    links = {package: ROOT / package.replace(".", "/") for package in MAPPED if "." in package}
    assert links
    if not any(link.is_symlink() for link in links.values()):
        pytest.skip("this checkout has no links")
    for package, link in links.items():
        assert link.is_symlink(), package
        assert link.resolve() == (ROOT / MAPPED[package]).resolve()
        assert not link.readlink().is_absolute()


def test_there_is_one_version() -> None:
    assert PROJECT["project"]["version"] == pcn_deploy.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+", pcn_deploy.__version__)


def test_every_public_name_can_be_imported() -> None:
    assert {"compile", "load", "verify", "create_model", "CompileOptions", "PcnDeployError"} <= set(pcn_deploy.__all__)
    for name in pcn_deploy.__all__:
        assert getattr(pcn_deploy, name).__module__.startswith("pcn_deploy."), name
    assert set(dir(pcn_deploy)) == {*pcn_deploy.__all__, "__version__"}
    with pytest.raises(AttributeError, match=r"no attribute 'nothing'"):
        _ = pcn_deploy.nothing


def test_extras_named_in_messages_exist() -> None:
    extras = set(PROJECT["project"]["optional-dependencies"])
    named = set()
    for folder in MAPPED.values():
        for module in (ROOT / folder).rglob("*.py"):
            text = module.read_text()
            named |= set(re.findall(r"install\([\"']([a-z-]+)[\"']", text))
            named |= set(re.findall(r"for_extra\([^)]*?, \"([a-z-]+)\",", text))
            named |= set(re.findall(r"^    extra = \"([a-z-]+)\"", text, re.MULTILINE))
    assert named == {"compile", "plot", "runtime", "tensorrt", "tensorrt-rtx"}
    assert named == set(LIBRARIES) <= extras


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Names inside a wheel built from a copy of the checkout, so that nothing is left in it."""
    pytest.importorskip("setuptools", minversion="77")
    copy, out = tmp_path_factory.mktemp("checkout"), tmp_path_factory.mktemp("wheel")
    for folder in MAPPED.values():
        shutil.copytree(ROOT / folder, copy / folder, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, copy)
    code = f"from setuptools.build_meta import build_wheel; print(build_wheel({str(out)!r}))"
    built = subprocess.run([sys.executable, "-c", code], cwd=copy, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    with zipfile.ZipFile(next(out.glob("*.whl"))) as archive:
        return archive.namelist()


def test_the_wheel_has_one_name_on_top(wheel: list[str]) -> None:
    tops = {name.split("/")[0] for name in wheel}
    assert tops == {"pcn_deploy", f"pcn_deploy-{pcn_deploy.__version__}.dist-info"}


def test_the_wheel_holds_every_module_and_the_marker_of_types(wheel: list[str]) -> None:
    expected = {"pcn_deploy/py.typed"}
    for package in packages_on_disk():
        home = next(name for name in sorted(MAPPED, key=len, reverse=True) if f"{package}.".startswith(f"{name}."))
        folder = ROOT / MAPPED[home] / Path(*package.removeprefix(home).strip(".").split("."))
        expected |= {f"{package.replace('.', '/')}/{module.name}" for module in folder.glob("*.py")}
    assert expected == {name for name in wheel if name.startswith("pcn_deploy/")}
