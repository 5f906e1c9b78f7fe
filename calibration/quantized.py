"""The quantised module: the deploy form with fake quantisation where the plan says INT8.

It scripts, freezes and exports, and computes on the CPU what TensorRT computes in INT8: symmetric codes, zero point 0,
round half to even, one scale per activation tensor, one per output channel of the weights, biases left alone.

Source: TensorRT documentation, "Explicit quantization".
"""

import torch
from torch import Tensor, nn

from pcn_deploy.calibration.plan import PrecisionPlan
from pcn_deploy.errors import DataError
from pcn_deploy.models.deploy import share_weights

QMAX = 127


def weight_scales(weight: Tensor) -> Tensor:
    """Scale per output channel, float32 `(C_out,)`, above 0; channels of zeros get 1."""
    amax = weight.detach().abs().flatten(1).amax(1)
    return torch.where(amax > 0, amax / QMAX, torch.ones_like(amax))


def quantize_weight(weight: Tensor, scales: Tensor) -> Tensor:
    """Round weights `(C_out, ...)` to multiples of their channel's scale, codes in [-127, 127]."""
    zeros = torch.zeros_like(scales, dtype=torch.int32)
    return torch.fake_quantize_per_channel_affine(weight, scales, zeros, 0, -QMAX, QMAX)


class QuantConv2d(nn.Conv2d):
    """Convolution on a fake-quantised input; `weight` holds values that INT8 codes times `weight_scale` represent."""

    weight_scale: Tensor

    def __init__(self, conv: nn.Conv2d, input_scale: float) -> None:
        super().__init__(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,  # type: ignore[arg-type] # torch annotates (int, ...) but takes its own pairs
            conv.stride,  # type: ignore[arg-type]
            conv.padding,  # type: ignore[arg-type]
            conv.dilation,  # type: ignore[arg-type]
            conv.groups,
            conv.bias is not None,
            conv.padding_mode,
            device="meta",
        )
        _take_over(self, conv)
        self.input_scale = input_scale

    def forward(self, x: Tensor) -> Tensor:
        """Convolve `(N, C_in, H, W)`."""
        x = torch.fake_quantize_per_tensor_affine(x, self.input_scale, 0, -128, 127)
        return self._conv_forward(x, self.weight, self.bias)


class QuantLinear(nn.Linear):
    """Linear layer on a fake-quantised input; `weight` as in `QuantConv2d`."""

    weight_scale: Tensor

    def __init__(self, linear: nn.Linear, input_scale: float) -> None:
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        _take_over(self, linear)
        self.input_scale = input_scale

    def forward(self, x: Tensor) -> Tensor:
        """Transform the last axis."""
        x = torch.fake_quantize_per_tensor_affine(x, self.input_scale, 0, -128, 127)
        return nn.functional.linear(x, self.weight, self.bias)


def _take_over(quantized: nn.Conv2d | nn.Linear, source: nn.Conv2d | nn.Linear) -> None:
    scales = weight_scales(source.weight)
    quantized.weight = nn.Parameter(quantize_weight(source.weight.detach(), scales), requires_grad=False)
    quantized.bias = source.bias
    quantized.register_buffer("weight_scale", scales)
    quantized.train(source.training)


def apply_plan(model: nn.Module, plan: PrecisionPlan) -> nn.Module:
    """Quantise the layers that the plan puts in INT8.

    Args:
        model: The deploy form; left as it is. Weights that are not quantised are shared with the result.
        plan: A plan with ranges.

    Returns:
        The quantised module, in evaluation mode; the network itself where the plan has no INT8.

    Raises:
        DataError: If a weight or range is not finite, or a planned layer cannot be quantised.
    """
    quantized = share_weights(model)
    for path, entry in plan.int8_entries.items():
        layer = quantized.get_submodule(path)
        if not isinstance(layer, nn.Conv2d | nn.Linear):
            msg = f"The plan quantises {path}, which is a {type(layer).__name__}; only Conv2d and Linear can be."
            raise DataError(msg)
        if entry.input_amax is None or not layer.weight.isfinite().all():
            msg = f"{path} has no calibrated range or has weights that are NaN or infinite."
            raise DataError(msg)
        scale = entry.input_amax / QMAX
        replacement = QuantConv2d(layer, scale) if isinstance(layer, nn.Conv2d) else QuantLinear(layer, scale)
        quantized.set_submodule(path, replacement)
    return quantized.eval()


def quantized_weights(model: nn.Module) -> dict[str, Tensor]:
    """Names of the quantised weight tensors of a module and their scales, float32 `(C_out,)`."""
    return {
        f"{path}.weight": module.weight_scale
        for path, module in model.named_modules()
        if isinstance(module, QuantConv2d | QuantLinear)
    }
