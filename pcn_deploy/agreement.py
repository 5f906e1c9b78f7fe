"""Whether the two portable graphs compute the same, and which one departs where they do not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
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
"""How much further apart two orders of summation may be than one of them is from float64: 3 dB as both err, and as much
again, as these are a few images."""


@dataclass(frozen=True)
class Forms:
    """A quantised network, from which its forms can be made again: the deploy form and its scales."""

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
    may move many INT8 codes by one, which looks like an error; so a typed graph that differs is judged in FP32. In a
    deep network one code that moves may move many others: then the order of summation alone decides, which shows when
    the same module runs in float64. Such a graph must agree as far as that lets it, and without codes entirely.

    Args:
        bundle: With both graphs.
        golden: The golden set; of an 8-bit graph with what its TorchScript module answers.
        spec: Their interface.
        options: What is built.
        forms: The network, where it is quantised.

    Returns:
        What the user should know; empty if they simply agree.

    Raises:
        ModelError: If they compute different things; the message names the one that departs.
    """
    import torch

    chosen = np.arange(spec.batch.min) % len(golden.images)
    images = golden.images[chosen]
    if golden.simulated:
        scripted = [golden.simulated[tensor.name][chosen] for tensor in spec.outputs]
    else:
        with torch.jit.optimized_execution(False):  # type: ignore[attr-defined] # slower, for one run
            scripted = _outputs("torchscript", bundle.read("model.ts"), spec, images)
    if options.graph_type == "bf16":  # ONNX Runtime has no BF16 on the CPU
        return ""
    exported = _outputs("cpu", bundle.read("model.onnx"), spec, images)
    found = least_sqnr_db(scripted, exported)
    if found < AGREEMENT_DB and forms is not None and options.graph_type == "fp16":
        exported = _outputs("cpu", forms.graph(quantized=True), spec, images)
        found = least_sqnr_db(scripted, exported)
    if found >= AGREEMENT_DB:
        return ""
    expected, of_what = [golden.outputs[tensor.name][chosen] for tensor in spec.outputs], "the eager network"
    if forms is not None:
        expected, of_what = forms.run(images, quantized=True, double=True), "the quantised module in float64"
        alone = least_sqnr_db(expected, forms.run(images, quantized=True))
        if found >= alone - CHAOS_DB and _equal_without_codes(forms, spec, images):
            return (
                f"the order of summation alone moves the {options.precision.upper()} answers ({alone:.1f} dB between "
                "float32 and float64): no two engines will agree better, so judge them by accuracy."
            )
    raise ModelError(_departure(found, least_sqnr_db(expected, scripted), least_sqnr_db(expected, exported), of_what))


def _equal_without_codes(forms: Forms, spec: EngineSpec, images: Images) -> bool:
    """Whether the graph is that of the network, apart from its codes."""
    graph = forms.graph(quantized=False)
    return least_sqnr_db(forms.run(images, quantized=False), _outputs("cpu", graph, spec, images)) >= EQUAL_DB


def _departure(found: float, scripted: float, exported: float, of_what: str) -> str:
    """Which graph is wrong, by how far each is from what both should be."""
    graph, asks = ("TorchScript", "torch.jit.is_scripting()")
    if exported <= scripted:
        graph, asks = "ONNX", "torch.compiler.is_exporting() or torch.onnx.is_in_onnx_export()"
    return (
        f"TorchScript and ONNX were made from one module but differ ({found:.1f} dB). From {of_what} TorchScript is "
        f"{scripted:.1f} dB away and ONNX {exported:.1f} dB: the {graph} graph departs. Either the network decides by "
        f"how it is run, such as {asks}, or the graph was made wrongly. Leave such decisions out; if there are none, "
        "please report it with the definition."
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
