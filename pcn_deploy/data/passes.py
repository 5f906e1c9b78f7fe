"""The one loop in which images go through something."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from pcn_deploy.data.images import ImageSource
from pcn_deploy.data.processes import current
from pcn_deploy.progress import Progress

Batch: TypeAlias = "tuple[npt.NDArray[np.float32], npt.NDArray[np.int64] | None]"
"""Images `(n, C, H, W)`, and their labels `(n,)` where all images of the source have one."""


def each_batch(
    source: ImageSource, size: int, step: str, progress: Progress, *, shared: bool = False
) -> Iterator[Batch]:
    """Go through the images of a source once.

    Args:
        source: The images.
        size: Most images of a batch.
        step: What is done with them, for the progress.
        progress: Told the number of images done.
        shared: Whether the processes of a `processes.join` share the images: each gets whole batches of its own, and
            when all are through, each source is complete.

    Yields:
        The batches; those after the first once the one before was used.

    Raises:
        DataError: If images are unusable.
    """
    total, done = len(source), 0
    progress(step, 0, total, "images")
    for batch in _shared(source, size) if shared else source.batches(size):
        yield batch
        done = min(total, done + len(batch[0]) * (current().count if shared else 1))
        progress(step, done, total, "images")
    progress(step, total, total, "images")


def _shared(source: ImageSource, size: int) -> Iterator[Batch]:
    processes = current()
    processes.check_equal(images=[len(source), source.max_unreadable], transform=source.transform.to_json())
    yield from source.batches(size, part=processes.rank, parts=processes.count)
    if processes.count > 1:
        source.complete(processes.sum(source.fingerprints.astype(np.int64)).astype(np.uint8))
