"""Making the golden set: what the trained network answers, and of an 8-bit graph its simulation."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from pcn_deploy.aliases import Images, Outputs
from pcn_deploy.artefact.golden import GoldenSet, edge_images
from pcn_deploy.data.transform import Transform
from pcn_deploy.errors import DataError
from pcn_deploy.progress import Progress
from pcn_deploy.specs import BatchRange, EngineSpec, OutputSpec
from pcn_deploy.tasks.distance import Live, sqnr_of_output
from pcn_deploy.tasks.limits import BUDGETS, GUARD_DB
from pcn_deploy.tasks.metrics import alike
from pcn_deploy.tasks.role import Role, power_of_noise
from pcn_deploy.tasks.roles import get_role

if TYPE_CHECKING:
    from torch import Tensor, nn

Array = npt.NDArray[np.float32]
Network: TypeAlias = "nn.Module | Callable[[Tensor], Tensor | tuple[Tensor, ...]]"
Row = tuple[npt.NDArray[np.floating[Any]], ...]
"""The outputs for one image, logits first."""

REPRODUCED_DB = BUDGETS["fp32"].sqnr_db + GUARD_DB["fp32"]
"""Least SQNR between the eager network in float32 and float64 on an edge image that engines are judged by: 20 dB
more than an FP32 engine is asked for. Edge images of trained networks have 115 dB and more."""

TOGETHER = 4
"""Most images in one run in float64 or of the simulation: maps of 14x14 keep one core busy at best. Of S60 on two
cores, four at a time take two thirds of the time of one by one, and eight no less than four."""

SMALL_DB = -20.0
"""Where what the images change has less than this of the power of the logits, the rounding of float32 is measured on
as many real images as run together, and on one elsewhere."""

FAINT = 1e-4
"""Share of the size of the logits of real images, less their means, below which those of an edge image are nothing."""


def run(network: Network, images: Images, *, double: bool = False) -> list[npt.NDArray[np.floating[Any]]]:
    """What PyTorch computes.

    Args:
        network: In evaluation mode.
        images: float32 `(N, C, H, W)`; left as they are, whatever the network does with its input.
        double: Whether to compute in float64.

    Returns:
        The outputs in their order, `(N, ...)`, float32, or float64 if `double`.
    """
    import torch
    from torch import Tensor

    from pcn_deploy.network.double import InDouble

    with torch.no_grad(), InDouble() if double else nullcontext():
        output = network(torch.from_numpy(images.copy()))
    outputs = (output,) if isinstance(output, Tensor) else output
    return [tensor.to(torch.float64 if double else torch.float32).numpy() for tensor in outputs]


def golden_set(
    forward: Network,
    real: dict[str, Array],
    transform: Transform,
    outputs: tuple[OutputSpec, ...],
    batch: BatchRange,
    progress: Progress,
) -> tuple[GoldenSet, list[str]]:
    """A few real images and the edge images, with the outputs of the plain eager network.

    Args:
        forward: The network in evaluation mode, with all outputs; see `eager_outputs`.
        real: The real images, `(C, H, W)`, transformed, by name.
        transform: Makes the edge images.
        outputs: The outputs in their order; the network is judged by the first.
        batch: Least and most images that the network takes at once.
        progress: Told the number of images done.

    Returns:
        The set, without edge images for which the network itself is not finite, and notes on those and on the ones
        to which it answers nothing but its own rounding.

    Raises:
        DataError: If the network is not finite for a real image.
    """
    edge = edge_images(transform)
    names, images = [*real, *edge], [*real.values(), *edge.values()]
    rows = _eager_rows(forward, images, progress)
    finite = [all(np.isfinite(values).all() for values in row) for row in rows]
    broken = [name for name, good in zip(names, finite, strict=True) if not good]
    if not all(finite[: len(real)]):
        first = ", ".join(name for name in broken if name in real)
        msg = (
            f"The eager network returns NaN or infinite {_words(outputs)} for {first}; there is nothing to be equal to."
        )
        raise DataError(msg)
    roles = [get_role(output.role) for output in outputs]
    rounding = _rounding(forward, images, rows, np.arange(len(images)) >= len(real), batch, roles)
    noise, own_db = rounding.answered, rounding.own_db
    kept = np.flatnonzero(finite)
    columns = zip(*(rows[index] for index in kept), strict=True)
    golden = GoldenSet(
        images=np.stack([images[index] for index in kept]),
        names=tuple(names[index] for index in kept),
        edge=kept >= len(real),
        outputs={output.name: np.concatenate(values) for output, values in zip(outputs, columns, strict=True)},
        rounding=np.isin(kept, noise),
        float32_noise=rounding.noises[0],
        further_noise={output.name: noise for output, noise in zip(outputs[1:], rounding.noises[1:], strict=True)},
        roles={output.name: output.role for output in outputs},
    )
    return golden, _notes(names[: len(real)], broken, [names[index] for index in noise], own_db, _words(outputs))


def _words(outputs: tuple[OutputSpec, ...]) -> str:
    """The outputs as messages call them."""
    return " or ".join(output.name.replace("_", " ") for output in outputs)


def _notes(real: list[str], broken: list[str], noise: list[str], own_db: float, words: str) -> list[str]:
    """What the user should know of the golden set.

    Args:
        real: Names of the real images.
        broken: Those of edge images for which the network is not finite.
        noise: Those of edge images to which it answers its own rounding.
        own_db: As `_Rounding` has it.
        words: What the outputs are called.
    """
    notes = []
    if len(real) == 1:
        notes += [
            f"the golden set has one image, {real[0]}: nothing tells whether the engines look at what they are given. "
            "Give more images."
        ]
    if broken:
        notes += [
            f"the trained network itself returns NaN or infinite {words} for {', '.join(broken)} (an edge image); "
            "the engines were not judged by that."
        ]
    if noise:
        notes += [
            f"what the trained network answers to {', '.join(noise)} (an edge image) is "
            "its own rounding: float64 answers otherwise, or there is next to no answer. Of the engines it was "
            "only asked that theirs is finite."
        ]
    if own_db < REPRODUCED_DB:
        notes += [
            f"the trained network enlarges its own rounding: its answers to {real[0]} in float32 and in float64 agree "
            f"to {own_db:.1f} dB only. No engine can be closer to it, and FP16 rounds 8192 times as much as float32. "
            "Somewhere it takes the difference of nearly equal numbers: write a variance as the mean of (x - mean)^2, "
            "and take large constants off before squares, exponentials and periodic functions."
        ]
    return notes


def with_simulation(golden: GoldenSet, simulation: nn.Module, spec: EngineSpec, progress: Progress) -> GoldenSet:
    """The golden set with what the simulation of an 8-bit graph answers.

    Args:
        golden: The set.
        simulation: The module with fake quantisation.
        spec: The interface of the graph.
        progress: Told the number of images done.
    """
    rows: list[list[Array]] = []
    step, count = "Simulated reference", len(golden.images)
    for chosen in run_together(count, spec.batch):
        progress(step, int(chosen[0]), count, "images")
        rows.append([values[chosen < count] for values in run(simulation, golden.images[chosen % count])])
    progress(step, count, count, "images")
    columns = zip(spec.outputs, zip(*rows, strict=True), strict=True)
    return replace(golden, simulated={tensor.name: np.concatenate(values) for tensor, values in columns})


@dataclass(frozen=True, kw_only=True)
class _Rounding:
    """What a network's own rounding in float32 is, by a run in float64.

    Attributes:
        answered: The edge images for which its answer, though finite, is nothing else.
        own_db: How far its answer to the first image is from that in float64: SQNR in dB, infinite if unknown.
        noises: Its mean power in each output for a real image, as `GoldenSet.float32_noise`.
    """

    answered: list[int]
    own_db: float
    noises: list[float]


def _rounding(
    forward: Network,
    images: list[Array],
    rows: list[Row],
    edge: npt.NDArray[np.bool_],
    batch: BatchRange,
    roles: Sequence[Role],
) -> _Rounding:
    def size(index: int) -> float:
        return float(np.sqrt(np.square(roles[0].differences(_flat(rows[index][0]))).mean()))

    chosen = [int(index) for index in np.flatnonzero(edge) if all(np.isfinite(row).all() for row in rows[index])]
    real = [int(index) for index in np.flatnonzero(~edge)]
    least = FAINT * float(np.sqrt(np.mean([size(index) ** 2 for index in real])))
    faint = {index for index in chosen if 0 < size(index) < least}  # none at all is exact
    answers = [np.concatenate(column) for column in zip(*(rows[index] for index in real), strict=True)]
    lives = [role.live(_flat(values)) for role, values in zip(roles, answers, strict=True)]
    judged = _flat(answers[0]) if lives[0] is None else _flat(answers[0])[:, lives[0]]
    real = real[: TOGETHER if alike(judged, SMALL_DB) else 1]  # one tells enough where nothing hangs on the figure
    try:
        asked = np.stack([images[index] for index in (*real, *chosen)])
        doubles = list(_rows_in_double(forward, asked, batch))
    except Exception:  # the network's own code may insist on float32: nothing to compare with
        return _Rounding(answered=sorted(faint), own_db=math.inf, noises=[math.nan] * len(roles))
    pairs = zip(chosen, doubles[len(real) :], strict=True)
    unlike = {index for index, row in pairs if not _reproduced(rows[index], row, roles)}
    exact = [np.concatenate(column) for column in zip(*doubles[: len(real)], strict=True)]
    own_db = _least_db(rows[0], doubles[0], roles) if all(np.isfinite(row).all() for row in doubles[0]) else -math.inf
    noises = [_noise(*one) for one in zip(answers, exact, roles, lives, strict=True)]
    return _Rounding(answered=sorted(faint | unlike), own_db=own_db, noises=noises)


def _flat(values: Outputs) -> npt.NDArray[np.float64]:
    """One row per image."""
    return values.reshape(len(values), -1).astype(np.float64)


def _noise(answers: Outputs, exact: Outputs, role: Role, live: Live | None) -> float:
    """Mean power of the errors of an output whose first rows are known in float64; NaN if those are not finite.

    No less than that of their last bit: by chance few errors may be smaller.
    """
    if not np.isfinite(_flat(exact) if live is None else _flat(exact)[:, live]).all():
        return math.nan
    last_bit = np.square(_flat(np.spacing(np.abs(answers)))) / 12
    last_bit = last_bit if live is None else last_bit[:, live]
    return max(power_of_noise(exact, answers[: len(exact)], role, live), float(last_bit.sum(1).mean()))


def _rows_in_double(forward: Network, images: Images, batch: BatchRange) -> Iterator[Row]:
    """The outputs of the network computed in float64, for each image."""
    count = len(images)
    for chosen in run_together(count, batch):
        outputs = run(forward, images[chosen % count], double=True)
        for index in np.flatnonzero(chosen < count):
            yield tuple(values[[index]] for values in outputs)


def _reproduced(answers: Row, exact: Row, roles: Sequence[Role]) -> bool:
    return all(np.isfinite(row).all() for row in exact) and _least_db(answers, exact, roles) >= REPRODUCED_DB


def _least_db(answers: Row, exact: Row, roles: Sequence[Role]) -> float:
    """The least SQNR of any output for one image; of logits that of the differences counts too."""
    outputs = zip(exact, answers, roles, strict=True)
    return min(sqnr_of_output(wanted, seen, role.live(_flat(wanted))) for wanted, seen, role in outputs)


def run_together(count: int, allowed: BatchRange) -> Iterator[npt.NDArray[np.intp]]:
    """Images that are run together, where a network takes several: fewer runs, and work for more than one core.

    Args:
        count: Number of images.
        allowed: Least and most that the network takes; a batch that is too short is filled up with others.

    Yields:
        Indices of images; those beyond the last image fill up.
    """
    size = max(allowed.min, min(allowed.max, TOGETHER))
    for start in range(0, count, size):
        yield np.arange(start, max(min(start + size, count), start + allowed.min))


def _eager_rows(forward: Network, images: list[Array], progress: Progress) -> list[Row]:
    """The outputs of the network, one image at a time: engines that run several are held against that."""
    rows: list[Row] = []
    for image in images:
        progress("Eager reference", len(rows), len(images), "images")
        rows.append(tuple(run(forward, image[None])))
    progress("Eager reference", len(images), len(images), "images")
    return rows


def eager_outputs(model: nn.Module, *, attention_map: bool) -> Callable[[Tensor], tuple[Tensor, ...]]:
    """The network as a function from images `(N, C, H, W)` to all outputs that are built, in their order."""
    from pcn_deploy.network.attention_map import with_attention_map
    from pcn_deploy.network.outputs import as_tuple

    return with_attention_map(model) if attention_map else lambda images: as_tuple(model(images))
