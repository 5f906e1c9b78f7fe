"""Where and why a network cannot be compiled: the path, the line and the advice, for each recognised cause."""

# mypy: disable-error-code="no-untyped-call, no-any-return"

from __future__ import annotations

import linecache
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pcn_deploy.errors import ModelError
from pcn_deploy.graph.export import to_onnx
from pcn_deploy.network.diagnosis.report import output_error, report, running_error
from pcn_deploy.specs import BatchRange

ANY_BATCH = BatchRange(min=1, opt=2, max=4)


class Whole(nn.Module):
    """A network with the module at fault two levels down, behind a block that a run of equal blocks cuts short."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.same = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1))
        self.stage = nn.Sequential(nn.Identity(), part)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.stage(self.same(x))
        return y


def line_of(part: nn.Module) -> int:
    """The line marked HERE in the class."""
    start = type(part).forward.__code__.co_firstlineno
    return next(line for line in range(start, start + 9) if "HERE" in linecache.getline(__file__, line))


def assert_place(message: str, part: nn.Module, path: str = "stage.1") -> None:
    line = line_of(part)
    assert f"{path} (class {type(part).__name__}), {__file__}:{line}\n    " in message, message
    assert linecache.getline(__file__, line).strip() in message, message


class Config:
    factor = 3


# Refused by the exporter.


class ByValue(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:  # HERE
            return x
        return -x


class ToNumpy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.from_numpy(x.numpy())  # HERE


class FixedBatch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(int(x.shape[0]), -1)  # HERE


class FixedTensor(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.zeros(2, 1, 1, 1)  # HERE


class NoCounterpart(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = torch.linalg.svd(x)[1]  # HERE
        return y


class Elsewhere(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.zeros(1, device="meta")  # HERE


@pytest.mark.parametrize(
    ("kind", "advice"),
    [
        (ByValue, "torch.where"),
        (ToNumpy, "register_buffer for constants"),
        (FixedBatch, "--batch N"),
        (FixedTensor, "--batch N"),
        (NoCounterpart, "run it after the engine"),
        (Elsewhere, "device=x.device"),
    ],
)
def test_what_cannot_be_exported(
    kind: Callable[[], nn.Module], advice: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    part = kind()
    monkeypatch.setattr("pcn_deploy.graph.export.find_runs", find_runs_without_a_run(part))
    with pytest.raises(ModelError) as caught:
        to_onnx(Whole(part).eval(), (3, 4, 4), ANY_BATCH, {})
    message = str(caught.value)
    assert message.startswith("The network cannot be exported to ONNX: ")
    assert_place(message, part)
    assert advice in message.splitlines()[-1], message
    if kind is NoCounterpart:
        assert "counterpart of the operator aten._linalg_svd" in message
    assert capfd.readouterr().err == "", "the exporter's own notes are kept from the user"


def find_runs_without_a_run(part: nn.Module) -> Callable[..., list[Any]]:
    """The real search, except for a network that cannot even be executed on the example."""
    from pcn_deploy.graph.repeat import find_runs

    return (lambda *_: []) if isinstance(part, Elsewhere) else find_runs


class OneImage(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(1, 48)  # HERE


def test_a_network_for_one_image_only() -> None:
    part = OneImage()
    with pytest.raises(
        ModelError, match=r"cannot run on a batch of 2, shape \(2, 3, 4, 4\)[\s\S]*--batch 1\.$"
    ) as caught:
        to_onnx(Whole(part).eval(), (3, 4, 4), ANY_BATCH, {})
    assert_place(str(caught.value), part)
    assert to_onnx(Whole(part).eval(), (3, 4, 4), BatchRange(min=1, opt=1, max=1), {})


@pytest.mark.parametrize(
    ("output", "found", "advice"),
    [
        ({"logits": 0, "features": 0}, "dict with logits, features", "return the tensors themselves"),
        ((torch.zeros(5), 1), "tuple", "keep the axis of the batch"),
        (Config(), "Config", "return the tensors themselves"),
        (torch.zeros(5), "a tensor (5,)", "x.flatten(1) for x.squeeze()"),
        (torch.zeros(1, dtype=torch.int64), "a tensor (1,) of int64", "take argmax or topk"),
    ],
)
def test_outputs_that_are_no_rows_of_numbers(output: Any, found: str, advice: str) -> None:
    message = str(output_error(output))
    assert f"returns {found}; expected floating-point tensors with one row for each image" in message
    assert advice in message


def test_a_place_that_is_not_found_hides_nothing() -> None:
    broken = Whole(nn.Identity())
    broken._modules["loop"] = broken  # walks over its modules never end
    message = str(running_error(broken, RuntimeError("Odd"), "It fails"))
    assert message.startswith("It fails.\nTorch says: RuntimeError: Odd\n")
    message = report("It fails", RuntimeError(), None)
    assert message == (
        "It fails.\nTorch says: RuntimeError: no message\n"
        "Way round: rewrite that line with plain tensor operations, or leave the part out of the network."
    )


def test_an_error_without_words_is_still_reported() -> None:
    class WordlessError(Exception):
        def __str__(self) -> str:
            raise RuntimeError

    assert report("It fails", WordlessError(), None) == "It fails.\nTorch says: WordlessError"
