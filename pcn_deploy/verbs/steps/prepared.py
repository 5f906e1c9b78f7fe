"""A network with all that its graph is made from."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from pcn_deploy.specs import OutputSpec

if TYPE_CHECKING:
    from torch import nn

    from pcn_deploy.calibration.plan.magnitudes import Magnitudes
    from pcn_deploy.calibration.plan.rules import LayerFacts, PrecisionPlan
    from pcn_deploy.calibration.quantized import Quantization
    from pcn_deploy.calibration.record import Calibration
    from pcn_deploy.calibration.recovery.trial import Trial
    from pcn_deploy.graph.export import Exported


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """The deploy form whose graph is built, the name of the network, its outputs, and how it is quantised.

    `unrounded` is the same network before any recovery changed weights and biases for INT8: what a layer is that is
    not quantised after all. It is `deployed` itself where none did. `exported` is the float graph before any recovery,
    where one was asked for. `recovered` tells how many INT8 layers each recovery changed, 0 for one that was not
    kept, and `trials` why. `magnitudes` is what `observe_magnitudes` saw, where the graph is FP16. `notes` is what the
    user should know of the network at this resolution.
    """

    name: str
    outputs: tuple[OutputSpec, ...]
    deployed: nn.Module
    unrounded: nn.Module
    exported: Exported | None
    layers: tuple[LayerFacts, ...]
    plan: PrecisionPlan
    scales: dict[str, Quantization]
    calibration: Calibration | None
    rewrites: dict[str, int]
    recovered: dict[str, int] = field(default_factory=dict)
    trials: tuple[Trial, ...] = ()
    magnitudes: dict[str, Magnitudes] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def leave_out(self, layers: frozenset[str], reason: str) -> Prepared:
        """The network with some of its INT8 layers left unquantised, and in FP32 where FP16 cannot hold them."""
        from pcn_deploy.calibration.plan.half import keep_in_range
        from pcn_deploy.network.sharing import share_weights

        deployed = self.deployed
        if deployed is not self.unrounded:
            deployed = share_weights(deployed)
            for path in layers:
                deployed.set_submodule(path, self.unrounded.get_submodule(path))
        scales = {path: scale for path, scale in self.scales.items() if path not in layers}
        plan = self.plan.leave_out(layers, reason)
        if self.magnitudes:
            others = {entry.op for entry in plan.entries} - layers
            plan = keep_in_range(plan, self.unrounded, self.magnitudes, self.layers, others)
        return replace(self, deployed=deployed, plan=plan, scales=scales)

    def with_calibration(self, calibration: Calibration) -> Prepared:
        """The network with other ranges from the same images; weights and their scales stay."""
        from pcn_deploy.calibration.quantized import plan_scales

        plan = self.plan.with_ranges(calibration.ranges, again=True)
        inputs = plan_scales(self.deployed, plan)
        scales = {path: replace(own, input=inputs[path].input) for path, own in self.scales.items()}
        return replace(self, plan=plan, scales=scales, calibration=calibration)

    def units(self) -> dict[str, tuple[str, ...]]:
        """The INT8 layers, each with the residual additions that are INT8 because it is, by its name."""
        branches = {layer.path: layer.branch for layer in self.layers if layer.branch and layer.path in self.scales}
        return {
            path: (path, *(addition for addition, branch in branches.items() if branch == path))
            for path in self.scales
            if path not in branches
        }
