"""The verb `verify`: is this engine still equal to the trained network?"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pcn_deploy.aliases import Forward, Images
from pcn_deploy.artefact.engine import Engine
from pcn_deploy.artefact.golden import GoldenSet
from pcn_deploy.data.arrays import ArraysGiven
from pcn_deploy.data.images import ImageSource
from pcn_deploy.data.labels import LabelCheck
from pcn_deploy.data.passes import each_batch
from pcn_deploy.data.processes import current
from pcn_deploy.errors import DataError
from pcn_deploy.progress import Progress, silent
from pcn_deploy.proof.executions import with_executions
from pcn_deploy.proof.judgement import noise_floor, verify_golden
from pcn_deploy.proof.widened import WIDENED
from pcn_deploy.tasks.limits import ParityBudget
from pcn_deploy.tasks.parity import ParityMeter
from pcn_deploy.tasks.report import ParityReport

if TYPE_CHECKING:
    from torch import nn

SAMPLE = 8
"""Images that tell whether those of a set differ."""


def verify(
    engine: Engine,
    data: str | Path | ArraysGiven | ImageSource | None = None,
    *,
    reference: nn.Module | Forward | None = None,
    budget: ParityBudget | None = None,
    to_prove: bool = False,
    limit: int | None = None,
    progress: Progress = silent,
) -> ParityReport:
    """Compare an engine with the eager network.

    Within `distributed.join` the processes share the images; all return the same report.

    Args:
        engine: An opened engine.
        data: Folder of images (sub-folders are classes), `.npz`, arrays or an image source. Without data the golden
            set of the bundle is used: images with the outputs of the eager network, so that neither the network nor
            torch is needed. Where the engine is the graph itself, that is judged without its rounding too.
        reference: The eager network, or any function from images `(N, C, H, W)` to logits `(N, K)`; needed with data.
        budget: What is still parity; by default what the bundle was built for.
        to_prove: Whether labelled images must prove, with 95 % confidence, that top-1 drops by no more than the budget
            allows; else they must not show that it drops by more.
        limit: Use at most so many images, spread over all of them.
        progress: Told the number of images done.

    Returns:
        The report; its truth value is the verdict.

    Raises:
        DataError: If images are unusable, labels are not the classes of the network, or data came without a reference.
        OptionError: If an image source has another transform than the bundle.
        BundleError: If the golden set was altered.
    """
    budget = budget or engine.bundle.manifest.parity_budget
    if data is None:
        report = verify_golden(engine, budget, progress)
        return (
            with_executions(report, engine, budget, progress, only=WIDENED) if engine.executed_by == "cpu" else report
        )
    expected = _expected(reference)
    source = data if isinstance(data, ImageSource) else ImageSource(data, engine.transform, limit=limit)
    source.check_transform(engine.transform, "the bundle")
    current().check_equal(engine=engine.bundle.engine(engine.target).sha256)
    golden = GoldenSet.read(engine.bundle, [tensor.name for tensor in engine.spec.outputs])
    if not hasattr(reference, "state_dict"):  # nothing is known of its rounding
        golden = replace(golden, float32_noise=math.nan)
    meter = _compare(engine, source, expected, ParityMeter(live=golden.live), progress)
    some = np.stack([sample.image for sample in source.subset(SAMPLE)])
    report = meter.report(
        target=engine.target,
        executed_by=engine.executed_by,
        data=source.name,
        budget=budget,
        tolerant=True,
        to_prove=to_prove,
        floor=noise_floor(golden, some, engine.bundle.manifest, engine.executed_by),
    )
    return replace(report, unreadable=len(source.unreadable), notes=(*report.notes, *source.notes))


def _expected(reference: nn.Module | Forward | None) -> Forward:
    """What gives the logits that the engine's are compared with."""
    if reference is None:
        msg = (
            "Images were given, but nothing to compare with: pass the eager network as the reference "
            "(--weights FILE on the command line), or verify the golden set by giving no images."
        )
        raise DataError(msg)
    return eager_copy(reference) if hasattr(reference, "state_dict") else _checked(reference)


def _compare(
    engine: Engine, source: ImageSource, expected: Forward, meter: ParityMeter, progress: Progress
) -> ParityMeter:
    """What all processes measured, each on its share of the images.

    Raises:
        DataError: If images are unusable, or labels are not the classes of the network.
    """
    labelling, step = LabelCheck(source), f"Verifying {engine.target}"
    for images, labels in each_batch(source, engine.spec.batch.max, step, progress, shared=True):
        logits = expected(images)
        labelling.update(labels, logits)
        meter.update(logits, engine.predict(images), labels, partial(_name, source, images))
    labelling.of_all_processes().check(int(engine.spec.outputs[0].shape[-1]))
    return of_all_processes(meter)


def _name(source: ImageSource, images: Images, index: int) -> str:
    return source.name_of(images[index])


def of_all_processes(meter: ParityMeter) -> ParityMeter:
    """What all processes measured together; the same in each of them."""
    whole = ParityMeter()
    for state in current().gather(meter.state()):
        whole.merge(state)
    return whole


def eager_copy(model: Any) -> Forward:
    """The network in evaluation mode, as `eager`; the caller's keeps its mode and its running statistics.

    Raises:
        ModelError: If it holds what cannot be copied.
    """
    from pcn_deploy.network.sharing import share_weights

    copied = share_weights(model)
    copied.eval()  # returns nothing where a network has a `train` of its own without a return
    return eager(copied)


def eager(model: Any) -> Forward:
    """A torch network as a function from numpy images `(N, C, H, W)` to logits `(N, K)`.

    Raises, when it is called:
        DataError: If the network does not take float32, or returns no logits.
    """
    import torch

    def forward(images: Images) -> Any:
        with torch.inference_mode():
            try:
                return model(torch.tensor(images))
            except Exception as error:  # the network's own code
                msg = f"The reference cannot run on float32 images ({error}). Give it as it was trained, in float32."
                raise DataError(msg) from error

    return _checked(forward)


def _checked(reference: Callable[[Images], Any]) -> Forward:
    """A reference whose logits are numpy's `(N, K)`, whatever it returns them as; else it is refused in words."""

    def logits(images: Images) -> npt.NDArray[np.floating[Any]]:
        found = reference(images)
        if hasattr(found, "detach"):
            found = found.detach().cpu().float().numpy()
        if not isinstance(found, np.ndarray) or found.ndim != 2:
            what = f"shape {found.shape}" if isinstance(found, np.ndarray) else f"a {type(found).__name__}"
            msg = f"The reference returned {what}; expected logits (N, K), as of network(images)[0] for a tuple."
            raise DataError(msg)
        return found

    return logits
