"""Whether the labels of a set of images can be the classes of the network: what it answers tells. No torch.

A network that is never right cannot lose anything, so any engine would be proven on labels of another order. Two things
show it: the network is right no more often than by chance, or far more often in another order than in the one taken.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from pcn_deploy.calibration.classes import by_number
from pcn_deploy.calibration.distributed import current
from pcn_deploy.errors import DataError

if TYPE_CHECKING:
    from pcn_deploy.calibration.images import ImageSource

Indices = npt.NDArray[np.int64]

_TELLING = 50
"""With fewer images, chance cannot be told from skill."""

_SIGMAS = 3.0
"""So many standard deviations above chance is skill."""

_GAIN, _GAIN_SIGMAS = 0.1, 4.0
"""Another order is the right one if it explains so large a share of the images more, and by so many standard
deviations. Networks that confuse a few classes gain less by pairing them otherwise (our choice)."""

REMEDY = (
    "Say which output each class is: --classes FILE with the name of every class on a line, in the order of the "
    "network's outputs (in Python `classes`). Images without labels are judged by the network's own answers."
)


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
        """Judge the labels.

        Args:
            classes: Outputs of the network, K.

        Raises:
            DataError: If they are implausible; the message says by which figures.
        """
        labels, answers, among = self._all()
        if not len(labels):
            return
        right = 100 * float((answers == labels).mean())
        found = (
            f"The trained network is right on {right:.1f} % of the {len(labels)} labelled images of {self.source.name}"
        )
        better, words = _best_order(labels, answers, self.source.folders)
        if better:
            msg = (
                f"{found}, but on {better:.1f} % {words}: these labels are in another order than its outputs. {REMEDY}"
            )
            raise DataError(msg)
        if len(labels) >= _TELLING and not _is_skilled(labels, answers, among, classes):
            msg = f"{found}, no more than by chance: its outputs are probably in another order. {REMEDY}"
            raise DataError(msg)


def _is_skilled(labels: Indices, answers: Indices, among: Indices, classes: int) -> bool:
    """Whether the network is right more often than answers that know nothing of the labels, given how often each is."""
    present = np.unique(labels)
    if len(present) == 1:  # all that is left to choose from is right
        among, chance = answers, 1 / classes
    else:
        shares = [(labels == one).mean() * (among == one).mean() for one in present]
        chance = max(1 / len(present), float(sum(shares)))
    limit = chance + _SIGMAS * (chance * (1 - chance) / len(labels)) ** 0.5
    return bool((among == labels).mean() > limit)


def _best_order(labels: Indices, answers: Indices, folders: tuple[str, ...]) -> tuple[float, str]:
    """The order in which the labels fit far better than in their own: its accuracy in percent, and what it is.

    Nothing (0) if there is none.
    """
    best, words, own = 0.0, "", answers == labels
    for other, name in _other_orders(labels, answers, folders):
        gained, lost = int((other & ~own).sum()), int((own & ~other).sum())
        clear = gained - lost > max(_GAIN * len(labels), _GAIN_SIGMAS * (gained + lost) ** 0.5)
        if clear and other.mean() > best:
            best, words = float(other.mean()), name
    return 100 * best, words


def _other_orders(
    labels: Indices, answers: Indices, folders: tuple[str, ...]
) -> Iterator[tuple[npt.NDArray[np.bool_], str]]:
    """Which images are right in each of the orders that labels are often in by mistake."""
    numbered = by_number(folders)
    if numbered and labels.max() < len(folders):
        order = np.array([numbered.index(name) for name in folders])
        yield answers == order[labels], "if the folders are taken by their numbers (2 before 10), as timm does"
    away = answers - labels
    shifts, counts = np.unique(away[away != 0], return_counts=True)
    if len(shifts):
        shift = int(shifts[counts.argmax()])
        yield away == shift, f"if {abs(shift)} is {'added to' if shift > 0 else 'taken from'} each label"
    halves = np.arange(len(labels)) % 2 == 0
    paired = np.zeros(len(labels), bool)
    for half in (halves, ~halves):
        order = _pairing(labels[half], answers[half], 1 + max(int(labels.max()), int(answers.max())))
        paired[~half] = answers[~half] == order[labels[~half]]
    yield paired, "if each label is paired with the class that the network answers most (found on the other images)"


def _pairing(labels: Indices, answers: Indices, classes: int) -> Indices:
    """For each class the output that answers it most, where it is also the class that output answers most."""
    pairs, counts = np.unique(labels * classes + answers, return_counts=True)
    order = np.arange(classes)
    rows, columns = pairs // classes, pairs % classes
    for row, column, count in zip(rows, columns, counts, strict=True):
        if count == counts[rows == row].max() == counts[columns == column].max():
            order[row] = column
    return order
