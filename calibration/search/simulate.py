"""Any choice of INT8 layers, switched in place: what sensitivity and search run instead of building each choice."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, nn

from pcn_deploy.aliases import Images, Logits
from pcn_deploy.calibration.quantized import QuantConv2d, QuantLinear, QuantResidualAdd, fake_quantize
from pcn_deploy.network.outputs import first_output
from pcn_deploy.network.sharing import share_weights


class Simulation:
    """A network whose INT8 layers can each be quantised, half quantised or left as they are.

    Args:
        plain: The deploy form; left as it is.
        quantized: The same with its INT8 layers quantised, from `apply_scales`.
        layers: Names of those layers.
    """

    def __init__(self, plain: nn.Module, quantized: nn.Module, layers: Collection[str]) -> None:
        self.layers = tuple(layers)
        self._network = share_weights(plain)
        self._switches: dict[str, _Switch] = {}
        for path in self.layers:
            switch = _Switch(plain.get_submodule(path), quantized.get_submodule(path))
            self._network.set_submodule(path, switch)
            self._switches[path] = switch
        self._network.eval()

    def logits(self, images: Images, *, inputs: Collection[str] = (), weights: Collection[str] = ()) -> Logits:
        """Classify images `(N, C, H, W)`.

        Args:
            images: Normalised images, float32.
            inputs: Layers whose input is rounded to their codes.
            weights: Layers whose weights are rounded to their codes.

        Returns:
            Logits `(N, K)`, float32.
        """
        for path, switch in self._switches.items():
            switch.rounds_input, switch.rounds_weight = path in inputs, path in weights
        with torch.inference_mode():
            logits: Logits = first_output(self._network, torch.tensor(images)).numpy()
        return logits


class _Switch(nn.Module):
    """One layer in two forms; a residual addition, which has no weights, rounds its identity as its input."""

    def __init__(self, plain: nn.Module, quantized: nn.Module) -> None:
        super().__init__()
        if not isinstance(quantized, QuantConv2d | QuantLinear | QuantResidualAdd):
            msg = f"expected a quantised layer, found {type(quantized).__name__}"
            raise TypeError(msg)
        self.plain, self.quantized = plain, quantized
        self.rounds_input = self.rounds_weight = False

    def forward(self, *tensors: Tensor) -> Tensor:
        """As the layer itself."""
        with_weight = self.quantized if self.rounds_weight else self.plain
        if self.rounds_input:
            rounded = fake_quantize(tensors[-1], self.quantized.input_scale, self.quantized.codes)
            tensors = (*tensors[:-1], rounded)
        # the plain class's forward, so that the quantised layer does not round its input too
        output: Tensor = type(self.plain).forward(with_weight, *tensors)
        return output
