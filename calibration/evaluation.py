"""Images with the answers of the trained network, against which a choice of INT8 layers is judged. No torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pcn_deploy.calibration.bound import PairedCounts
from pcn_deploy.calibration.images import ImageSource
from pcn_deploy.errors import DataError
from pcn_deploy.progress import Progress, silent

BATCH = 16
"""Images per forward pass."""

_TELLING = 50
"""With fewer images, chance cannot be told from skill."""

Forward = Callable[[npt.NDArray[np.float32]], npt.NDArray[np.float32]]
"""From images `(N, C, H, W)` to logits `(N, K)`."""


@dataclass(frozen=True)
class Answers:
    """What the trained network says of the images of a source.

    Attributes:
        source: The images, all readable.
        expected: The class that counts as right for each image, `(N,)`: its label, or without labels the answer of
            the trained network.
        reference: The answer of the trained network, `(N,)`.
        labelled: Whether `expected` holds labels.
    """

    source: ImageSource
    expected: npt.NDArray[np.int64]
    reference: npt.NDArray[np.int64]
    labelled: bool

    @classmethod
    def of(cls, forward: Forward, source: ImageSource, progress: Progress = silent) -> Answers:
        """Ask the trained network.

        Args:
            forward: The trained network.
            source: Images; those that cannot be read are left out.
            progress: Told the number of images done.

        Raises:
            DataError: If images are unusable, logits are not finite, a label is none of the K classes, or the network
                is right no more often than by chance.
        """
        expected, reference, done = [], [], 0
        step = "Answers of the network"
        progress(step, 0, len(source), "images")
        for images, labels in source.batches(BATCH):
            logits = forward(images)
            if not np.isfinite(logits).all():
                msg = "The network returns NaN or infinite logits on the images; nothing can be compared with it."
                raise DataError(msg)
            reference.append(logits.argmax(1))
            if labels is not None:
                _check_labels(labels, logits.shape[1])
            expected.append(reference[-1] if labels is None else labels)
            done += len(images)
            progress(step, done, len(source), "images")
        progress(step, len(source), len(source), "images")
        found = cls(source.readable(), np.concatenate(expected), np.concatenate(reference), source.has_labels)
        found._check_better_than_chance(logits.shape[1])
        return found

    @property
    def top1(self) -> float:
        """Share of the images that the trained network answers as expected, in percent."""
        return 100 * float((self.reference == self.expected).mean())

    def _check_better_than_chance(self, classes: int) -> None:
        """A network that is never right cannot lose anything: any engine would be proven."""
        chance = 1 / classes
        limit = chance + 3 * (chance * (1 - chance) / len(self)) ** 0.5
        if self.labelled and len(self) >= _TELLING and self.top1 <= 100 * limit:
            msg = (
                f"The trained network is right on {self.top1:.1f} % of the {len(self)} labelled images of "
                f"{self.source.name}, no more than by chance. Are its classes in another order? Sub-folders are "
                "numbered in the order of their names, unless all names are numbers. Without labels the network's own "
                "answers count as right."
            )
            raise DataError(msg)

    def __len__(self) -> int:
        return len(self.expected)

    def select(self, order: npt.NDArray[np.intp]) -> Answers:
        """Some of the images, in the order of the given indices."""
        source = self.source.select(order.tolist())
        return Answers(source, self.expected[order], self.reference[order], self.labelled)

    def spread(self, count: int) -> Answers:
        """At most `count` of the images, at even distances."""
        return self.select(np.unique(np.linspace(0, len(self) - 1, count).round().astype(np.intp)))

    def predict(self, forward: Forward, progress: Progress = silent, step: str = "Answers") -> npt.NDArray[np.int64]:
        """The answers of a form of the network, `(N,)`."""
        found: list[npt.NDArray[np.int64]] = []
        progress(step, 0, len(self), "images")
        for images, _ in self.source.batches(BATCH):
            found.append(forward(images).argmax(1))
            progress(step, sum(map(len, found)), len(self), "images")
        return np.concatenate(found)

    def count(self, answers: npt.NDArray[np.int64]) -> PairedCounts:
        """Images lost and gained by answers to the first of the images, `(n,)` with n at most N."""
        seen = slice(len(answers))
        right = answers == self.expected[seen]
        was_right = self.reference[seen] == self.expected[seen]
        return PairedCounts(len(self), int((was_right & ~right).sum()), int((~was_right & right).sum()))

    def compare(self, forward: Forward, stop: Callable[[int, PairedCounts], bool]) -> PairedCounts:
        """Count the images that a form of the network lost or gained.

        Args:
            forward: The form to be judged.
            stop: Asked after every batch with the number of images seen and the counts so far, over all N images; true
                ends the comparison.
        """
        answers = np.zeros(0, np.int64)
        for images, _ in self.source.batches(BATCH):
            answers = np.append(answers, forward(images).argmax(1))
            if stop(len(answers), self.count(answers)):
                break
        return self.count(answers)


def _check_labels(labels: npt.NDArray[np.int64], classes: int) -> None:
    if not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        msg = f"Labels run from {labels.min()} to {labels.max()}; the network has {classes} classes."
        raise DataError(msg)
