"""The portable graphs of a bundle, and the plan with the nodes that stay in FP32."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from pcn_deploy.artefact.bundle import Bundle
from pcn_deploy.artefact.golden import GoldenSet
from pcn_deploy.engines.base import Array
from pcn_deploy.members import GRAPH, PLAN, SCRIPT
from pcn_deploy.progress import Progress
from pcn_deploy.specs import BatchRange, OutputSpec
from pcn_deploy.verbs.options import CompileOptions
from pcn_deploy.verbs.steps.prepared import Prepared

if TYPE_CHECKING:
    from torch import nn

    from pcn_deploy.calibration.plan.rules import PrecisionPlan


def add_graphs(
    bundle: Bundle, network: Prepared, golden: GoldenSet, options: CompileOptions, progress: Progress
) -> tuple[PrecisionPlan, Callable[[], bytes]]:
    """Add the TorchScript module where a target runs it, the typed ONNX graph, and the plan with its nodes in FP32.

    Returns:
        The plan; and what makes the ONNX graph in which nothing is rounded.
    """
    import torch

    from pcn_deploy.calibration.quantized import apply_scales
    from pcn_deploy.graph.export import release_weights, serialise, to_onnx
    from pcn_deploy.graph.keep import keep_nodes
    from pcn_deploy.graph.portable import make_portable
    from pcn_deploy.graph.torchscript import to_torchscript
    from pcn_deploy.graph.typed import reduce_precision

    if options.scripts:
        progress("Scripting", 0, 1)
        quantized = apply_scales(network.deployed, network.scales)
        bundle.add(SCRIPT, to_torchscript(quantized, torch.from_numpy(golden.images[:2]), options.batch))
        progress("Scripting", 1, 1)
    shape, batch, outputs = options.transform.shape, options.batch, network.outputs
    graph = to_onnx(
        network.deployed, shape, batch, network.scales, progress, outputs=outputs, exported=network.exported
    )
    plan = network.plan
    if options.graph_type == "fp16":
        observed = _observed(golden, network, options) if network.magnitudes else None
        plan = keep_nodes(plan, graph, network.deployed, observed)
    layers, operations = plan.types(), plan.types(operations=True)
    if {options.graph_type, *layers.values(), *operations.values()} != {"fp32"}:
        reduce_precision(graph, options.graph_type, layers, operations, plan.nodes())
    make_portable(graph.graph)
    bundle.add_json(PLAN, plan.to_json())
    bundle.add(GRAPH, serialise(graph))
    release_weights(graph)
    return plan, partial(_float_graph, network.deployed, shape, batch, outputs)


def _float_graph(
    deployed: nn.Module, shape: tuple[int, int, int], batch: BatchRange, outputs: tuple[OutputSpec, ...]
) -> bytes:
    """Export again: few networks need it, and a copy of the graph that was exported would keep memory in all."""
    from pcn_deploy.graph.export import export_network, release_weights, serialise

    exported = export_network(deployed, shape, batch, outputs=outputs)
    data = serialise(exported.graph)
    release_weights(exported.graph)
    return data


def _observed(golden: GoldenSet, network: Prepared, options: CompileOptions) -> Array:
    """Images on which the graph is observed: as many real ones of the golden set as are affordable, and edge images."""
    from pcn_deploy.calibration.plan.magnitudes import affordable_images

    real, edge = golden.images[~golden.edge], golden.images[golden.edge]
    count = min(len(real), affordable_images(network.layers))
    chosen = real[np.linspace(0, len(real) - 1, count).astype(int)]
    images = np.concatenate([chosen, edge[: max(count, 2)]])
    whole = -(-len(images) // options.batch.min) * options.batch.min
    repeated: Array = images[np.arange(whole) % len(images)]
    return repeated
