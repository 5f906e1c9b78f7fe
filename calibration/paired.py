"""Two quantised networks on the same images: is one clearly closer to the float network than the other?"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from pcn_deploy.calibration.collect import BATCH
from pcn_deploy.data.images import ImageSource
from pcn_deploy.network.outputs import first_output

CLEARLY = 1.645
"""Standard errors by which the mean gain must be above 0: chance alone does so in 5 of 100 cases."""


@dataclass(frozen=True, eq=False)
class Errors:
    """What a network errs on each of some images: squares, summed over its first output.

    Attributes:
        noise: Of its difference from the float network, `(N,)`.
        signal: Of what the float network answers, `(N,)`.
    """

    noise: npt.NDArray[np.float64]
    signal: npt.NDArray[np.float64]

    @classmethod
    def of(cls, reference: nn.Module, quantized: nn.Module, source: ImageSource) -> Errors:
        """Run both networks on the images."""
        noise, signal = [], []
        with torch.inference_mode():
            for images, _ in source.batches(BATCH):
                pair = (first_output(network, torch.tensor(images)) for network in (reference, quantized))
                expected, outputs = (values.flatten(1).double() for values in pair)
                noise.append((outputs - expected).square().sum(1))
                signal.append(expected.square().sum(1))
        return cls(torch.cat(noise).numpy(), torch.cat(signal).numpy())

    @property
    def sqnr_db(self) -> float:
        """SQNR of all images together, in dB."""
        return 10 * math.log10(max(float(self.signal.sum()), 1e-300) / max(float(self.noise.sum()), 1e-300))

    def clearly_less_than(self, other: Errors) -> bool:
        """Whether the error is less in sum, and so is that of the typical image: by more than chance, in dB per image.

        Args:
            other: Of another network on the same images.
        """
        tiny = 1e-12 * float(other.signal.mean()) + 1e-300
        per_image = 10 * np.log10((other.noise + tiny) / (self.noise + tiny))
        error = float(per_image.std(ddof=1)) / math.sqrt(len(per_image)) if len(per_image) > 1 else math.inf
        return float(self.noise.sum()) < float(other.noise.sum()) and float(per_image.mean()) > CLEARLY * error

    def __len__(self) -> int:
        return len(self.noise)
