"""The one loop in which images go through something."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import chain, zip_longest
from typing import Any, TypeAlias

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


def of_all_batches(own: list[npt.NDArray[Any]], kind: npt.DTypeLike = np.int64) -> list[npt.NDArray[Any]]:
    """What all processes have found for their batches of a shared pass, in the order of the batches.

    Args:
        own: What this process has found for each of its batches, `(..., n)`, all with the same leading axes.
        kind: Their dtype: whole numbers, or float64.
    """
    every = [json.loads(text) for text in current().gather(json.dumps([each.tolist() for each in own]).encode())]
    return [np.array(each, kind) for each in chain(*zip_longest(*every)) if each is not None]


def _shared(source: ImageSource, size: int) -> Iterator[Batch]:
    processes = current()
    processes.check_equal(images=[len(source), source.max_unreadable], transform=source.transform.to_json())
    yield from source.batches(size, part=processes.rank, parts=processes.count)
    if processes.count > 1:
        source.complete(processes.sum(source.fingerprints.astype(np.int64)).astype(np.uint8))
