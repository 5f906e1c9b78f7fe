"""Plain descriptions shared by every layer: tensors, batch range, engine interface. Standard library only."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from pcn_deploy.errors import OptionError

BATCH_AXIS = "batch"
"""Name of the one symbolic dimension; all others are fixed at build time."""

IMAGE = "image"
"""Role of an input: images `(N, C, H, W)`, transformed."""

LOGITS = "logits"
"""Role of an output, and its name unless the network has one: `(N, K)`, one number per class."""

ATTENTION_MAP = "attention_map"
"""Role and name of an output: `(N, T, H, W)`, the weight of each position for each class token."""

TENSOR = "tensor"
"""Role of an output that is compared as it stands: `(N, ...)`."""


TAKEN = (
    "images",
    "names",
    "rounding",
    "float32_noise",
    "edge",
    "simulated",
    "widened",
    "least_widened",
    "stock",
    "rounded",
)
"""What the input, the golden set, and the parts of a report are called: no output has such a name or beginning."""


def usual_role(name: str) -> str:
    """The role of an output of which only the name is known."""
    return name if name in (LOGITS, ATTENTION_MAP) else TENSOR


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """One input or output of a network.

    Attributes:
        name: Name in the graph, such as `images`.
        dtype: numpy name of the element type, such as `float32`.
        shape: Dimensions; the symbolic batch axis is the string `batch`.
        role: What it means: of an input `image`, of an output one of `tasks.roles.ROLES`.
        axes: Names of the dimensions, such as `batch`, `channel`, `height`, `width`; empty where they have none.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]
    role: str = ""
    axes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.role:
            object.__setattr__(self, "role", usual_role(self.name))

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> TensorSpec:
        """Inverse of `dataclasses.asdict`."""
        return cls(
            name=str(data["name"]),
            dtype=str(data["dtype"]),
            shape=tuple(data["shape"]),
            role=str(data.get("role", "")),  # this and the axes are not in bundles of schema 1
            axes=tuple(data.get("axes", ())),
        )

    def with_batch(self, batch: int) -> tuple[int, ...]:
        """Shape with the symbolic batch axis replaced by `batch` images."""
        return tuple(batch if isinstance(dim, str) else dim for dim in self.shape)


@dataclass(frozen=True)
class OutputSpec:
    """An output that is built: its name and its role."""

    name: str = LOGITS
    role: str = LOGITS


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

    def output_of(self, role: str) -> TensorSpec | None:
        """The first output of a role, if there is one."""
        return next((tensor for tensor in self.outputs if tensor.role == role), None)

    def to_json(self) -> dict[str, Any]:
        """Plain dictionaries, lists, strings and integers."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> EngineSpec:
        """Inverse of `to_json`."""
        return cls(
            inputs=tuple(TensorSpec.from_json({"role": IMAGE, **item}) for item in data["inputs"]),
            outputs=tuple(TensorSpec.from_json(item) for item in data["outputs"]),
            batch=BatchRange(**data["batch"]),
        )
