"""The precision plan: which operation runs in which precision, and why.

The placement rules and their evidence are in docs/quantization.md. Standard library only.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, replace
from typing import Any

from pcn_deploy.errors import ModelError, OptionError

CODES = {"int8": 127.0, "fp8": 448.0}
"""The 8-bit precisions, with the largest value of their codes. FP8 is E4M3: a sign, 4 bits of exponent, 3 of mantissa,
no infinity. Source of 448: Micikevicius et al., "FP8 Formats for Deep Learning", 2022, table 1."""

PRECISIONS = ("fp32", "fp16", "bf16", *CODES)
REMAINDERS = ("fp16", "fp32")
RESIDUAL_ADD = "ResidualAdd"
MIN_CHANNELS = 16
"""INT8 kernels of TensorRT work on tiles of 16 channels; narrower layers gain nothing. Source: NVIDIA ModelOpt."""
MAX_TAPS = 32
"""Positions of a kernel that FP8 convolutions of TensorRT take. Source: NVIDIA ModelOpt."""


@dataclass(frozen=True, kw_only=True)
class LayerFacts:
    """What the planner knows of a layer.

    Attributes:
        path: Name of the module in the deploy form.
        kind: Class name of the module.
        rows: Output positions per image: the M of the matrix product.
        in_channels: Input channels or features; 0 for a layer without weights.
        out_channels: Output channels or features: the N of the product.
        groups: Groups of a convolution.
        kernel: Kernel height and width; (1, 1) for a linear layer.
        reads_image: Whether its input is the input of the network.
        uses: How often it is called in one run.
        branch: For a residual addition, the layer whose output is added to the identity; empty if it is no layer.
        identity: For a residual addition, the modules that make or read its identity, or what it is moved from.
        own_forward: Whether it is a subclass of Conv2d or Linear that does something else.
    """

    path: str
    kind: str
    rows: int = 0
    in_channels: int = 0
    out_channels: int = 0
    groups: int = 1
    kernel: tuple[int, int] = (1, 1)
    reads_image: bool = False
    uses: int = 1
    branch: str = ""
    identity: tuple[str, ...] = ()
    own_forward: bool = False


@dataclass(frozen=True, kw_only=True)
class PlanEntry:
    """The decision for one layer.

    Attributes:
        op: Name of the module in the deploy form.
        kind: Class name of the module.
        precision: One of `PRECISIONS`.
        reason: Why, in words.
        input_amax: Magnitude that the largest code of the input stands for (of the identity, for a residual
            addition); None unless `precision` is one of `CODES`.
        operations: Whether it stands for the operations that the module does itself, those of its parts left out.
        nodes: Which of those operations, as nodes of the graph: operator and number, such as `Pow.0`; all if empty.
    """

    op: str
    kind: str
    precision: str
    reason: str
    input_amax: float | None = None
    operations: bool = False
    nodes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class PrecisionPlan:
    """Precision per layer.

    Attributes:
        precision: The precision asked for.
        remainder: Type of everything that is not quantised.
        entries: One per layer, in the order of the network.
    """

    precision: str
    remainder: str
    entries: tuple[PlanEntry, ...]

    @property
    def quantized_entries(self) -> dict[str, PlanEntry]:
        """The quantised layers by name."""
        return {entry.op: entry for entry in self.entries if entry.precision in CODES}

    @property
    def without_range(self) -> list[str]:
        """Names of the quantised layers whose input has no range yet."""
        return [path for path, entry in self.quantized_entries.items() if entry.input_amax is None]

    def types(self, *, operations: bool = False) -> dict[str, str]:
        """Floating-point type of every layer, by name; of operations that modules do themselves, if asked for those."""
        return {
            entry.op: self.remainder if entry.precision in CODES else entry.precision
            for entry in self.entries
            if entry.operations == operations and not entry.nodes
        }

    def nodes(self) -> dict[str, dict[str, str]]:
        """Floating-point type of single nodes of the graph, by the name of the module and that of the node in it."""
        return {entry.op: dict.fromkeys(entry.nodes, entry.precision) for entry in self.entries if entry.nodes}

    def summary(self) -> list[tuple[str, str, str, int]]:
        """Precision, kind, reason and how many layers share them, most frequent first."""
        counts = Counter((entry.precision, entry.kind, entry.reason) for entry in self.entries)
        return [(*key, count) for key, count in counts.most_common()]

    def with_ranges(self, ranges: dict[str, float], *, again: bool = False) -> PrecisionPlan:
        """Fill in calibrated ranges where there are none; `again`, also where these names have one.

        Layers whose input was all zero fall back to the remainder's precision.
        """
        if again:
            kept = tuple(replace(e, input_amax=None) if e.op in ranges else e for e in self.entries)
            return replace(self, entries=kept).with_ranges(ranges)
        return replace(self, entries=tuple(self._with_range(entry, ranges) for entry in self.entries))

    def leave_out(self, ops: Collection[str], reason: str) -> PrecisionPlan:
        """Give the layers named the remainder's precision, for this reason."""
        entries = tuple(
            replace(entry, precision=self.remainder, reason=reason, input_amax=None) if entry.op in ops else entry
            for entry in self.entries
        )
        return replace(self, entries=entries)

    def _with_range(self, entry: PlanEntry, ranges: dict[str, float]) -> PlanEntry:
        if entry.precision not in CODES or entry.input_amax is not None:
            return entry
        amax = ranges[entry.op]
        if amax > 0:
            return replace(entry, input_amax=amax)
        return replace(entry, precision=self.remainder, reason="its input was all zero on every calibration image")

    def to_json(self) -> dict[str, Any]:
        """Plain dictionaries, lists and values."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> PrecisionPlan:
        """Inverse of `to_json`."""
        return cls(
            precision=data["precision"],
            remainder=data["remainder"],
            entries=tuple(PlanEntry(**{**entry, "nodes": tuple(entry.get("nodes", ()))}) for entry in data["entries"]),
        )


Rule = Callable[[LayerFacts], str]
"""Returns why a layer must not be quantised, or an empty string."""


def _has_weights(layer: LayerFacts) -> str:
    if layer.own_forward:
        return "a subclass with a forward of its own: what it does to its input is not known"
    return "" if layer.in_channels else "not a Conv2d or Linear: Q/DQ would only add conversions"


def _is_dense(layer: LayerFacts) -> str:
    return "" if layer.groups == 1 else "depthwise or grouped: little gain, and conversions on both sides"


def _is_no_depthwise(layer: LayerFacts) -> str:
    return "depthwise: little gain, and conversions on both sides" if 1 < layer.groups == layer.in_channels else ""


def _has_kernel_for_groups(layer: LayerFacts) -> str:
    """Source: NVIDIA ModelOpt, which quantises these grouped convolutions and no others."""
    grouped = layer.groups > 1
    fits = layer.out_channels % 8 == 0 and min(layer.kernel) >= 3
    return "grouped: INT8 kernels take a multiple of 8 outputs and 3x3 or larger" if grouped and not fits else ""


def _is_matrix_product(layer: LayerFacts) -> str:
    return "" if min(layer.rows, layer.out_channels) > 1 else "matrix times vector: bound by memory, not arithmetic"


def _is_wide(layer: LayerFacts) -> str:
    narrow = min(layer.in_channels, layer.out_channels) < MIN_CHANNELS
    image_stem = layer.reads_image and layer.out_channels % 8 == 0 and layer.kernel[0] == layer.kernel[1]
    return f"fewer than {MIN_CHANNELS} channels" if narrow and not image_stem else ""


def _has_whole_tiles(layer: LayerFacts) -> str:
    whole = layer.in_channels % MIN_CHANNELS == layer.out_channels % MIN_CHANNELS == 0
    return "" if whole else f"FP8 kernels take multiples of {MIN_CHANNELS} channels"


def _has_small_kernel(layer: LayerFacts) -> str:
    taps = layer.kernel[0] * layer.kernel[1]
    return f"a kernel of {taps} positions; FP8 takes {MAX_TAPS}" if taps > MAX_TAPS else ""


def in_fp32(precision: str, remainder: str) -> str:
    """The option that builds in FP32 what is FP16 or BF16 now; empty where nothing is.

    Args:
        precision: One of `PRECISIONS`.
        remainder: Type of the graph outside Q/DQ.
    """
    if remainder == "fp32":
        return ""
    return "--remainder fp32" if precision in CODES else "--precision fp32"


def _is_used_once(layer: LayerFacts) -> str:
    return "" if layer.uses == 1 else "called more than once: one scale would have to fit every call"


POSSIBLE_RULES: tuple[Rule, ...] = (_has_weights, _is_used_once)
"""What speaks against 8 bits not because they gain little, but because it cannot be done."""

RULES: dict[str, tuple[Rule, ...]] = {
    "int8": (
        *(_has_weights, _is_used_once, _is_no_depthwise, _has_kernel_for_groups),
        *(_is_matrix_product, _is_wide),
    ),
    "fp8": (_has_weights, _is_used_once, _is_dense, _is_matrix_product, _has_whole_tiles, _has_small_kernel),
}
"""Against each of `CODES`, the first that speaks counts."""


def make_plan(layers: list[LayerFacts], precision: str, remainder: str = "fp16") -> PrecisionPlan:
    """Decide the precision of every layer.

    Args:
        layers: The layers in the order of the network, as `inspect_layers` returns them.
        precision: One of `PRECISIONS`.
        remainder: Type of what stays unquantised when `precision` is one of `CODES`.

    Returns:
        The plan; ranges are still to be filled in.

    Raises:
        OptionError: If a precision is unknown.
        ModelError: If no layer may be quantised as asked for.
    """
    if precision not in PRECISIONS or remainder not in REMAINDERS:
        msg = f"Precision {precision!r} with remainder {remainder!r}: known are {PRECISIONS} with {REMAINDERS}."
        raise OptionError(msg)
    if precision not in CODES:
        entries = [PlanEntry(op=x.path, kind=x.kind, precision=precision, reason=_asked_for(x)) for x in layers]
        return PrecisionPlan(precision=precision, remainder=precision, entries=tuple(entries))
    entries = [_decide(layer, precision, remainder) for layer in layers if layer.kind != RESIDUAL_ADD]
    if not any(entry.precision == precision for entry in entries):
        kinds: dict[str, set[str]] = {}
        for entry in sorted(entries, key=lambda entry: entry.reason.startswith("not a")):  # the telling ones first
            kinds.setdefault(entry.reason, set()).add(entry.kind)
        reasons = "; ".join(f"{', '.join(sorted(names))}: {reason}" for reason, names in kinds.items())
        codes = precision.upper()
        msg = f"No layer of this network gains from {codes} ({reasons}). Build it with --precision {remainder}."
        raise ModelError(msg)
    int8 = {entry.op for entry in entries if entry.precision == "int8"}
    decided = {entry.op: entry for entry in entries}
    decided |= {x.path: _decide_addition(x, int8, precision, remainder) for x in layers if x.kind == RESIDUAL_ADD}
    ordered = tuple(decided[layer.path] for layer in layers)
    return PrecisionPlan(precision=precision, remainder=remainder, entries=ordered)


def _asked_for(layer: LayerFacts) -> str:
    normalises = layer.kind.startswith("LayerNorm")
    return "as asked for" + ("; its statistics are FP32 in every graph (stash_type)" if normalises else "")


def _decide_addition(layer: LayerFacts, int8: set[str], precision: str, remainder: str) -> PlanEntry:
    """A residual addition takes its identity in INT8 where that joins it to the INT8 layer of its branch at no cost.

    An identity that another INT8 layer makes or reads is rounded to the same codes there. One that only normalisations
    read, as in a transformer's residual stream, is rounded nowhere else, and holds the outliers that they take out.
    """
    if precision != "int8":
        reason = "quantised in INT8 only"
    elif layer.branch not in int8:
        reason = "its branch does not end in an INT8 layer"
    elif int8.isdisjoint(layer.identity):
        reason = "no INT8 layer makes or reads its identity: a residual stream, rounded nowhere else"
    else:
        reason = "identity only: the addition joins the INT8 layer of its branch"
        return PlanEntry(op=layer.path, kind=layer.kind, precision="int8", reason=reason)
    return PlanEntry(op=layer.path, kind=layer.kind, precision=remainder, reason=reason)


def _decide(layer: LayerFacts, precision: str, remainder: str) -> PlanEntry:
    against = next((reason for rule in RULES[precision] if (reason := rule(layer))), "")
    return PlanEntry(
        op=layer.path,
        kind=layer.kind,
        precision=remainder if against else precision,
        reason=against or "dense product of enough rows and channels",
    )
