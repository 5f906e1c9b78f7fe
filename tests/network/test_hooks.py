"""Hooks go when their block ends."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from pcn_deploy.network.hooks import hooked


def test_hooks_are_there_in_the_block_only() -> None:
    layer = nn.ReLU()
    seen: list[int] = []
    with hooked(layer.register_forward_hook(lambda *_: seen.append(0)) for _ in range(2)):
        layer(torch.zeros(1))
    layer(torch.zeros(1))
    assert len(seen) == 2
    assert not layer._forward_hooks


def test_an_error_in_the_block_removes_them() -> None:
    layer = nn.ReLU()
    with pytest.raises(ZeroDivisionError), hooked([layer.register_forward_hook(lambda *_: None)]):
        raise ZeroDivisionError
    assert not layer._forward_hooks


def test_an_error_while_they_are_made_removes_those_before() -> None:
    layer = nn.ReLU()

    def handles() -> Iterator[RemovableHandle]:
        yield layer.register_forward_hook(lambda *_: None)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        hooked(handles())
    assert not layer._forward_hooks
