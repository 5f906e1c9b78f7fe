"""What a network keeps in plain attributes, such as a cache, is as it was after its code ran with symbols."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy

from torch import nn


@contextmanager
def attributes_kept(model: nn.Module) -> Iterator[None]:
    """Put back the attributes of all modules, and what their lists, dicts and sets hold, when the block ends.

    A network that keeps what it computed would keep symbols, or tensors without data, and fail when it is run again.
    """
    before = [(module, dict(vars(module))) for module in model.modules()]
    held = [
        (value, copy(value))
        for _, attributes in before
        for value in attributes.values()
        if isinstance(value, dict | list | set)
    ]
    try:
        yield
    finally:
        for module, attributes in before:
            vars(module).clear()
            vars(module).update(attributes)
        for value, content in held:
            value.clear()
            value.extend(content) if isinstance(value, list) else value.update(content)
