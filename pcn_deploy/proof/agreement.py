"""Whether the deploy form and both portable graphs compute what they were made from, and which one departs if not."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from pcn_deploy.aliases import Images
from pcn_deploy.artefact.bundle import Bundle
from pcn_deploy.artefact.golden import GoldenSet
from pcn_deploy.engines.base import Array, Session
from pcn_deploy.engines.onnxruntime import open_plain
from pcn_deploy.engines.registry import get_backend
from pcn_deploy.errors import ExecutionError, ModelError
from pcn_deploy.members import GRAPH, SCRIPT
from pcn_deploy.proof.reference import Network, run, run_together
from pcn_deploy.specs import EngineSpec
from pcn_deploy.tasks.distance import Live, sqnr_of_images, sqnr_of_output
from pcn_deploy.tasks.noise_floor import ORDER_DB

if TYPE_CHECKING:
    from torch import nn

    from pcn_deploy.calibration.plan.rules import PrecisionPlan
    from pcn_deploy.calibration.quantized import Quantization

Lives: TypeAlias = Sequence[Live | None]

EQUAL_DB = 80.0
"""Least SQNR between two float32 executions of one function: they sum in other orders, and leave 100 dB and more. A
graph that was unrolled wrongly in a trial had 17 dB."""

ROUNDED_DB = 40.0
"""The same of a graph whose weights and literals are rounded: FP16 literals alone, such as the scale of an attention,
leave 50 dB on images where the network hangs on them."""

NOTHING_DB = 20.0
"""Where two executions of one network share less than that, its answers are their rounding, and tell of no form."""

SHARPEST_DB = 100.0
"""The most that is asked of a rounded graph without its rounding: 8 to 30 dB less than right ones have."""

CHAOS_DB = 6.0
"""How much of its SQNR a graph may lose from one execution to another: twice the noise, as elsewhere, in amplitude."""


@dataclass(frozen=True, kw_only=True)
class Forms:
    """A network in the forms that its graphs are made from.

    Attributes:
        eager: The network as it was given, with all outputs.
        unrounded: The deploy form before any recovery.
        simulated: The quantised module, from which TorchScript is made; else the deploy form.
        stored: The deploy form with the weights of the ONNX graph, and nothing else rounded.
        floating: The same with the weights of the deploy form.
    """

    eager: Network
    unrounded: nn.Module
    simulated: nn.Module
    stored: nn.Module
    floating: nn.Module

    @classmethod
    def of(
        cls,
        eager: Network,
        deployed: nn.Module,
        unrounded: nn.Module,
        scales: dict[str, Quantization],
        plan: PrecisionPlan,
    ) -> Forms:
        """Those of a deploy form.

        Args:
            eager: What it was made from, with all outputs.
            deployed: The deploy form.
            unrounded: The deploy form before any recovery.
            scales: Of its quantised layers.
            plan: With the types of everything that is not quantised.
        """
        from pcn_deploy.calibration.quantized import apply_scales, with_stored_weights

        simulated = apply_scales(deployed, scales)
        stored = with_stored_weights(simulated, plan)
        return cls(
            eager=eager,
            unrounded=unrounded,
            simulated=simulated,
            stored=stored,
            floating=deployed,
        )


def check_agreement(
    bundle: Bundle,
    golden: GoldenSet,
    spec: EngineSpec,
    forms: Forms,
    *,
    scripted: bool,
    rounded: bool,
    float_graph: Callable[[], bytes] | None = None,
) -> tuple[GoldenSet, dict[str, Array]]:
    """Run every form of the network, in float32: each must compute what it was made from.

    A rewrite or an unrolling gone wrong could hide below the budget of INT8; it cannot hide here. The ONNX graph is
    compared with its rounding taken out but for that of the weights, and TorchScript with the module it was made from:
    so neither FP16 nor codes that move by one look like an error. In a network that enlarges its own rounding the order
    of summation alone decides, which shows when the same network runs in float64; and weights that the graph computes
    before it rounds them, as a standardised one, differ from those of the network by that rounding. Such a form must
    agree as far as these let it.

    Args:
        bundle: With both graphs.
        golden: The golden set.
        spec: Their interface.
        forms: The network.
        scripted: Whether there is TorchScript too.
        rounded: Whether the ONNX graph rounds: it has codes, or a type smaller than float32.
        float_graph: Makes the ONNX graph in which nothing is rounded; asked where rounding leaves a doubt.

    Returns:
        The golden set; of a rounded graph with what the network answers with its weights, and how far from that the
        graph without rounding may be. And what that answers to the real images, by name; nothing of an FP32 graph.

    Raises:
        ModelError: If one computes something else; the message names the one that departs.
    """
    images = golden.images[~golden.edge][:2]  # two tell what they change
    lives = _lives(golden)
    answers = [golden.outputs[tensor.name][~golden.edge][:2] for tensor in spec.outputs]
    eager, module = (partial(_rows, form, images, spec) for form in (forms.eager, forms.simulated))
    _compare(
        "deploy form",
        answers,
        _rows(forms.unrounded, images, spec),
        "the eager network",
        lives,
        partial(eager, double=True),
    )
    if scripted:
        _check_scripted(bundle, golden, spec, forms)
    if rounded:
        return _check_widened(bundle, golden, spec, forms, float_graph)
    exported = _executed(partial(bundle.read, GRAPH), images, spec)
    _compare("ONNX graph", module(), exported, "its module", lives, partial(module, double=True))
    return golden, {}


def _lives(golden: GoldenSet) -> Lives:
    return [golden.live(name) for name in golden.outputs]


def _check_scripted(bundle: Bundle, golden: GoldenSet, spec: EngineSpec, forms: Forms) -> None:
    """Compare TorchScript with its module, on a batch that both run whole: their kernels are the same then."""
    import torch

    lives, chosen = _lives(golden), next(run_together(len(golden.images), spec.batch))
    images = golden.images[chosen % len(golden.images)]
    module, slower = partial(run, forms.simulated, images), torch.jit.optimized_execution(False)  # type: ignore[attr-defined]
    with slower, executing("torchscript"), get_backend("torchscript").open(bundle.read(SCRIPT), spec) as session:
        answers = session.run({spec.inputs[0].name: images})
    scripted = [answers[tensor.name] for tensor in spec.outputs]
    _compare("TorchScript graph", module(), scripted, "its module", lives, partial(module, double=True))


def _check_widened(
    bundle: Bundle, golden: GoldenSet, spec: EngineSpec, forms: Forms, float_graph: Callable[[], bytes] | None
) -> tuple[GoldenSet, dict[str, Array]]:
    """Compare the graph without its rounding with the network that has its weights, on every real image.

    What its types round besides weights leaves some difference: where that is more than the order of summation
    explains, the graph in which nothing is rounded must have less.
    """
    from pcn_deploy.engines.rounded import widen

    lives, images = _lives(golden), golden.images[~golden.edge]
    expected, outputs = _rows(forms.stored, images, spec), _executed(lambda: widen(bundle.read(GRAPH)), images, spec)
    apart = np.min([sqnr_of_images(*one) for one in zip(expected, outputs, lives, strict=True)], axis=0)
    if not apart.min() >= ROUNDED_DB:  # NaN is not
        stored, floating = (partial(_rows, form, images, spec) for form in (forms.stored, forms.floating))
        roundings = partial(stored, double=True), floating
        _explain("ONNX graph", float(apart.min()), "its module", expected, lives, *roundings)
    if float_graph and not apart.min() >= EQUAL_DB:
        some, shown = images[:2], [values[:2] for values in expected]
        if apart[:2].min() < _explained(shown, lives, partial(_rows, forms.stored, some, spec, double=True)) - ORDER_DB:
            floating = partial(_rows, forms.floating, some, spec)
            exported = _executed(float_graph, some, spec)
            _compare("ONNX graph", floating(), exported, "its module", lives, partial(floating, double=True))
    names = [tensor.name for tensor in spec.outputs]
    limits = np.minimum(SHARPEST_DB, apart - CHAOS_DB)
    wanted = dict(zip(names, expected, strict=True))
    return replace(golden, widened=wanted, widened_db=limits), dict(zip(names, outputs, strict=True))


def _executed(graph: Callable[[], bytes], images: Images, spec: EngineSpec) -> list[Array]:
    """What a graph answers to each image; its bytes are not kept while it runs."""
    with executing("cpu"), open_plain(graph(), spec) as session:
        return _outputs(session, [np.repeat(image[None], spec.batch.min, axis=0) for image in images])


def _rows(network: Network, images: Images, spec: EngineSpec, *, double: bool = False) -> list[Array]:
    """What PyTorch answers to each image `(M, C, H, W)`, a few at a time: the outputs in their order, `(M, ...)`."""
    chosen = run_together(len(images), spec.batch)
    rows = [run(network, images[one % len(images)], double=double) for one in chosen]
    return [np.concatenate(column)[: len(images)] for column in zip(*rows, strict=True)]


def _compare(
    form: str,
    expected: list[Array],
    outputs: list[Array],
    of_what: str,
    lives: Lives,
    *roundings: Callable[[], list[Array]],
) -> None:
    """Refuse a form that is further from what it was made from than two float32 executions are.

    Args:
        form: Its name.
        expected: Outputs of what it was made from.
        outputs: Its own.
        of_what: What it was made from.
        lives: Which entries of each output are compared, as `GoldenSet.live` has it.
        roundings: Further executions of what it was made from, which differ from `expected` by rounding alone.

    Raises:
        ModelError: If rounding does not explain how far they are apart.
    """
    apart = _apart(expected, outputs, lives)
    if apart < EQUAL_DB:
        _explain(form, apart, of_what, expected, lives, *roundings)


def _explain(
    form: str,
    apart: float,
    of_what: str,
    expected: list[Array],
    lives: Lives,
    *roundings: Callable[[], list[Array]],
) -> None:
    explained = min(_explained(expected, lives, execute) for execute in roundings)
    least = explained - ORDER_DB if explained >= NOTHING_DB else -math.inf
    if apart < least:
        raise ModelError(_departure(form, apart, of_what, explained))


def _explained(expected: list[Array], lives: Lives, execute: Callable[[], list[Array]]) -> float:
    try:
        return _apart(expected, execute(), lives)
    except Exception:  # the network's own code may insist on float32, or not be finite otherwise: no explanation
        return math.inf


def _apart(expected: list[Array], outputs: list[Array], lives: Lives) -> float:
    """The least SQNR, in dB, of any output: of all images together, and of what they change in each of them."""
    compared = list(zip(expected, outputs, lives, strict=True))
    changes = [float(sqnr_of_images(*one).min()) for one in compared]
    return min(*(sqnr_of_output(*one) for one in compared), *changes)


_ASKS = {
    "ONNX graph": "torch.compiler.is_exporting() or torch.onnx.is_in_onnx_export()",
    "TorchScript graph": "torch.jit.is_scripting()",
}
"""By what a network may decide otherwise in a form."""


def _departure(form: str, apart: float, of_what: str, explained: float) -> str:
    if form not in _ASKS:
        return (
            f"The {form} departs: it is {apart:.1f} dB away from {of_what}, in float32, of which rounding explains "
            f"{explained:.1f} dB. Please report it with the definition of the network."
        )
    return (
        f"The {form} departs: it is {apart:.1f} dB away from {of_what}, in float32 and without any rounding of "
        f"activations, of which rounding explains {explained:.1f} dB. Either the network decides by how it is run, "
        f"such as {_ASKS[form]}, or it holds constants that FP16 rounds and that are no parameters or buffers, or the "
        "graph was made wrongly. Leave such decisions and constants out; if there are none, please report it with the "
        "definition."
    )


def _outputs(session: Session, batches: list[Images]) -> list[Array]:
    """What a portable graph returns for the first image of each batch, in the order of its interface."""
    rows = [session.run({session.spec.inputs[0].name: batch}) for batch in batches]
    return [np.concatenate([row[tensor.name][:1] for row in rows]) for tensor in session.spec.outputs]


@contextmanager
def executing(target: str) -> Iterator[None]:
    """Run a portable graph for the first time: where it fails, it is the network that cannot be compiled.

    Args:
        target: What executes it.

    Raises:
        ModelError: If it fails.
    """
    try:
        yield
    except ExecutionError as error:  # __cause__ is what a scripted module raises when it runs
        reason = str(error.__cause__).strip().splitlines()[-1]
        msg = f"{get_backend(target).member} cannot be executed: {reason}"
        raise ModelError(msg) from error
