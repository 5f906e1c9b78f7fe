"""The library and its help need no torch, and the runtime half works without it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import pcn_deploy
from pcn_deploy import BatchRange, CompileOptions, Transform
from pcn_deploy.cli.main import COMMANDS
from pcn_deploy.remedies import install

HEAVY = ("torch", "onnx", "onnx_ir", "onnxscript", "onnxruntime", "tensorrt", "tensorrt_rtx", "tensorrt_rtx_bindings")
DEVICE = tuple(name for name in HEAVY if name != "onnxruntime")
"""What is not on a device that has ONNX Runtime alone."""

BLOCK = """
import sys
class Hiding:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] in {blocked!r} else self.finder.find_spec(name, path, target)
    def __getattr__(self, name):
        return getattr(self.finder, name)
sys.meta_path[:] = [Hiding(finder) for finder in sys.meta_path]
"""
"""Makes modules look like ones that are not installed: no finder finds them."""

COMMAND = "from pcn_deploy.cli.main import main; main({words!r}, prog_name='pcn-compile')"


def python(code: str, *, blocked: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    whole = BLOCK.format(blocked=set(blocked) or {""}) + code
    return subprocess.run([sys.executable, "-c", whole], capture_output=True, text=True, check=False, timeout=120)


def command(*words: object, blocked: tuple[str, ...] = DEVICE) -> subprocess.CompletedProcess[str]:
    return python(COMMAND.format(words=[str(word) for word in words]), blocked=blocked)


def succeeded(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle built where there is torch."""
    pytest.importorskip("torch")
    network = pcn_deploy.create_model(
        "patchconvnet", random_weights=True, width=32, depth=1, patch=4, num_classes=3, layer_scale=0.5
    )
    options = CompileOptions(
        precision="int8", transform=Transform(resolution=(32, 32)), batch=BatchRange(min=1, opt=1, max=4)
    )
    images = np.random.default_rng(0).standard_normal((8, 3, 32, 32), dtype=np.float32)
    bundle = pcn_deploy.compile(network, options, calibration=images).bundle
    return bundle.save(tmp_path_factory.mktemp("bundle") / "tiny.pcn")


@pytest.mark.parametrize(
    "module", ["pcn_deploy", "pcn_deploy.cli.main", "pcn_deploy.artefact.engine", "pcn_deploy.engines.tensorrt.backend"]
)
def test_an_import_brings_nothing_heavy(module: str) -> None:
    code = f"import {module}, json; print(json.dumps([name for name in {HEAVY!r} if name in sys.modules]))"
    assert json.loads(succeeded(python(code))) == []


def test_the_blocker_of_these_tests_blocks() -> None:
    done = python("import torch", blocked=("torch",))
    assert done.returncode == 1
    assert "ModuleNotFoundError: No module named 'torch'" in done.stderr


def test_help_of_every_command_needs_nothing_heavy() -> None:
    code = f"""
from click.testing import CliRunner
from pcn_deploy.cli.main import main
for words in [[], *([name] for name in {list(COMMANDS)!r})]:
    result = CliRunner().invoke(main, [*words, "--help"])
    assert result.exit_code == 0, (words, result.output, result.exception)
    assert result.stdout.startswith("Usage: "), words
    assert not [name for name in {HEAVY!r} if name in sys.modules], words
print("done")
"""
    assert succeeded(python(code, blocked=HEAVY)) == "done\n"


def test_the_runtime_half_in_python(path: Path) -> None:
    code = f"""
import numpy, pcn_deploy
with pcn_deploy.load({str(path)!r}, "cpu") as engine:
    report = pcn_deploy.verify(engine)
    logits = engine(numpy.zeros((5, 3, 32, 32), numpy.float32))
assert report, report.failures
assert type(logits) is numpy.ndarray and logits.shape == (5, 3)
print(report.images, "torch" in sys.modules)
"""
    assert succeeded(python(code, blocked=DEVICE)) == "8 False\n"


def test_the_commands_of_the_device(path: Path, tmp_path: Path) -> None:
    picture = tmp_path / "picture.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(picture)
    assert json.loads(succeeded(command("inspect", path, "--json")))["precision"] == "int8"
    assert json.loads(succeeded(command("verify", path, "--json")))["passed"] is True
    assert json.loads(succeeded(command("bench", path, "--seconds", "0.01", "--json")))["cpu"]["batch"] == 1
    assert len(json.loads(succeeded(command("run", path, picture, "--json")))["predictions"]) == 1
    out = tmp_path / "again.pcn"
    assert json.loads(succeeded(command("engine", path, "--target", "cpu", "-o", out, "--json")))["passed"] is True
    assert out.is_file()
    assert json.loads(succeeded(command("models", "--json")))["models"]


def missing(done: subprocess.CompletedProcess[str], *words: str) -> None:
    assert done.returncode == 7, done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr


def test_what_needs_torch_says_so(path: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.pcn"
    done = command("build", "patchconvnet", "--random-weights", "-q", "-o", out)
    missing(done, "torch is not installed", install("compile"))
    assert list(tmp_path.iterdir()) == []


def test_what_needs_onnx_runtime_says_so(path: Path) -> None:
    missing(command("verify", path, "-q", blocked=HEAVY), "onnxruntime", install("runtime"))
    assert json.loads(succeeded(command("inspect", path, "--json", blocked=HEAVY)))["engines"]


def test_doctor_works_with_nothing_installed() -> None:
    found = json.loads(succeeded(command("doctor", "--json", blocked=HEAVY)))
    for target, state in found["targets"].items():
        assert (state["can_build"], state["can_run"]) == (False, False), target
        assert "pip install" in state["remedy"], target
