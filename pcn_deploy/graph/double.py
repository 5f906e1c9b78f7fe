"""Execute a network in float64, without a copy of it: what tells its rounding from what it decides."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map


class InDouble(TorchFunctionMode):
    """Executes every operation on float32 in float64, also where the code asks for float32 by name.

    Weights are converted as they are used. What is written in place into a tensor that was made outside is lost.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Execute an operation."""
        args, kwargs = tree_map(_double, (args, kwargs or {}))
        if func is Tensor.float:
            return args[0].double()
        return tree_map(_double, func(*args, **kwargs))


def _double(value: Any) -> Any:
    if isinstance(value, Tensor) and value.dtype == torch.float32:
        return value.double()
    return torch.float64 if value is torch.float32 else value
