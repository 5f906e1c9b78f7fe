"""Wrappers that people put around a network for training."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim.swa_utils import AveragedModel


def unwrapped(model: nn.Module) -> nn.Module:
    """The network inside of wrappers that add nothing to it: `torch.compile`, data parallelism, averaged weights."""
    wrappers = (nn.DataParallel, nn.parallel.DistributedDataParallel, AveragedModel)
    while isinstance(model, wrappers) or hasattr(model, "_orig_mod"):
        inner: Any = model.module if isinstance(model, wrappers) else model._orig_mod
        model = inner
    return model
