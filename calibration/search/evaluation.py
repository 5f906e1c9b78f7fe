"""Images with the answers of the trained network, against which a choice of INT8 layers is judged. No torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pcn_deploy.aliases import Forward
from pcn_deploy.data.images import ImageSource
from pcn_deploy.data.labels import LabelCheck
from pcn_deploy.data.passes import each_batch, of_all_batches
from pcn_deploy.data.processes import current
from pcn_deploy.data.sampling import spread_by_class
from pcn_deploy.errors import DataError
from pcn_deploy.progress import Progress, silent
from pcn_deploy.tasks.bound import PairedCounts
from pcn_deploy.tasks.changed import ChangedAnswer, changed_answers
from pcn_deploy.tasks.metrics import NO_CLASS, Answered, answers

BATCH = 16
"""Images per forward pass."""


@dataclass(frozen=True)
class Answers:
    """What the trained network says of the images of a source.

    Attributes:
        source: The images, all readable.
        expected: The class that counts as right for each image, `(N,)`: its label, or without labels the answer of
            the trained network.
        reference: The answer of the trained network, `(N,)`.
        labelled: Whether `expected` holds labels.
        margins: By how much the logit of each answer of the trained network is above the next one, `(N,)`.
    """

    source: ImageSource
    expected: npt.NDArray[np.int64]
    reference: npt.NDArray[np.int64]
    labelled: bool
    margins: npt.NDArray[np.float64]

    @classmethod
    def of(cls, forward: Forward, source: ImageSource, progress: Progress = silent) -> Answers:
        """Ask the trained network; the processes of a run share the images.

        Args:
            forward: The trained network.
            source: Images; those that cannot be read are left out.
            progress: Told the number of images done.

        Raises:
            DataError: If images are unusable, logits are not finite, or labels are not the classes of the network
                (`labels.py`).
        """
        seen, margins, labelling, classes = [], [], LabelCheck(source), 0
        for images, labels in each_batch(source, BATCH, "Answers of the network", progress, shared=True):
            logits = forward(images)
            answered, classes = Answered.of(logits), logits.shape[1]
            predictions = answered.classes
            if (broken := np.flatnonzero(predictions == NO_CLASS)).size:
                name = source.name_of(images[broken[0]])
                msg = f"The network returns NaN or infinite logits for {name}; nothing can be compared with it."
                raise DataError(msg)
            labelling.update(labels, logits)
            seen.append(np.stack([predictions if labels is None else labels, predictions]))
            margins.append(answered.margins)
        classes = int(current().max(np.array([classes], np.float64))[0])  # a process may have had no image
        labelling.of_all_processes().check(classes)
        expected, reference = np.concatenate(of_all_batches(seen), axis=1)
        every = np.concatenate(of_all_batches(margins, np.float64))
        return cls(source.readable(), expected, reference, source.has_labels, every)

    @property
    def top1(self) -> float:
        """Share of the images that the trained network answers as expected, in percent."""
        return 100 * float((self.reference == self.expected).mean())

    def __len__(self) -> int:
        return len(self.expected)

    def select(self, order: npt.NDArray[np.intp]) -> Answers:
        """Some of the images, in the order of the given indices."""
        source = self.source.select(order.tolist())
        return Answers(source, self.expected[order], self.reference[order], self.labelled, self.margins[order])

    def spread(self, count: int) -> Answers:
        """At most `count` of the images, from all over them; of each class, or of each answer, in proportion."""
        return self.select(spread_by_class(self.expected.tolist(), count))

    def predict(self, forward: Forward) -> npt.NDArray[np.int64]:
        """The answers of a form of the network, `(N,)`; `NO_CLASS` where its logits are not finite."""
        return self.ask(forward).classes

    def ask(self, forward: Forward, progress: Progress = silent, step: str = "Answers") -> Answered:
        """What a form of the network answers to all images."""
        batches = each_batch(self.source, BATCH, step, progress)
        return Answered.joined([Answered.of(forward(images)) for images, _ in batches])

    def changed(self, target: str, answered: Answered) -> list[ChangedAnswer]:
        """The images that an engine answers otherwise than the trained network; `answered` holds all its answers."""
        labels = self.expected if self.labelled else None
        return changed_answers(target, Answered(self.reference, self.margins), answered, labels, self.source.item_name)

    def count(self, predictions: npt.NDArray[np.int64]) -> PairedCounts:
        """Images lost and gained by answers to the first of the images, `(n,)` with n at most N.

        An image without an answer is lost, also where the trained network was wrong.
        """
        seen = slice(len(predictions))
        right = predictions == self.expected[seen]
        could_lose = (self.reference[seen] == self.expected[seen]) | (predictions == NO_CLASS)
        return PairedCounts(len(self), int((could_lose & ~right).sum()), int((~could_lose & right).sum()))

    def unanswered(self, predictions: npt.NDArray[np.int64]) -> tuple[str, ...]:
        """Names of the images that have no answer among `predictions`, `(N,)`."""
        return tuple(self.source.item_name(index) for index in np.flatnonzero(predictions == NO_CLASS).tolist())

    def compare(
        self, forward: Forward, stop: Callable[[int, PairedCounts], bool]
    ) -> tuple[PairedCounts, npt.NDArray[np.int64]]:
        """Count the images that a form of the network lost or gained; the processes of a run share them.

        Args:
            forward: The form to be judged.
            stop: Asked after every batch with the number of images seen and the counts so far, over all N images; true
                ends the comparison.

        Returns:
            The counts, and the answers to the images seen, `(n,)`.
        """
        processes, predictions = current(), np.zeros(0, np.int64)
        own = self.source.batches(BATCH, part=processes.rank, parts=processes.count)
        while len(predictions) < len(self):
            batch = next(own, None)  # the last round may have none for this process
            mine = b"" if batch is None else answers(forward(batch[0])).tobytes()
            for batch_answers in filter(None, processes.gather(mine)):
                predictions = np.append(predictions, np.frombuffer(batch_answers, np.int64))
                if stop(len(predictions), self.count(predictions)):
                    return self.count(predictions), predictions
        return self.count(predictions), predictions
