"""Plain descriptions shared by every layer: tensors, batch range, engine interface. Standard library only."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from pcn_deploy.errors import OptionError

BATCH_AXIS = "batch"
"""Name of the one symbolic dimension; all others are fixed at build time."""

LOGITS = "logits"
"""Name of the first output, `(N, K)`."""

ATTENTION_MAP = "attention_map"
"""Name of the second output, if there is one: `(N, T, H, W)`, the weight of each position for each class token."""


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """One input or output of a network.

    Attributes:
        name: Name in the graph, such as `images`.
        dtype: numpy name of the element type, such as `float32`.
        shape: Dimensions; the symbolic batch axis is the string `batch`.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> TensorSpec:
        """Inverse of `dataclasses.asdict`."""
        return cls(name=str(data["name"]), dtype=str(data["dtype"]), shape=tuple(data["shape"]))

    def with_batch(self, batch: int) -> tuple[int, ...]:
        """Shape with the symbolic batch axis replaced by `batch` images."""
        return tuple(batch if isinstance(dim, str) else dim for dim in self.shape)


@dataclass(frozen=True, kw_only=True)
class BatchRange:
    """Smallest, most frequent and largest batch an engine must take (one optimisation profile).

    Raises:
        OptionError: Unless 1 <= min <= opt <= max.
    """

    min: int = 1
    opt: int = 1
    max: int = 16

    def __post_init__(self) -> None:
        if not 1 <= self.min <= self.opt <= self.max:
            msg = (
                f"Batch range {self} is not ordered: expected 1 <= MIN <= OPT <= MAX. "
                "Give it as MIN:OPT:MAX, such as 1:8:16, or as one number."
            )
            raise OptionError(msg)

    def __str__(self) -> str:
        return f"{self.min}:{self.opt}:{self.max}"

    @property
    def is_dynamic(self) -> bool:
        """Whether more than one batch size must work."""
        return self.min != self.max

    @classmethod
    def parse(cls, text: str) -> BatchRange:
        """Read `MIN:OPT:MAX`, or one number for a fixed batch.

        Raises:
            OptionError: If the text is neither.
        """
        parts = text.split(":")
        if len(parts) not in (1, 3) or not all(part.isdecimal() for part in parts):
            msg = f"Batch range {text!r} was not understood. Give MIN:OPT:MAX, such as 1:8:16, or one number."
            raise OptionError(msg)
        low, mid, high = (int(part) for part in (parts if len(parts) == 3 else parts * 3))
        return cls(min=low, opt=mid, max=high)


@dataclass(frozen=True, kw_only=True)
class EngineSpec:
    """The interface of an engine: what goes in, what comes out, and the batch sizes it takes."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    batch: BatchRange

    def to_json(self) -> dict[str, Any]:
        """Plain dictionaries, lists, strings and integers."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> EngineSpec:
        """Inverse of `to_json`."""
        return cls(
            inputs=tuple(TensorSpec.from_json(item) for item in data["inputs"]),
            outputs=tuple(TensorSpec.from_json(item) for item in data["outputs"]),
            batch=BatchRange(**data["batch"]),
        )
