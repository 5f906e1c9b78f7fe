"""Types of arrays that many rooms speak of. numpy only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

Images: TypeAlias = npt.NDArray[np.float32]
"""`(N, C, H, W)`, transformed."""

Logits: TypeAlias = npt.NDArray[np.floating[Any]]
"""`(N, K)`."""

Outputs: TypeAlias = npt.NDArray[np.floating[Any]]
"""Any output, `(N, ...)`."""

Indices: TypeAlias = npt.NDArray[np.int64]

Forward: TypeAlias = Callable[[Images], Logits]
"""From images to logits, whatever computes it: a network, its simulation, an engine."""
