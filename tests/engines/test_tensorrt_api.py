"""Every name of TensorRT that the adapter uses, looked up in each flavour that is installed.

To look at a version without its libraries, which are large and need a GPU: install its bindings alone,
such as `tensorrt-cu12-bindings==10.3.0`, and put stub libraries with the sonames and symbols they want on
the loader's path.
"""

from __future__ import annotations

import re
from functools import reduce
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

import pcn_deploy.engines.tensorrt as adapter
from pcn_deploy.engines.tensorrt import library
from pcn_deploy.engines.tensorrt.compatibility import _DIAGNOSES
from pcn_deploy.engines.tensorrt.flavour import PORTABLE, TENSORRT, TENSORRT_RTX, Flavour
from pcn_deploy.engines.tensorrt.run import _DTYPES
from pcn_deploy.engines.tensorrt.wanted import _LAYERS

COMMON = {
    "Builder": "build_serialized_network create_builder_config create_network create_optimization_profile",
    "BuilderFlag": "TF32",
    "IBuilderConfig": "add_optimization_profile clear_flag progress_monitor",
    "ICudaEngine": "create_execution_context get_tensor_dtype get_tensor_mode get_tensor_name num_io_tensors",
    "IExecutionContext": "execute_async_v3 get_tensor_shape set_input_shape set_tensor_address",
    "ILayer": "get_output num_outputs type",
    "ILogger": "log",
    "ILogger.Severity": "ERROR INFO INTERNAL_ERROR VERBOSE WARNING",
    "INetworkDefinition": "get_flag get_input get_layer get_output num_inputs num_layers num_outputs",
    "IOptimizationProfile": "set_shape",
    "IProgressMonitor": "phase_finish phase_start step_complete",
    "ITensor": "dtype name shape",
    "LayerType": " ".join(_LAYERS.values()),
    "DataType": " ".join(_DTYPES),
    "NetworkDefinitionCreationFlag": "STRONGLY_TYPED",
    "OnnxParser": "get_error num_errors parse",
    "Runtime": "deserialize_cuda_engine",
    "TensorIOMode": "INPUT",
}

RTX_ONLY = {
    "ComputeCapability": " ".join(PORTABLE),
    "EngineInvalidityDiagnostics": " ".join(_DIAGNOSES),
    "EngineValidity": "SUBOPTIMAL VALID",
    "IBuilderConfig": "num_compute_capabilities set_compute_capability",
    "Runtime": "get_engine_validity",
}

FLAVOURS = [pytest.param(TENSORRT, id="tensorrt"), pytest.param(TENSORRT_RTX, id="tensorrt-rtx")]


def bindings(flavour: Flavour) -> Any:
    if find_spec(flavour.module) is None:
        pytest.skip(f"{flavour.title} is not installed. {flavour.remedy}")
    return library.load(flavour)


def missing(trt: Any, names: dict[str, str]) -> list[str]:
    absent = object()
    paths = [f"{owner}.{member}" for owner, members in names.items() for member in members.split()]
    found = [reduce(lambda at, part: getattr(at, part, absent), path.split("."), trt) for path in paths]
    return [path for path, value in zip(paths, found, strict=True) if value is absent]


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_every_name_exists(flavour: Flavour) -> None:
    trt = bindings(flavour)
    assert not missing(trt, COMMON), trt.__version__
    if flavour.ahead_of_time:
        assert not missing(trt, RTX_ONLY), trt.__version__


def test_a_name_that_does_not_exist_is_found_out() -> None:
    assert missing(pytest, {"Item": "name no_such_thing", "NoSuchClass": "name"}) == [
        "Item.no_such_thing",
        "NoSuchClass.name",
    ]


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_the_typing_flag_fits_where_networks_are_created(flavour: Flavour) -> None:
    flag = bindings(flavour).NetworkDefinitionCreationFlag.STRONGLY_TYPED
    assert 1 << int(flag) in (1, 2)


def test_the_list_is_whole() -> None:
    folder = Path(str(adapter.__file__)).parent
    code = "".join(path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.py")))
    used = set(re.findall(r"\btrt\.([A-Za-z]\w+)", code))
    assert used <= {*COMMON, *RTX_ONLY}
    assert len(used) > 8
