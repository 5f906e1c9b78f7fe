"""Verdicts on engines in plain words. What only a GPU could answer comes from a FAKE runtime, and says so."""

from __future__ import annotations

import logging
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import pytest

from pcn_deploy.engines.tensorrt import library
from pcn_deploy.engines.tensorrt.compatibility import check_validity, plainly
from pcn_deploy.engines.tensorrt.cuda import Device
from pcn_deploy.engines.tensorrt.flavour import TENSORRT_RTX
from pcn_deploy.engines.tensorrt.messages import Messages, log_of
from pcn_deploy.errors import IncompatibleError

H200 = Device("NVIDIA H200", "SM90")


def rtx() -> Any:
    """The real library. Where its package is installed, a library that does not load fails the test."""
    if find_spec(TENSORRT_RTX.module) is None:
        pytest.skip(f"TensorRT-RTX is not installed. {TENSORRT_RTX.remedy}")
    return library.load(TENSORRT_RTX)


@pytest.mark.parametrize(
    ("message", "words"),
    [
        (
            "Error Code 6: API Usage Error (The engine plan file is generated on an incompatible device, "
            "expecting compute 8.9 got compute 8.6, please rebuild.)",
            "the engine was built for compute capability 8.6; this device (RTX 4090 (SM89)) has 8.9",
        ),
        (
            "Serialization assertion stdVersionRead == kSERIALIZATION_VERSION failed."
            "Version tag does not match. Note: Current Version: 237, Serialized Engine Version: 239",
            "the engine was built with another version of TensorRT (its format is number 239); "
            "here is TensorRT 10.3.0 (format number 237)",
        ),
        ("Something new", "Something new"),
    ],
)
def test_messages_in_plain_words(message: str, words: str) -> None:
    assert plainly(message, "TensorRT 10.3.0", Device("RTX 4090", "SM89")) == words


def verdict(name: str, diagnosis: int, device: Device = H200) -> None:
    """Ask a FAKE runtime, whose answer would need a GPU; the enumerations are the real ones."""
    trt = rtx()
    answer = (getattr(trt.EngineValidity, name), diagnosis)
    runtime = SimpleNamespace(get_engine_validity=lambda _data: answer)
    check_validity(TENSORRT_RTX, trt, runtime, b"engine", device, Messages())


def test_a_valid_engine_passes() -> None:
    verdict("VALID", 0)


def test_a_suboptimal_engine_passes_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, logger="pcn_deploy")  # whatever level a command has set before
    verdict("SUBOPTIMAL", 4)
    assert "may be slow: it needs a newer CUDA driver" in caplog.text


@pytest.mark.parametrize(
    ("diagnosis", "words"),
    [
        (1, r"another release than TensorRT-RTX 1\."),
        (2, r"not built for the compute capability of this device \(NVIDIA H200 \(SM90\)\)"),
        (2 | 4, "compute capability .*; it needs a newer CUDA driver"),
        (32, "header is not that of an engine"),
        (0, "gave no reason"),
    ],
)
def test_an_invalid_engine_is_refused_in_plain_words(diagnosis: int, words: str) -> None:
    with pytest.raises(IncompatibleError, match=words):
        verdict("INVALID", diagnosis)


@pytest.mark.parametrize(
    ("capability", "words"),
    [
        ("SM120", r"Rebuild it here with: pcn-compile engine FILE\.pcn --target tensorrt-rtx$"),
        ("SM75", r"Rebuild it with: pcn-compile engine FILE.pcn --target tensorrt-rtx --compute-capability SM75$"),
        (
            "SM90",
            r"does not build for SM90\. Build here with: pcn-compile engine FILE\.pcn --target tensorrt$",
        ),
    ],
)
def test_what_is_advised_helps_on_that_device(capability: str, words: str) -> None:
    with pytest.raises(IncompatibleError, match=words):
        verdict("INVALID", 2, Device("RTX", capability))


def test_the_real_runtime_refuses_what_is_no_engine() -> None:
    trt = rtx()
    log, messages = log_of(trt)
    with pytest.raises(IncompatibleError, match="header is not that of an engine of TensorRT-RTX"):
        check_validity(TENSORRT_RTX, trt, trt.Runtime(log), b"x" * 1000, Device("RTX", "SM89"), messages)
