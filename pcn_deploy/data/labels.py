"""Whether the labels of a set of images can be the classes of the network: what it answers tells. No torch.

A network that is never right cannot lose anything, so any engine would be proven on labels of another order. Two things
show it: the network is right no more often than by chance, or far more often in another order than in the one taken.
Where a network may as well be a poor judge of these images, a note says so and the run goes on.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from pcn_deploy.aliases import Indices
from pcn_deploy.data.classes import REMEDY, by_number
from pcn_deploy.data.processes import current
from pcn_deploy.data.sampling import spread_by_class
from pcn_deploy.errors import DataError

if TYPE_CHECKING:
    from pcn_deploy.data.images import ImageSource

_LEAST_IMAGES = 50
"""With fewer images, chance cannot be told from skill."""

_SIGMAS = 3.0
"""So many standard deviations above chance is skill."""

_CLASS_SIGMAS = 2.0
"""The same for a single class, which has fewer images."""

_GAIN, _GAIN_SIGMAS = 0.1, 4.0
"""Another order is the right one if it explains so large a share of the images more, and by so many standard
deviations. Networks that confuse a few classes gain less by pairing them otherwise (our choice)."""


@dataclass
class LabelCheck:
    """Collects what the trained network answers to labelled images, and judges the labels by it.

    Attributes:
        source: The images.
        seen: For each batch the labels, the answers, and the answers where only the classes that have images count,
            `(3, n)`.
    """

    source: ImageSource
    seen: list[Indices] = field(default_factory=list)
    _present: Indices | None = None

    def update(self, labels: Indices | None, logits: npt.NDArray[np.floating]) -> None:
        """Add a batch.

        Args:
            labels: `(n,)`, or None where there are none.
            logits: Of the trained network, `(n, K)`.

        Raises:
            DataError: If the labels cannot be classes of a network with K outputs.
        """
        if not self.seen:
            self.source.check_classes(logits.shape[1])
        if labels is not None:
            if self._present is None:
                self._present = self.source.classes_present
            among = self._present[logits[:, self._present].argmax(1)]
            self.seen.append(np.stack([labels, logits.argmax(1), among]))

    def of_all_processes(self) -> LabelCheck:
        """What all processes collected together; the same in each of them."""
        every = current().gather(self._all().tobytes())
        return LabelCheck(self.source, [np.frombuffer(own, np.int64).reshape(3, -1) for own in every])

    def _all(self) -> Indices:
        return np.concatenate([np.zeros((3, 0), np.int64), *self.seen], axis=1)

    def check(self, classes: int) -> None:
        """Judge the labels; what is doubtful but no reason to stop becomes a note of the source.

        Args:
            classes: Outputs of the network, K.

        Raises:
            DataError: If they are implausible; the message says by which figures.
        """
        labels, answers, among = self._all()
        right = answers == labels
        if right.all():
            return
        accuracy = (
            f"The trained network is right on {100 * right.mean():.1f} % of the {len(labels)} labelled images of "
            f"{self.source.name}"
        )
        order = _best_order(labels, answers, self.source.folders)
        if order:
            better = f"{accuracy}, but on {100 * order.right.mean():.1f} % {order.words}"
            if order.certain or not _knows_half(labels, answers):
                msg = f"{better}: these labels are in another order than its outputs. {REMEDY}"
                raise DataError(msg)
            self.source.remark(f"{better}: it takes classes for others, or some labels are wrong. {REMEDY}")
        if _is_skilled(labels, answers, among, classes):
            return
        if len(labels) < _LEAST_IMAGES:
            self.source.remark(
                f"{accuracy}, no more than by chance; so few cannot tell whether the labels are its classes. {REMEDY}"
            )
        elif _above(int(right.sum()), len(labels), 0.5, _SIGMAS):  # in any other order it would be right less often
            self.source.remark(
                f"{accuracy}, as would be one that knows how frequent the classes are and nothing else; such images "
                f"cannot tell whether the labels are its classes. {REMEDY}"
            )
        else:
            msg = f"{accuracy}, no more than by chance: its outputs are probably in another order. {REMEDY}"
            raise DataError(msg)


@dataclass(frozen=True)
class _Order:
    """Labels in another order: which images are then right, `(n,)`, in words, and whether nothing else explains it."""

    right: npt.NDArray[np.bool_]
    words: str
    certain: bool = False


def _above(hits: int, count: int, chance: float, sigmas: float) -> bool:
    """Whether hits are more than chance gives, by so many standard deviations of the binomial distribution."""
    return bool(hits > count * chance + sigmas * (count * chance * (1 - chance)) ** 0.5)


def _is_skilled(labels: Indices, answers: Indices, among: Indices, classes: int) -> bool:
    """Whether the network is right more often than by answers that know nothing of the labels.

    Chance is what the same answers give in random order: with r labels and c answers of a class among n images, Σ rc/n
    are right on average. The variance is that of the diagonal of a table with fixed margins, whose cells are
    hypergeometric.
    """
    n = len(labels)
    if len(np.unique(labels)) == 1:  # all that is left to choose from is right
        return _above(int((answers == labels).sum()), n, 1 / classes, _SIGMAS)
    size = 1 + max(int(labels.max()), int(among.max()))
    r, c = (np.bincount(each, minlength=size).astype(np.float64) for each in (labels, among))
    both = r * c
    variance = ((both * (n - r) * (n - c)).sum() + both.sum() ** 2 - (both**2).sum()) / (n**2 * (n - 1))
    return bool((among == labels).sum() - both.sum() / n > max(_SIGMAS * variance**0.5, 1e-9 * n))


def _knows_half(labels: Indices, answers: Indices) -> bool:
    """Whether the network knows half of the classes or more by the labels as they are."""
    known = []
    for one in np.unique(labels):
        hits = int((answers[labels == one] == one).sum())
        known.append(_above(hits, int((labels == one).sum()), float((answers == one).mean()), _CLASS_SIGMAS))
    return 2 * sum(known) >= len(known)


def _best_order(labels: Indices, answers: Indices, folders: tuple[str, ...]) -> _Order | None:
    """The order in which the labels fit far better than in their own, if there is one.

    The first that comes within `_GAIN` of the best, as the more plain come first.
    """
    own = answers == labels
    clear = []
    for other in _other_orders(labels, answers, folders):
        gained, lost = int((other.right & ~own).sum()), int((own & ~other.right).sum())
        if gained - lost > max(_GAIN * len(labels), _GAIN_SIGMAS * (gained + lost) ** 0.5):
            clear.append(other)
    best = max((order.right.mean() for order in clear), default=0.0)
    return next((order for order in clear if order.right.mean() >= best - _GAIN), None)


def _other_orders(labels: Indices, answers: Indices, folders: tuple[str, ...]) -> Iterator[_Order]:
    """Labels in each of the orders that they are often in by mistake."""
    numbered = by_number(folders)
    if numbered and labels.max() < len(folders):
        order = np.array([numbered.index(name) for name in folders])
        words = "if the folders are taken by their numbers (2 before 10), as timm does"
        yield _Order(answers == order[labels], words, certain=True)
    away = answers - labels
    shifts, counts = np.unique(away[away != 0], return_counts=True)
    if len(shifts):
        shift = int(shifts[counts.argmax()])
        yield _Order(away == shift, f"if {abs(shift)} is {'added to' if shift > 0 else 'taken from'} each label")
    halves = np.isin(np.arange(len(labels)), spread_by_class(labels.tolist(), len(labels) // 2))
    paired = np.zeros(len(labels), bool)
    for half in (halves, ~halves):
        order = _pairing(labels[half], answers[half], 1 + max(int(labels.max()), int(answers.max())))
        paired[~half] = answers[~half] == order[labels[~half]]
    words = "if each label is paired with another output, the one that answers it most (found on the other images)"
    yield _Order(paired, words)


def _pairing(labels: Indices, answers: Indices, classes: int) -> Indices:
    """For each class an output of its own, the most frequent pairs first; -1 where its own is taken and no other left.

    Two classes never share an output, so a network that takes several for one explains nothing by it.
    """
    pairs, counts = np.unique(labels * classes + answers, return_counts=True)
    rows, columns = pairs // classes, pairs % classes
    order, free = np.full(classes, -1), np.ones(classes, bool)
    for index in np.lexsort((rows != columns, -counts)):
        row, column = rows[index], columns[index]
        if order[row] < 0 and free[column]:
            order[row], free[column] = column, False
    rest = np.flatnonzero((order < 0) & free)
    order[rest] = rest
    return order
