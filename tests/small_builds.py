"""A network that builds in seconds, for the tests of builds."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pcn_deploy
from pcn_deploy import BatchRange, CompileOptions, Transform

RTX_IS_HERE = find_spec("tensorrt_rtx") is not None
needs_rtx = pytest.mark.skipif(not RTX_IS_HERE, reason="TensorRT-RTX is not installed")


WEIGHTS = Path(__file__).parent / "fixtures" / "small_network.safetensors"
"""Random ones, kept because versions of torch draw them differently."""


def network(seed: int = 0) -> Any:
    shape: dict[str, Any] = {"width": 32, "depth": 2, "patch": 4, "num_classes": 5, "layer_scale": 0.5}
    net = pcn_deploy.create_model("patchconvnet", random_weights=True, seed=seed, **shape)
    if seed == 0:
        from safetensors.torch import load_file

        net.load_state_dict(load_file(WEIGHTS))
    return net


def options(**given: Any) -> CompileOptions:
    shape = {"transform": Transform(resolution=(32, 32)), "batch": BatchRange(min=1, opt=2, max=4)}
    return CompileOptions(**{**shape, **given})


def images(count: int = 12) -> Any:
    return np.random.default_rng(1).standard_normal((count, 3, 32, 32), dtype=np.float32)
