"""Fixtures that several folders share: deterministic weights and small networks made of them."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from pcn_deploy.models.patchconvnet import PatchConvNet

DATA = Path(__file__).parent / "data"


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
