"""Where and why a network cannot be compiled: the path, the line and the advice, for each recognised cause."""

# mypy: disable-error-code="no-untyped-call, no-any-return"

from __future__ import annotations

import io
import linecache
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pcn_deploy.errors import ModelError
from pcn_deploy.graph.diagnosis import output_error, report, scripting_error
from pcn_deploy.graph.export import to_onnx
from pcn_deploy.graph.torchscript import to_torchscript
from pcn_deploy.specs import BatchRange

ANY_BATCH = BatchRange(min=1, opt=2, max=4)
IMAGES = torch.rand(2, 3, 4, 4)


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


# Refused by TorchScript. In each, a check of a value keeps the symbolic trace from being the way round.


def check(x: Tensor) -> None:
    if x.sum() != x.sum():
        raise ValueError


class Starred(nn.Module):
    def forward(self, *x: Tensor) -> Tensor:  # HERE
        check(x[0])
        return x[0]


class Formatted(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        check(x)
        note = f"{x.shape[0]:>3}"  # HERE
        return x if note else -x


def helper(x: Tensor, **sizes: int) -> Tensor:
    check(x)
    return x


class Helped(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return helper(x, a=1)  # HERE


class Unannotated(nn.Module):
    def inner(self, x, k):  # type: ignore[no-untyped-def]
        return x * k

    def forward(self, x: Tensor) -> Tensor:
        check(x)
        y: Tensor = self.inner(x, 3)  # HERE
        return y


class Indexed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Identity(), nn.Identity()])

    def forward(self, x: Tensor) -> Tensor:
        check(x)
        for i in range(2):
            x = self.layers[i](x)  # HERE
        return x


class Config:
    factor = 3


class Configured(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.config = Config()

    def forward(self, x: Tensor) -> Tensor:
        check(x)
        return x * self.config.factor  # HERE


class Lambda(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.act = lambda x: x * 2

    def forward(self, x: Tensor) -> Tensor:
        check(x)
        y: Tensor = self.act(x)  # HERE
        return y


class Remembers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.last: Any = None

    def forward(self, x: Tensor) -> Tensor:
        check(x)
        self.last = x * 2  # HERE
        return x


class OneBranch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        check(x)
        if x.shape[2] > 2:  # HERE
            y = x
        return y


class Numbers(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        numbers: list[float] = x.mean((0, 2, 3)).tolist()  # HERE
        return x * numbers[0]


class Tries(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        check(x)
        try:  # HERE
            return x
        except ValueError:
            return -x


@pytest.mark.parametrize(
    ("kind", "advice"),
    [
        (Starred, "name every argument"),
        (Formatted, "take the formatting"),
        (Helped, "reshape, permute and flatten for einops"),
        (Unannotated, "annotate it"),
        (Indexed, "iterate over it"),
        (Configured, "set it in __init__"),
        (Lambda, "for a lambda"),
        (Remembers, "local variables"),
        (OneBranch, "before the if"),
        (Tries, "leave out try"),
    ],
)
def test_what_cannot_be_scripted(kind: Callable[[], nn.Module], advice: str) -> None:
    part = kind()
    with pytest.raises(ModelError) as caught:
        to_torchscript(Whole(part).eval(), IMAGES)
    message = str(caught.value)
    assert message.startswith("The network cannot be scripted: ")
    assert_place(message, part)
    first, _, second = message.partition("\nNor can it be traced symbolically (torch.fx): ")
    assert advice in first.splitlines()[-1], message
    assert second.startswith("stage.1 ") and "out checks of shapes" in second, message


class Scaled(nn.Module):
    def __init__(self, factor: Any) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        check(x)
        return x * self.factor  # HERE


def test_of_equal_modules_the_one_whose_settings_fail_is_named() -> None:
    part = Scaled(Config())
    with pytest.raises(ModelError) as caught:
        to_torchscript(Whole(nn.Sequential(Scaled(2.0), part)).eval(), IMAGES)
    assert_place(str(caught.value), part, "stage.1.1")


def test_a_definition_that_does_not_script_is_traced() -> None:
    """Control flow on settings and shapes is no obstacle, nor is an attribute that TorchScript cannot read."""

    class Settled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config = Config()
            self.layers = nn.ModuleList([nn.Conv2d(3, 3, 1), nn.ReLU()])

        def forward(self, x: Tensor, double: bool = True) -> Tensor:
            if x.shape[1] != 3:
                raise ValueError
            for i in range(2):
                x = self.layers[i](x)
            return x * self.config.factor if double else x

    net = Whole(Settled()).eval()
    module = torch.jit.load(io.BytesIO(to_torchscript(net, IMAGES)))
    for shape in ((1, 3, 4, 4), (3, 3, 5, 7)):
        images = torch.randn(shape)
        torch.testing.assert_close(module(images), net(images))


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
        ({"logits": 0, "features": 0}, "dict with logits, features", "self.net(x)['logits']`"),
        ((0, 1), "tuple", "self.net(x)[0]`"),
        (Config(), "Config", "self.net(x).logits`"),
        (torch.zeros(1, 3, 4, 4), "a tensor (1, 3, 4, 4)", "a pooling over the positions"),
        (torch.zeros(5), "a tensor (5,)", "x.flatten(1) for x.squeeze()"),
        (torch.zeros(1, dtype=torch.int64), "a tensor (1,) of int64", "take argmax or topk"),
    ],
)
def test_outputs_that_are_no_logits(output: Any, found: str, advice: str) -> None:
    message = str(output_error(output))
    assert f"returns {found}; expected one tensor of logits, (N, K)." in message
    assert advice in message


def test_a_place_that_is_not_found_hides_nothing() -> None:
    broken = Whole(nn.Identity())
    broken._modules["loop"] = broken  # walks over its modules never end
    message = str(scripting_error(broken, RuntimeError("Odd"), RuntimeError()))
    assert "Torch says: RuntimeError: Odd\n" in message and "Torch says: RuntimeError: no message\n" in message
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
