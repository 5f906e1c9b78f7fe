"""Single nodes of the graph that stay FP32 in an FP16 graph, as entries of the precision plan."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from torch import nn

from pcn_deploy.calibration.plan.rules import PlanEntry, PrecisionPlan
from pcn_deploy.graph.delicate import find_delicate
from pcn_deploy.graph.observed import beyond_range, observe_graph
from pcn_deploy.graph.typed import node_places, takes_its_type

_LISTED = 4
"""Reasons that an entry names."""


def keep_nodes(
    plan: PrecisionPlan, model: ir.Model, network: nn.Module, images: npt.NDArray[np.float32] | None
) -> PrecisionPlan:
    """Move to FP32 what FP16 cannot compute, node by node.

    Args:
        plan: A plan whose graph is FP16. Operations that it has an entry for are left as it says.
        model: The float32 graph, simplified, with the exporter's notes.
        network: The module it was exported from.
        images: float32 `(N, C, H, W)` on which magnitudes are observed; None to go by the form of the graph alone.

    Returns:
        The plan with an entry for each module some of whose own nodes were moved, with reasons and figures.
    """
    fp32_nodes = find_delicate(model.graph)
    if images is not None:
        fp32_nodes = beyond_range(model, observe_graph(model, images)) | fp32_nodes
    decided = {entry.op for entry in plan.entries if entry.operations}
    decided |= {path for path, precision in plan.types().items() if precision == "fp32"}
    moved: dict[str, dict[str, str]] = {}
    for node, (path, name) in node_places(model.graph.all_nodes()).items():
        if node in fp32_nodes and path not in decided and not takes_its_type(node):
            moved.setdefault(path, {})[name] = fp32_nodes[node]
    entries = [
        PlanEntry(
            op=path,
            kind=type(network.get_submodule(path)).__name__,
            precision="fp32",
            reason=_told(nodes),
            operations=True,
            nodes=tuple(nodes),
        )
        for path, nodes in moved.items()
    ]
    return replace(plan, entries=(*plan.entries, *entries))


def _told(nodes: dict[str, str]) -> str:
    """The reasons, each with the operators that it holds for."""
    operators: dict[str, dict[str, None]] = {}
    for name, reason in nodes.items():
        operators.setdefault(reason, {})[name.rpartition(".")[0]] = None
    told = [f"{', '.join(names)}: {reason}" for reason, names in operators.items()]
    more = f"; and {len(told) - _LISTED} more" if len(told) > _LISTED else ""
    return "; ".join(told[:_LISTED]) + more
