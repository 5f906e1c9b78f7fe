"""Whether the two portable graphs compute the same, and which one departs where they do not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from pcn_deploy.bundle import Bundle
from pcn_deploy.engines.base import Array
from pcn_deploy.engines.registry import get_backend
from pcn_deploy.errors import ExecutionError, ModelError
from pcn_deploy.golden import GoldenSet
from pcn_deploy.options import CompileOptions
from pcn_deploy.parity import least_sqnr_db
from pcn_deploy.specs import EngineSpec

if TYPE_CHECKING:
    from torch import nn

    from pcn_deploy.calibration.quantized import Quantization

Images = npt.NDArray[np.float32]

AGREEMENT_DB = 25.0
"""Least SQNR between the TorchScript module and the ONNX graph: FP16 rounding alone leaves 64 dB and more, a graph
that was unrolled wrongly in a trial had 17 dB."""

EQUAL_DB = 60.0
"""Least SQNR between a network in float32 and its graph without codes: they sum in other orders, and leave 100 dB."""

CHAOS_DB = 6.0
"""How much further from float64 than eager float32 a right graph may be: both draw their rounding errors anew, on a few
images (our choice)."""


@dataclass(frozen=True)
class Forms:
    """A network from which its forms can be made again: the deploy form, and its scales where it is quantised."""

    deployed: nn.Module
    scales: dict[str, Quantization]
    options: CompileOptions

    def graph(self, *, quantized: bool) -> bytes:
        """Its ONNX graph in float32, with or without codes."""
        from pcn_deploy.graph.export import serialise, to_onnx

        options, scales = self.options, self.scales if quantized else {}
        shape = options.transform.shape
        return serialise(to_onnx(self.deployed, shape, options.batch, scales, outputs=options.outputs))

    def run(self, images: Images, *, quantized: bool, double: bool = False) -> list[Array]:
        """What PyTorch computes for it, without a graph, in float32 or float64."""
        from contextlib import nullcontext

        import torch
        from torch import Tensor

        from pcn_deploy.calibration.quantized import apply_scales
        from pcn_deploy.graph.double import InDouble

        network = apply_scales(self.deployed, self.scales) if quantized else self.deployed
        with torch.no_grad(), InDouble() if double else nullcontext():
            found = network(torch.from_numpy(images.copy()))
        return [tensor.float().numpy() for tensor in ((found,) if isinstance(found, Tensor) else found)]


def check_agreement(
    bundle: Bundle, golden: GoldenSet, spec: EngineSpec, options: CompileOptions, forms: Forms | None = None
) -> str:
    """Run both portable graphs once: made by different roads from one module, they must compute the same.

    A rewrite or an unrolling gone wrong could hide below the budget of INT8; it cannot hide here. Rounding to FP16
    may move many INT8 codes by one, or be enlarged by the network, which looks like an error; so a typed graph that
    differs is judged in FP32. In a deep network one code that moves may move many others: then the order of summation
    alone decides, which shows when the same module runs in float64. Such a graph must agree as far as that lets it, and
    without codes entirely. A network that does so without any code is refused as what it is: float32 is not enough.

    Args:
        bundle: With both graphs.
        golden: The golden set; of an 8-bit graph with what its TorchScript module answers.
        spec: Their interface.
        options: What is built.
        forms: The network; without it nothing can be judged but the graphs that are there.

    Returns:
        What the user should know; empty if they simply agree.

    Raises:
        ModelError: If they compute different things, the message names the one that departs; or if the network itself
            computes different things in float32 and float64.
    """
    import torch

    few = np.arange(spec.batch.min) % len(golden.images)
    if golden.simulated:
        scripted = [golden.simulated[tensor.name][few] for tensor in spec.outputs]
    else:
        with torch.jit.optimized_execution(False):  # type: ignore[attr-defined] # slower, for one run
            scripted = _outputs("torchscript", bundle.read("model.ts"), spec, golden.images[few])
    graph = bundle.read("model.onnx")
    found = least_sqnr_db(scripted, exported := _outputs("cpu", graph, spec, golden.images[few]))
    if found < AGREEMENT_DB and forms is not None and options.graph_type != "fp32":
        graph = forms.graph(quantized=True)
        found = least_sqnr_db(scripted, exported := _outputs("cpu", graph, spec, golden.images[few]))
    if found >= AGREEMENT_DB:
        return ""
    with suppress(_Float32OnlyError):
        if forms is not None:
            return _explain(found, bundle.read("model.ts"), graph, golden, spec, forms)
    expected = [golden.outputs[tensor.name][few] for tensor in spec.outputs]
    away = (least_sqnr_db(expected, scripted), least_sqnr_db(expected, exported))
    raise ModelError(_departure(found, *away, "the eager network"))


class _Float32OnlyError(Exception):
    """The network's code insists on float32."""


def _explain(found: float, script: bytes, graph: bytes, golden: GoldenSet, spec: EngineSpec, forms: Forms) -> str:
    """Why two graphs in float32 differ, asked on all real images: a note if it is rounding, else an error."""
    real = np.flatnonzero(~golden.edge)
    chosen = real[np.arange(-(-len(real) // spec.batch.min) * spec.batch.min) % len(real)]

    def over(run: Callable[[Images], list[Array]]) -> list[Array]:
        rows = [run(golden.images[part]) for part in chosen.reshape(-1, spec.batch.min)]
        return [np.concatenate(column) for column in zip(*rows, strict=True)]

    def own(*, quantized: bool) -> tuple[list[Array], float]:
        """What the network computes in float64, and how far from that it is in float32, in dB."""
        try:
            doubles = over(lambda images: forms.run(images, quantized=quantized, double=True))
        except Exception as error:  # of the network's own code
            raise _Float32OnlyError from error
        return doubles, least_sqnr_db(doubles, over(lambda images: forms.run(images, quantized=quantized)))

    def executed(target: str, graph: bytes) -> list[Array]:
        return over(lambda images: _outputs(target, graph, spec, images))

    expected, alone = own(quantized=True)
    scripted = executed("torchscript", script)
    exported = executed("cpu", graph)
    away = (least_sqnr_db(expected, scripted), least_sqnr_db(expected, exported))
    departure = _departure(found, *away, f"the {'quantised module' if forms.scales else 'network'} in float64")
    if min(away) < alone - CHAOS_DB:
        raise ModelError(departure)
    if forms.scales:
        plain = executed("cpu", forms.graph(quantized=False))
        if least_sqnr_db(over(lambda images: forms.run(images, quantized=False)), plain) >= EQUAL_DB:
            return (
                f"the order of summation alone moves the {forms.options.precision.upper()} answers ({alone:.1f} dB "
                "between float32 and float64): no two engines will agree better, so judge them by accuracy."
            )
        expected, alone = own(quantized=False)
        if alone >= EQUAL_DB or least_sqnr_db(expected, plain) < alone - CHAOS_DB:
            raise ModelError(departure)
    raise ModelError(_not_enough(found, alone))


def _not_enough(found: float, alone: float) -> str:
    """Why two right graphs of a network differ."""
    return (
        f"The network enlarges its own rounding: eager float32 and eager float64 agree to {alone:.1f} dB only, and its "
        f"graphs to {found:.1f} dB. No engine could be equal to it. Somewhere it takes the difference of nearly "
        "equal numbers: write a variance as the mean of (x - mean)^2, not as E[x^2] - E[x]^2, and take large constants "
        "off before squares, exponentials and periodic functions."
    )


def _departure(found: float, scripted: float, exported: float, of_what: str) -> str:
    """Which graph is wrong, by how far each is from what both should be."""
    graph, asks = ("TorchScript", "torch.jit.is_scripting()")
    if exported <= scripted:
        graph, asks = "ONNX", "torch.compiler.is_exporting() or torch.onnx.is_in_onnx_export()"
    departs = f"the {graph} graph departs. Either the network decides by how it is run, such as {asks}, or the graph"
    if max(scripted, exported) < AGREEMENT_DB:
        departs = "both graphs depart. Either the network decides by how it is run, or each graph"
    return (
        f"TorchScript and ONNX were made from one module but differ ({found:.1f} dB). From {of_what} TorchScript is "
        f"{scripted:.1f} dB away and ONNX {exported:.1f} dB: {departs} was made wrongly. Leave such decisions out; if "
        "there are none, please report it with the definition."
    )


def _outputs(target: str, graph: bytes, spec: EngineSpec, images: Images) -> list[Array]:
    """What a portable graph returns, in the order of its interface."""
    with executing(target), get_backend(target).open(graph, spec) as session:
        found = session.run({spec.inputs[0].name: images})
    return [found[tensor.name] for tensor in spec.outputs]


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
