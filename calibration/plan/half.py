"""What FP16 cannot hold stays FP32: operations that would overflow, weights and outputs that would underflow."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from pcn_deploy.calibration.plan.magnitudes import Magnitudes
from pcn_deploy.calibration.plan.rules import RESIDUAL_ADD, LayerFacts, PlanEntry, PrecisionPlan

LARGEST = 65504.0
"""Largest finite FP16 value. Source: IEEE 754-2008, binary16."""

MARGIN = 8.0
"""Images to come may reach this many times the largest activation seen on a few images: three bits of headroom.

ModelOpt's AutoCast keeps whatever exceeds 512 in FP32, a margin of 128: the residual stream of a ViT reaches 1,000 and
more in ordinary work, and FP16 holds it. Weights are known, so they need no margin.
"""

SMALLEST_STEP = 2.0**-24
"""Distance of FP16 values next to 0. Source: IEEE 754-2008, binary16."""

WORST_ERROR = 2.0**-8
"""Root mean square error of rounding, relative to the tensor, from which it counts as lost: the unit roundoff of BF16,
16 times what FP16 itself loses on a tensor within its range."""


def keep_in_range(
    plan: PrecisionPlan,
    model: nn.Module,
    seen: dict[str, Magnitudes],
    layers: Collection[LayerFacts],
    decided: Collection[str] = (),
) -> PrecisionPlan:
    """Move what FP16 cannot hold to FP32.

    Args:
        plan: A plan whose graph is FP16.
        model: The deploy form.
        seen: What was observed, from `observe_magnitudes`.
        layers: The facts of the layers.
        decided: Layers that are left as the plan has them, as are entries for operations.

    Returns:
        The plan with the reason and the figures in each entry that was moved. Operations that a module does itself
        get an entry if they are moved. A residual addition whose branch is no longer INT8 is not INT8 either.
    """
    entries = [
        entry if entry.operations or entry.op in decided else _judged(entry, model, seen) for entry in plan.entries
    ]
    int8 = {entry.op for entry in entries if entry.precision == "int8"}
    parted = {layer.path for layer in layers if layer.kind == RESIDUAL_ADD and layer.branch not in int8} & int8
    listed = {entry.op for entry in entries}
    for path, magnitudes in seen.items():
        module = model.get_submodule(path)
        reason = "" if path in listed else _too_large(module, magnitudes) or _lost_weight(module)
        if reason:
            kind = type(module).__name__
            entries.append(PlanEntry(op=path, kind=kind, precision="fp32", reason=reason, operations=True))
    moved = replace(plan, entries=tuple(entries))
    return moved.leave_out(parted, "its branch does not end in an INT8 layer") if parted else moved


def _judged(entry: PlanEntry, model: nn.Module, seen: dict[str, Magnitudes]) -> PlanEntry:
    module, magnitudes = model.get_submodule(entry.op), seen.get(entry.op, Magnitudes())
    reason = _too_large(module, magnitudes)
    if reason:
        return replace(entry, precision="fp32", reason=reason, input_amax=None)
    if entry.precision != "fp16":
        return entry  # quantised weights are codes; what FP16 does to their scales is in `plan_scales`
    reason = _lost_weight(module) or _lost_output(magnitudes)
    return replace(entry, precision="fp32", reason=reason) if reason else entry


def _too_large(module: nn.Module, seen: Magnitudes) -> str:
    for name, weight in _weights(module):
        if (largest := float(weight.abs().max())) > LARGEST:
            return f"{name} reaches {largest:.3g}, FP16 ends at {LARGEST:.0f}"
    if seen.activation > LARGEST / MARGIN:
        return f"activations reach {seen.activation:.3g}, above {LARGEST / MARGIN:.0f} = FP16's largest / {MARGIN:.0f}"
    return ""


def _lost_weight(module: nn.Module) -> str:
    """Why a weight does not survive FP16. A bias always does: it is a term of a sum."""
    for name, weight in _weights(module):
        error = 0.0 if name == "bias" else _rounding_error(weight)
        if error > WORST_ERROR:
            smallest = float(weight.abs()[weight != 0].min())
            return f"{name} goes down to {smallest:.2g}, subnormal in FP16, which loses {error:.1%} of it"
    return ""


def _lost_output(seen: Magnitudes) -> str:
    if 0 < seen.output < SMALLEST_STEP / 2 / WORST_ERROR:
        return f"outputs reach only {seen.output:.2g}, subnormal in FP16"
    return ""


def _weights(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers that hang directly on a module, where they hold any number."""
    for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
        if tensor.is_floating_point() and tensor.numel():
            yield name, tensor.detach()


def _rounding_error(weight: Tensor) -> float:
    """Root mean square error of rounding to FP16, relative to the tensor; 0 where it cannot reach `WORST_ERROR`."""
    largest = float(weight.abs().max())
    if SMALLEST_STEP / 2 * weight.numel() ** 0.5 < largest * WORST_ERROR / 2:
        return 0.0  # no number errs by more than half a step next to 0, or by half a unit of its own magnitude
    norm = float(torch.linalg.vector_norm(weight))
    return float(torch.linalg.vector_norm(weight - weight.half().float())) / norm if norm else 0.0
