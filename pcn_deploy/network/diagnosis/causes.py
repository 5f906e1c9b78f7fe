"""Why a network cannot be compiled, in our words, and the way round it: one table, the first match counts."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Cause:
    """A recognised obstacle.

    Attributes:
        pattern: Regular expression on the framework's words.
        reason: What it means.
        advice: What to do about it.
    """

    pattern: str
    reason: str
    advice: str


CAUSES: tuple[Cause, ...] = (
    Cause(
        r"not on the expected device|SHOULD BE THE SAME DEVICE|Expected all tensors to be on the same device|"
        r"found at least two devices",
        "tensors of two devices meet.",
        "build on the CPU: make the factory return a network whose parameters and buffers are all there, "
        "register constant "
        "tensors with register_buffer, and make new tensors with device=x.device.",
    ),
    Cause(
        r"specialized it to be a constant|Constraints violated \(batch\)|Unsupported attribute type.*Symbolic",
        "the code works for one batch size only.",
        "build with a fixed batch (--batch N), or keep the batch free: x.flatten(1) or "
        "x.reshape(x.shape[0], -1), with no "
        "int(...), no number of images, and no tensor whose first axis is not 1.",
    ),
    Cause(
        r"data-dependent|symbolically traced variables cannot be used as inputs to control flow",
        "the values of a tensor, or a shape that is not known yet, decide which code runs; a graph has one "
        "way through.",
        "compute both sides and select with torch.where(condition, a, b), move the decision out of the "
        "network, and leave "
        "out checks of shapes.",
    ),
    Cause(
        r"'Proxy' object does not support item assignment",
        "a part of a tensor is assigned; a symbolic trace follows values, not memory.",
        "make a new tensor of the parts: torch.cat, torch.stack, torch.where or x.index_copy(...).",
    ),
    Cause(
        r"'len' is not supported in symbolic tracing",
        "len(x) of a batch is a Python number, and a graph is for any number of images.",
        "write x.shape[0].",
    ),
    Cause(
        r"\bProxy\b|not 'Proxy'",
        "the code asks for a Python number or a type where a symbolic trace has a symbol.",
        "compute numbers from settings in __init__, stay with tensor operations in forward, and leave out float(), "
        "int(), isinstance and torch.is_tensor.",
    ),
    Cause(
        r"complex(64|128)\b|aten[.:]+_?fft|ComplexFloat",
        "it computes with complex numbers, which ONNX and TensorRT do not have.",
        "compute real and imaginary parts as two real tensors; a Fourier transform of fixed size is a product with a "
        "constant matrix.",
    ),
    Cause(
        r"No ONNX function found|UnsupportedOperator|No decompositions? registered",
        "ONNX has no counterpart of the operator{operator}.",
        "express it with other operators, such as matmul, where, softmax or a convolution, or leave this "
        "part out of the "
        "network and run it after the engine.",
    ),
    Cause(
        r"numpy|from_numpy|np\.ndarray|tolist\(\)|item\(\)|can't be converted to (an? )?Python",
        "a tensor becomes a number, a list or a NumPy array, which leaves the graph.",
        "stay with tensors: torch functions instead of NumPy's, x.mean() instead of x.mean().item(), and "
        "register_buffer for constants.",
    ),
    Cause(
        r"attributes values that overlaps",
        "one tensor is known by two names: as a parameter or buffer, and in a list or attribute of another module.",
        "hand it to the forward that needs it as an argument, or register it there: "
        "self.scale = scale, with scale an nn.Parameter.",
    ),
    Cause(
        r"attribute assignment|Tried to set|mutat|has no field|to a non-existing attribute|assigned during export",
        "forward changes an attribute of the module.",
        "keep what forward computes in local variables and return it; a network that is deployed has no state.",
    ),
    Cause(
        r"forward\(\) (missing|takes)|got an unexpected keyword",
        "forward is not called with what it expects: the network is given one batch of images, nothing else.",
        "wrap it in an nn.Module whose forward takes the images alone, and let the factory return that.",
    ),
    Cause(
        r"shapes cannot be multiplied|must match the size|expected input.* to have|Output size is too small|"
        r"Kernel size can't be greater|invalid for input of size|size mismatch",
        "the shapes do not fit together at this input.",
        "check --resolution, and --channels for the number of channels; if one image works and several do not, "
        "build with --batch 1.",
    ),
)


def find_cause(text: str) -> Cause | None:
    """The first cause whose pattern is in the framework's words."""
    return next((cause for cause in CAUSES if re.search(cause.pattern, text)), None)


def operator_in(text: str) -> str:
    """Name of the operator that an exporter's message is about, such as ` aten._linalg_svd`; else nothing."""
    operator = re.search(r"op='([\w.:]+)'|torch\.ops\.(\w+\.\w+)", text)
    return f" {operator[1] or operator[2]}" if operator else ""
