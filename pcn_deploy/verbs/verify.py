"""The verb `verify`: is this engine still equal to the trained network?"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from dataclasses import astuple, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from pcn_deploy.aliases import Forward, Images, Outputs
from pcn_deploy.artefact.engine import Engine
from pcn_deploy.artefact.golden import GoldenSet
from pcn_deploy.data.arrays import ArraysLike
from pcn_deploy.data.images import ImageSource
from pcn_deploy.data.labels import LabelCheck
from pcn_deploy.data.passes import each_batch
from pcn_deploy.data.processes import current
from pcn_deploy.engines.registry import get_backend
from pcn_deploy.errors import DataError
from pcn_deploy.members import GRAPH
from pcn_deploy.progress import Progress, silent
from pcn_deploy.proof.executions import with_executions
from pcn_deploy.proof.judgement import noise_floor, verify_golden
from pcn_deploy.proof.widened import WIDENED
from pcn_deploy.specs import LOGITS, EngineSpec
from pcn_deploy.tasks.changed import ChangedAnswer, changed_answers
from pcn_deploy.tasks.limits import ParityBudget
from pcn_deploy.tasks.metrics import Answered
from pcn_deploy.tasks.parity import ParityMeter
from pcn_deploy.tasks.report import ParityReport
from pcn_deploy.tasks.roles import get_role

if TYPE_CHECKING:
    from torch import nn

SAMPLE = 8
"""Images that tell whether those of a set differ."""


def verify(
    engine: Engine,
    data: str | Path | ArraysLike | ImageSource | None = None,
    *,
    reference: nn.Module | Forward | None = None,
    budget: ParityBudget | None = None,
    to_prove: bool = False,
    limit: int | None = None,
    changed: list[ChangedAnswer] | None = None,
    progress: Progress = silent,
) -> ParityReport:
    """Compare an engine with the eager network.

    Within `distributed.join` the processes share the images; all return the same report.

    Args:
        engine: An opened engine.
        data: Folder of images (sub-folders are classes), `.npz`, arrays or an image source. Without data the golden
            set of the bundle is used: images with the outputs of the eager network, so that neither the network nor
            torch is needed. Where the engine is the graph itself, that is judged without its rounding too.
        reference: The eager network, or any function from images `(N, C, H, W)` to the first output of the engine, such
            as logits `(N, K)`; needed with data. Of a network every output is compared that the engine has too.
        budget: What is still parity; by default what the bundle was built for.
        to_prove: Whether labelled images must prove, with 95 % confidence, that top-1 drops by no more than the budget
            allows; else they must not show that it drops by more.
        limit: Use at most so many images, spread over all of them.
        changed: Takes the images, of those given, to which the engine answers another class; see `tasks/changed.py`.
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
        runs_graph = get_backend(engine.executed_by).member == GRAPH
        return with_executions(report, engine, budget, progress, only=WIDENED) if runs_graph else report
    source = data if isinstance(data, ImageSource) else ImageSource(data, engine.transform, limit=limit)
    return _verify_images(engine, source, reference, budget, progress, to_prove=to_prove, changed=changed)


def _verify_images(
    engine: Engine,
    source: ImageSource,
    reference: nn.Module | Forward | None,
    budget: ParityBudget,
    progress: Progress,
    *,
    to_prove: bool,
    changed: list[ChangedAnswer] | None,
) -> ParityReport:
    expected = _expected(reference, engine.spec)
    source.check_transform(engine.transform, "the bundle")
    current().check_equal(engine=engine.bundle.engine(engine.target).sha256)
    golden = GoldenSet.read(engine.bundle)
    if not hasattr(reference, "state_dict"):  # nothing is known of its rounding
        golden = replace(golden, float32_noise=math.nan, further_noise={})
    first, *others = _compare(engine, source, expected, golden, progress, changed)
    some = np.stack([sample.image for sample in source.subset(SAMPLE)])
    floor = partial(noise_floor, golden, some, engine.bundle.manifest, engine.executed_by)
    report = first.report(
        target=engine.target,
        executed_by=engine.executed_by,
        data=source.name,
        budget=budget,
        others=[(meter, floor(meter.output)) for meter in others],
        tolerant=True,
        to_prove=to_prove,
        floor=floor(first.output),
    )
    outputs = {meter.output: golden.roles[meter.output] for meter in (first, *others)}
    notes = (*report.notes, *source.notes)
    return replace(report, outputs=outputs, unreadable=len(source.unreadable), notes=notes)


Reference: TypeAlias = Callable[[Images], dict[str, Outputs]]
"""From images to the outputs that the engine's are compared with, by name: the first of the engine's at least."""


def _expected(reference: nn.Module | Forward | None, spec: EngineSpec) -> Reference:
    """What gives the outputs that the engine's are compared with."""
    if reference is None:
        msg = (
            "Images were given, but nothing to compare with: pass the eager network as the reference "
            "(--weights FILE on the command line), or verify the golden set by giving no images."
        )
        raise DataError(msg)
    run = eager_copy(reference) if hasattr(reference, "state_dict") else reference
    return lambda images: _named(run(images), spec)


def _named(returned: Any, spec: EngineSpec) -> dict[str, Outputs]:
    """What a reference returned, by the names that the engine's outputs have.

    Raises:
        DataError: If the first output is not among it, or is no array that it could be.
    """
    first = spec.outputs[0]
    outputs = {first.name: returned}
    if not isinstance(returned, np.ndarray) and not hasattr(returned, "detach") and "torch" in sys.modules:
        from pcn_deploy.network.outputs import named_tensors

        outputs = {name: tensor for name, (_, tensor) in named_tensors(returned).items()}
    arrays = {tensor.name: _array(outputs[tensor.name]) for tensor in spec.outputs if tensor.name in outputs}
    array = arrays.get(first.name)
    if not isinstance(array, np.ndarray) or not get_role(first.role).meter(first.name).fits(array.shape):
        what = f"shape {array.shape}" if isinstance(array, np.ndarray) else f"a {type(returned).__name__}"
        shape = "logits (N, K)" if first.role == LOGITS else f"{first.name} {first.shape}"
        msg = f"The reference returned {what}; expected {shape}, as of network(images)[0] for a tuple."
        raise DataError(msg)
    return arrays


def _array(value: Any) -> Any:
    """A tensor of torch as an array."""
    return value.detach().cpu().float().numpy() if hasattr(value, "detach") else value


def _compare(
    engine: Engine,
    source: ImageSource,
    expected: Reference,
    golden: GoldenSet,
    progress: Progress,
    changed: list[ChangedAnswer] | None,
) -> list[ParityMeter]:
    """What all processes measured, each on its share of the images: of each output that the reference has too.

    Those to which the engine answers another class are put into `changed`.

    Raises:
        DataError: If images are unusable, or labels are not the classes of the network.
    """
    first, meters = golden.first, dict[str, ParityMeter]()
    labelled, differing = golden.role(first).labelled, list[ChangedAnswer]()
    labelling, step = LabelCheck(source), f"Verifying {engine.target}"
    for images, labels in each_batch(source, engine.spec.batch.max, step, progress, shared=True):
        trained, answered = expected(images), engine.outputs(images)
        meters = meters or {name: golden.meter(name) for name in trained}
        if labelled:
            labelling.update(labels, trained[first])
            if changed is not None:
                differing += changed_answers(
                    engine.target,
                    Answered.of(trained[first]),
                    Answered.of(answered[first]),
                    labels,
                    partial(_name, source, images),
                )
        for name, meter in meters.items():
            asked = labels if name == first else None
            meter.update(trained[name], answered[name], asked, partial(_name, source, images))
    if labelled:
        labelling.of_all_processes().check(int(engine.spec.outputs[0].shape[-1]))
    if changed is not None:
        every = current().gather(json.dumps([astuple(one) for one in differing]).encode())
        changed += [ChangedAnswer(*row) for text in every for row in json.loads(text)]
    names = next(filter(None, current().gather("\\n".join(meters).encode()))).decode().split("\\n")
    return [of_all_processes(meters.get(name) or golden.meter(name)) for name in names]  # some may have had no image


def _name(source: ImageSource, images: Images, index: int) -> str:
    return source.name_of(images[index])


def of_all_processes(meter: ParityMeter) -> ParityMeter:
    """What all processes measured together; the same in each of them."""
    whole = meter.fresh()
    for state in current().gather(meter.state()):
        whole.merge(state)
    return whole


def eager_copy(model: Any) -> Callable[[Images], Any]:
    """The network in evaluation mode, as a function of numpy images; the caller's keeps its mode and its statistics.

    Raises:
        ModelError: If it holds what cannot be copied.
    """
    from pcn_deploy.network.sharing import share_weights

    copied = share_weights(model)
    copied.eval()  # returns nothing where a network has a `train` of its own without a return
    return _running(copied)


def eager(model: Any) -> Forward:
    """A torch network as a function from numpy images `(N, C, H, W)` to its first output, `(N, ...)`.

    Raises, when it is called:
        DataError: If the network does not take float32.
    """
    run = _running(model)

    def forward(images: Images) -> Outputs:
        from pcn_deploy.network.outputs import as_tuple

        output: Outputs = _array(as_tuple(run(images))[0])
        return output

    return forward


def _running(model: Any) -> Callable[[Any], Any]:
    import torch

    def forward(images: Images) -> Any:
        with torch.inference_mode():
            try:
                return model(torch.tensor(images))
            except Exception as error:  # the network's own code
                msg = f"The reference cannot run on float32 images ({error}). Give it as it was trained, in float32."
                raise DataError(msg) from error

    return forward
