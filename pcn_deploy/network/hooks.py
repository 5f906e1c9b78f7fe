"""Forward hooks for the time of a block."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack

from torch.utils.hooks import RemovableHandle


def hooked(handles: Iterable[RemovableHandle]) -> ExitStack:
    """Remove hooks when a block ends, whatever happens in it.

    Args:
        handles: What registering them returned.

    Returns:
        The context of the block.
    """
    with ExitStack() as stack:
        for handle in handles:
            stack.enter_context(handle)
        return stack.pop_all()
