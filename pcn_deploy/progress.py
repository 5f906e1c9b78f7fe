"""How long-running steps report what they have done: one callable, no dependency on any display."""

from typing import Protocol


class Progress(Protocol):
    """Receives the state of a step; called at least at its start and at its end."""

    def __call__(self, step: str, done: int, total: int, unit: str = "", /) -> None:
        """Report `done` of `total` of `step`, counted in `unit` (such as `images`; empty: a mere share).

        The step is over when both are equal.
        """


def silent(step: str, done: int, total: int, unit: str = "", /) -> None:
    """Report nothing."""
