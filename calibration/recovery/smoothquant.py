"""SmoothQuant: part of the range of an INT8 layer's input moves, channel by channel, into its weights.

With a_j the largest magnitude of input channel j and w_j that of column j, the input is divided by
s_j = a_j^alpha / w_j^(1 - alpha) and the column multiplied by it. The division costs nothing: it goes into the affine
part of the normalisation, or into the convolution, that makes the input. alpha = 0.5 shares the difficulty equally;
larger values move more of it into the weights.

Source: Xiao et al., "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models",
arXiv 2211.10438, section 4, equation 4.
"""

from __future__ import annotations

from collections.abc import Collection

from torch import Tensor, nn

from pcn_deploy.calibration.recovery.shift import Layers, balance, reader_range, shift_ranges
from pcn_deploy.data.images import ImageSource
from pcn_deploy.progress import Progress, silent

ALPHAS = (0.5, 0.25, 0.35, 0.65, 0.75)
"""Candidates; the paper's default first. It uses 0.5 to 0.75 for language models."""

PRODUCERS = (nn.LayerNorm, nn.BatchNorm2d, nn.Conv2d, nn.Linear)


def smooth(model: nn.Module, layers: Collection[str], source: ImageSource, progress: Progress = silent) -> int:
    """Move ranges from inputs to weights where that is exact and lowers the error of the layers that read them.

    Args:
        model: The deploy form; weights are replaced in it, not changed in place.
        layers: Names of the layers that will be INT8.
        source: Calibration images: all for the ranges, some to choose alpha.
        progress: Told the number of images done.

    Returns:
        How many INT8 layers read a smoothed tensor.
    """
    return shift_ranges(model, layers, source, _propose, PRODUCERS, progress, "SmoothQuant")


def _propose(_: Layers, readers: Layers, amax: Tensor) -> list[Tensor]:
    columns = reader_range(readers)
    return [balance(amax, columns, alpha) for alpha in ALPHAS] if float(columns.max()) > 0 else []
