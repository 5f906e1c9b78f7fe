"""The verb `verify`: is this engine still equal to the trained network?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pcn_deploy.calibration.arrays import ArraysGiven
from pcn_deploy.calibration.distributed import current, shared_batches
from pcn_deploy.calibration.images import ImageSource
from pcn_deploy.calibration.labels import LabelCheck
from pcn_deploy.errors import BundleError, DataError
from pcn_deploy.parity import ParityBudget, ParityMeter, ParityReport
from pcn_deploy.progress import Progress, silent
from pcn_deploy.runtime import Engine
from pcn_deploy.specs import ATTENTION_MAP, LOGITS

if TYPE_CHECKING:
    from torch import nn

Images = npt.NDArray[np.float32]
Reference = Callable[[Images], npt.NDArray[np.floating[Any]]]


def verify(
    engine: Engine,
    data: str | Path | ArraysGiven | ImageSource | None = None,
    *,
    reference: nn.Module | Reference | None = None,
    budget: ParityBudget | None = None,
    limit: int | None = None,
    progress: Progress = silent,
) -> ParityReport:
    """Compare an engine with the eager network.

    Within `distributed.join` the processes share the images; all return the same report.

    Args:
        engine: An opened engine.
        data: Folder of images (sub-folders are classes), `.npz`, arrays or an image source. Without data the golden
            set of the bundle is used: images with the outputs of the eager network, so that neither the network nor
            torch is needed.
        reference: The eager network, or any function from images `(N, C, H, W)` to logits `(N, K)`; needed with data.
        budget: What is still parity; by default what the bundle was built for.
        limit: Use at most so many images, spread evenly.
        progress: Told the number of images done.

    Returns:
        The report; its truth value is the verdict.

    Raises:
        DataError: If images are unusable, labels are not the classes of the network, or data came without a reference.
        OptionError: If an image source has another transform than the bundle.
        BundleError: If the golden set was altered.
    """
    budget = budget or ParityBudget(**engine.bundle.manifest["parity_budget"])
    if data is None:
        return verify_golden(engine, budget, progress)
    if reference is None:
        msg = (
            "Images were given, but nothing to compare with: pass the eager network as the reference "
            "(--weights FILE on the command line), or verify the golden set by giving no images."
        )
        raise DataError(msg)
    source = data if isinstance(data, ImageSource) else ImageSource(data, engine.transform, limit=limit)
    source.check_transform(engine.transform, "the bundle")
    expected = reference if not hasattr(reference, "eval") else eager(reference)
    current().check_equal(engine=engine.bundle.engine(engine.target)["sha256"])
    meter, labelling, done, step = ParityMeter(), LabelCheck(source), 0, f"Verifying {engine.target}"
    progress(step, 0, len(source), "images")
    for images, labels in shared_batches(source, engine.spec.batch.max):
        logits = expected(images)
        labelling.update(labels, logits)
        meter.update(logits, engine.predict(images), labels)
        done = min(len(source), done + len(images) * current().count)
        progress(step, done, len(source), "images")
    progress(step, len(source), len(source), "images")
    labelling.of_all_processes().check(int(engine.spec.outputs[0].shape[-1]))
    meter = of_all_processes(meter)
    report = meter.report(target=engine.target, executed_by=engine.executed_by, data=source.name, budget=budget)
    return replace(report, unreadable=len(source.unreadable))


def of_all_processes(meter: ParityMeter) -> ParityMeter:
    """What all processes measured together; the same in each of them."""
    whole = ParityMeter()
    for state in current().gather(meter.state()):
        whole.merge(state)
    return whole


def verify_golden(engine: Engine, budget: ParityBudget, progress: Progress = silent) -> ParityReport:
    """Compare an engine with the eager outputs that its bundle holds."""
    golden = engine.bundle.read_arrays("golden.npz")
    expected = {"images", *(tensor.name for tensor in engine.spec.outputs)}
    if not expected <= golden.keys():
        msg = f"The golden set holds {sorted(golden)} instead of {sorted(expected)}. Build the bundle again."
        raise BundleError(msg)
    images = golden["images"]
    size, step = engine.spec.batch.max, f"Proving {engine.target}"
    meters = {tensor.name: ParityMeter(tensor.name) for tensor in engine.spec.outputs}
    progress(step, 0, len(images), "images")
    for start in range(0, len(images), size):
        part = slice(start, start + size)
        outputs = engine.outputs(images[part])
        for name, meter in meters.items():
            meter.update(golden[name][part], outputs[name])
        progress(step, min(start + size, len(images)), len(images), "images")
    return meters[LOGITS].report(
        target=engine.target,
        executed_by=engine.executed_by,
        data="golden",
        budget=budget,
        attention=meters.get(ATTENTION_MAP),
    )


def eager(model: Any) -> Reference:
    """A torch network as a function from numpy images `(N, C, H, W)` to logits `(N, K)`."""
    import torch

    def forward(images: Images) -> npt.NDArray[np.float32]:
        with torch.inference_mode():
            logits: npt.NDArray[np.float32] = model(torch.from_numpy(images)).numpy()
        return logits

    return forward
