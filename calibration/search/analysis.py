"""What an analysis of the layers found, as plain data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pcn_deploy.calibration.search.sensitivity import Sensitivity


@dataclass(frozen=True, kw_only=True)
class Analysis:
    """What an analysis found.

    Attributes:
        sensitivity: Effects per layer, most harmful first.
        order: Names of the layers in the order of the network.
        unquantized: Layers that the plan does not quantise at all, with the reason.
        data: Where the images came from.
        resumed: Measurements taken over from a run that was killed.
        notes: What the user should know of the images.
    """

    sensitivity: Sensitivity
    order: tuple[str, ...]
    unquantized: dict[str, str]
    data: str
    resumed: int
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "data": self.data,
            **self.sensitivity.to_json(),
            "order": list(self.order),
            "unquantized": self.unquantized,
            "notes": list(self.notes),
        }
