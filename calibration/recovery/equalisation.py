"""Cross-layer equalisation: neighbouring convolutions get equal ranges per channel. It needs no activations.

Between two layers with a positively homogeneous operation in between (ReLU, pooling, nothing), channel i of the first
may be divided by any s_i > 0 and column i of the second multiplied by it. With r1 the range of the first layer's row
i and r2 that of the second layer's column i, s_i = sqrt(r1_i / r2_i) makes both sqrt(r1_i * r2_i).

Source: Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", arXiv 1906.04721,
section 4.1, equation 11.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, nn

from pcn_deploy.calibration.recovery.shift import Layers, balance, reader_range, shift_ranges
from pcn_deploy.data.images import ImageSource
from pcn_deploy.progress import Progress, silent


def equalise(model: nn.Module, layers: Collection[str], source: ImageSource, progress: Progress = silent) -> int:
    """Equalise the ranges across every pair of layers where that is exact and lowers the error of the second.

    Args:
        model: The deploy form; weights are replaced in it, not changed in place.
        layers: Names of the layers that will be INT8.
        source: Calibration images; they judge, the factors come from the weights.
        progress: Told the number of images done.

    Returns:
        How many INT8 layers read an equalised tensor.
    """
    return shift_ranges(model, layers, source, _propose, (nn.Conv2d, nn.Linear), progress, "Equalisation")


def _propose(producers: Layers, readers: Layers, _: Tensor) -> list[Tensor]:
    rows: Tensor = torch.cat([layer.weight.abs().flatten(1).amax(1) for layer in producers])  # type: ignore[operator]
    columns = reader_range(readers)
    if not min(float(rows.max()), float(columns.max())) > 0:
        return []
    return [balance(rows, columns)]
