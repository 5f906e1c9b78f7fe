"""Which tensors of an operator may be of a type: asked of ONNX's own schemas."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import onnx
import onnx_ir as ir

_SPELT = {ir.DataType.FLOAT16: "tensor(float16)", ir.DataType.BFLOAT16: "tensor(bfloat16)"}


@dataclass(frozen=True)
class Slots:
    """The inputs or outputs of an operator that may be of a type; the last one stands for all that follow it."""

    allowed: tuple[bool, ...]

    def __getitem__(self, index: int) -> bool:
        return bool(self.allowed) and self.allowed[min(index, len(self.allowed) - 1)]


@cache
def slots(domain: str, operator: str, opset: int, kind: ir.DataType) -> tuple[Slots, Slots]:
    """The inputs and the outputs that may be of a type; none where the operator is unknown.

    BF16 is asked of the newest version of the operator: ONNX lists it for convolutions since opset 22 only, while
    TensorRT takes it in graphs of any opset.

    Args:
        domain: Domain of the operator; empty for ONNX's own.
        operator: Its name, such as `Resize`.
        opset: Version of the operator set that the graph imports.
        kind: FLOAT16 or BFLOAT16.
    """
    version = onnx.defs.onnx_opset_version() if kind == ir.DataType.BFLOAT16 and not domain else opset
    try:
        schema = onnx.defs.get_schema(operator, version, domain)
    except onnx.defs.SchemaError:
        return Slots(()), Slots(())
    spelt = _SPELT[kind]
    return (
        Slots(tuple(spelt in parameter.types for parameter in schema.inputs)),
        Slots(tuple(spelt in parameter.types for parameter in schema.outputs)),
    )
