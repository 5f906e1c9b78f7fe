"""Which of many images are taken: spread over all of them, but at no fixed distance, and a fair share of each class.

Images often come in an order with a period, such as one of each class in turn. At equal distances all that are taken
could be of one class. The choice is pseudo-random with a fixed seed: the same in every process and every run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, TypeVar

import numpy as np

from pcn_deploy.aliases import Indices

Item = TypeVar("Item")
_SEED = 0

SURVEYED = 64
"""Images of a source that are looked at, about, to tell the user of them."""


def surveyed(items: Sequence[Item]) -> Sequence[Item]:
    """Those of the items that are looked at to tell the user of them: at an even distance, without a copy."""
    return items[:: max(1, len(items) // SURVEYED)]


def spread(length: int, count: int) -> Indices:
    """Indices of at most `count` of `length` items, ascending: any one of each of `count` stretches as long."""
    stretches = min(count, length)
    edges = np.arange(stretches + 1) * length // max(stretches, 1)
    shares = np.random.default_rng(_SEED).random(stretches)
    return edges[:-1] + (shares * np.diff(edges)).astype(np.int64)


def spread_by_class(labels: Sequence[int | None], count: int) -> Indices:
    """Indices of at most `count` of the items, ascending, of each class in proportion.

    A class of at least `ceil(len(labels) / count)` items is among them. Without a label for each, as `spread`.
    """
    length = len(labels)
    if count >= length or any(label is None for label in labels):
        return spread(length, count)
    shuffled = np.random.default_rng(_SEED).permutation(length)
    grouped = shuffled[np.argsort(np.array(labels, np.int64)[shuffled], kind="stable")]
    return np.sort(grouped[(2 * np.arange(count) + 1) * length // (2 * count)])


class Reservoir(Generic[Item]):
    """At most `size` of a stream of unknown length, each with the same chance: algorithm R (Vitter, TOMS 11, 1985)."""

    def __init__(self, size: int | None) -> None:
        self._size = size
        self._random = np.random.default_rng(_SEED)
        self._kept: list[tuple[int, Item]] = []
        self.seen = 0

    def place(self) -> int | None:
        """Where the next item goes; None if it is not kept. Call once per item, `put` it there if there is a place."""
        place = self.seen
        self.seen += 1
        if self._size is None or place < self._size:
            return place
        place = int(self._random.integers(self.seen))
        return place if place < self._size else None

    def put(self, place: int, item: Item) -> None:
        """Keep the item that `place` was last asked for, instead of what is there."""
        self._kept[place : place + 1] = [(self.seen - 1, item)]

    def items(self) -> list[Item]:
        """What is kept, in the order in which it came."""
        return [item for _, item in sorted(self._kept, key=lambda kept: kept[0])]
