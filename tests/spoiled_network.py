"""A network some of whose layers hurt in INT8, for searches and analyses."""

from __future__ import annotations

import torch
from small_builds import images, network

from pcn_deploy.calibration.collect import calibrate
from pcn_deploy.calibration.plan.facts import inspect_layers
from pcn_deploy.calibration.plan.rules import make_plan
from pcn_deploy.calibration.quantized import apply_scales, plan_scales
from pcn_deploy.calibration.search.simulate import Simulation
from pcn_deploy.data.images import ImageSource
from pcn_deploy.data.transform import Transform
from pcn_deploy.network.deploy import to_deploy

TRANSFORM = Transform(resolution=(32, 32))
HARMFUL = {"blocks.0.attn.qkv_pos.5", "blocks.1.attn.qkv_pos.0"}
"""Layers whose range is so wide that they ruin the answers."""


def spoiled_network() -> tuple[Simulation, dict[str, str], ImageSource]:
    """Its simulation, the class of each layer, and 300 images."""
    torch.manual_seed(0)
    deployed, _ = to_deploy(network(), torch.rand(1, 3, 32, 32))
    source = ImageSource([images(300)], TRANSFORM)
    plan = make_plan(inspect_layers(deployed, torch.zeros(1, 3, 32, 32)), "int8", "fp32")
    seen = calibrate(deployed, list(plan.quantized_entries), source.subset(16), "max")
    ranges = {path: 300 * amax if path in HARMFUL else amax for path, amax in seen.ranges.items()}
    scales = plan_scales(deployed, plan.with_ranges(ranges))
    kinds = {entry.op: entry.kind for entry in plan.entries}
    return Simulation(deployed, apply_scales(deployed, scales), scales), kinds, source


def units(simulation: Simulation) -> dict[str, tuple[str, ...]]:
    """Each layer by itself."""
    return {layer: (layer,) for layer in simulation.layers}
