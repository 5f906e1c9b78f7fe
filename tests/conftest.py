"""Fixtures that several folders share: deterministic weights and small networks made of them."""

from __future__ import annotations

import copy
import gc
import importlib.util
import logging
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from pcn_deploy.models.patchconvnet import PatchConvNet

DATA = Path(__file__).parent / "fixtures"


@pytest.fixture(autouse=True)
def piped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables have the width they have in a pipe, whatever runs the tests (workers of pytest-xdist set one)."""
    monkeypatch.delenv("COLUMNS", raising=False)
    os.unsetenv("COLUMNS")  # readline, which pytest loads, sets it for processes that a test starts


@pytest.fixture(autouse=True)
def log_level() -> None:
    """A command that ran with -q, in another test or in a fixture, leaves no test without warnings."""
    logging.getLogger("pcn_deploy").setLevel(logging.NOTSET)


@pytest.fixture(scope="session", autouse=True)
def operators_read_once() -> Iterator[None]:
    """torch's exporter makes its table of operators anew in every export, a second each; here once per process.

    What the process holds by then is mostly modules: builds collect garbage, and need not look through them each time.
    """
    try:
        from torch.onnx._internal.exporter._registration import ONNXRegistry
    except ImportError:  # without torch, or it lies elsewhere in another version
        yield
        return
    make, tables = ONNXRegistry.from_torchlib, dict[tuple[Any, ...], ONNXRegistry]()

    def from_torchlib(*arguments: Any, **named: Any) -> ONNXRegistry:
        key = (*arguments, *sorted(named.items()))
        if key not in tables:
            tables[key] = make(*arguments, **named)
            gc.freeze()
        table = copy.copy(tables[key])
        table.functions = {target: list(functions) for target, functions in table.functions.items()}
        return table

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ONNXRegistry, "from_torchlib", staticmethod(from_torchlib))
        yield


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Python's own handler of Ctrl-C; a process started in the background by a shell has none."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def fill() -> ModuleType:
    """The filler behind the reference vectors: `fill_(module, seed)`, `images_for(shape, seed)`."""
    spec = importlib.util.spec_from_file_location("fill", DATA / "fill.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def make_net(fill: ModuleType) -> Callable[..., PatchConvNet]:
    """Makes small networks whose norms, biases and LayerScale all matter: width 32, depth 3, 10 classes by default."""
    from pcn_deploy.models.patchconvnet import PatchConvNet

    def make(seed: int = 1, **arguments: Any) -> PatchConvNet:
        net = PatchConvNet(**{"width": 32, "depth": 3, "num_classes": 10, **arguments})
        fill.fill_(net, seed)
        return net.eval()

    return make


@pytest.fixture(scope="session")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small FP32 bundle with engines for `cpu` and `torchscript`, 3 classes, 32x32; copy it before changing it."""
    pytest.importorskip("torch")
    import pcn_deploy

    network = pcn_deploy.create_model(
        "patchconvnet", random_weights=True, width=32, depth=1, patch=4, num_classes=3, layer_scale=0.5
    )
    options = pcn_deploy.CompileOptions(
        precision="fp32",
        targets=("cpu", "torchscript"),
        transform=pcn_deploy.Transform(resolution=(32, 32)),
        batch=pcn_deploy.BatchRange(min=1, opt=1, max=4),
    )
    bundle = pcn_deploy.compile(network, options).bundle
    return bundle.save(tmp_path_factory.mktemp("bundle") / "tiny.pcn")


@pytest.fixture
def path(original: Path, tmp_path: Path) -> Path:
    """A copy of the small bundle that a test may spoil."""
    return Path(shutil.copy(original, tmp_path / "tiny.pcn"))


@pytest.fixture(scope="session")
def original_with_map(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `original`, but 32x48 in batches of 2 to 4, with the attention map of each class, `(N, 3, 8, 12)`."""
    safetensors = pytest.importorskip("safetensors.torch")
    import pcn_deploy

    network = pcn_deploy.create_model(
        "patchconvnet",
        random_weights=True,
        width=32,
        depth=1,
        patch=4,
        num_classes=3,
        layer_scale=0.5,
        multi_class_token=True,
    )
    # Random weights, kept because versions of torch draw them differently; the classes look at different places.
    network.load_state_dict(safetensors.load_file(Path(__file__).parent / "fixtures" / "mapped_network.safetensors"))
    options = pcn_deploy.CompileOptions(
        precision="fp32",
        targets=("cpu", "torchscript"),
        transform=pcn_deploy.Transform(resolution=(32, 48)),
        batch=pcn_deploy.BatchRange(min=2, opt=2, max=4),
        with_attention_map=True,
    )
    bundle = pcn_deploy.compile(network, options).bundle
    return bundle.save(tmp_path_factory.mktemp("bundle") / "mapped.pcn")


@pytest.fixture
def path_with_map(original_with_map: Path, tmp_path: Path) -> Path:
    """A copy of the bundle with the attention map that a test may spoil."""
    return Path(shutil.copy(original_with_map, tmp_path / "mapped.pcn"))


@pytest.fixture
def every_recovery_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep every recovery that changed something: `test_trial.py` has the judgement."""
    from pcn_deploy.calibration.recovery.trial import Trials

    monkeypatch.setattr(Trials, "gains", lambda _self, _name, layers, _quantized: layers > 0)
