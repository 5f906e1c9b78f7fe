"""The quantised module: the deploy form with fake quantisation where the plan says INT8 or FP8.

It scripts and freezes, and computes on the CPU what TensorRT computes in 8 bits: symmetric codes, zero point 0, round
half to even, one scale per activation tensor, for INT8 one per output channel of the weights and for FP8 one per
weight, biases left alone.

Source: TensorRT documentation, "Explicit quantization".
"""

from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from pcn_deploy.calibration.calibrators import WEIGHT_CALIBRATORS, check_weight_calibrator
from pcn_deploy.calibration.plan.rules import CODES, PrecisionPlan
from pcn_deploy.calibration.scales import input_scale, stored_scales
from pcn_deploy.calibration.weights import QMAX, weight_scales
from pcn_deploy.errors import DataError
from pcn_deploy.models.layers import ResidualAdd
from pcn_deploy.network.sharing import share_weights

QUANTIZABLE = (nn.Conv2d, nn.Linear, ResidualAdd)
NOT_ROUNDED = ""
"""In the place of `codes`: the layer takes its input as it is."""

TYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Quantization:
    """Scales of one layer: value = code * scale.

    Attributes:
        input: Scale of its input; of a residual addition, of the identity.
        weight: Scale per output channel, float32 `(C_out,)`; of FP8 one for the whole weight, `(1,)`; empty for a
            residual addition.
        codes: One of `plan.CODES`.
    """

    input: float
    weight: npt.NDArray[np.float32]
    codes: str = "int8"


def plan_scales(
    model: nn.Module, plan: PrecisionPlan, weight_calibrator: str = WEIGHT_CALIBRATORS[0]
) -> dict[str, Quantization]:
    """Scales of every layer that the plan quantises.

    Where the rest of the graph is FP16, scales are stored in FP16 beside it; they are rounded here, before any code is
    computed from them, so that every engine and the quantised module use the same values.

    Args:
        model: The deploy form.
        plan: A plan with ranges.
        weight_calibrator: One of `WEIGHT_CALIBRATORS`.

    Returns:
        Scales by the name of the layer.

    Raises:
        DataError: If a range or a weight is not finite, a scale is beyond the type it is stored in, or a planned layer
            is of a kind that cannot be quantised.
        OptionError: If the weight calibrator is unknown.
    """
    check_weight_calibrator(weight_calibrator)
    scales = {}
    for path, entry in plan.quantized_entries.items():
        layer = model.get_submodule(path)
        if not isinstance(layer, QUANTIZABLE):
            msg = f"The plan quantises {path}, which is a {type(layer).__name__}; only Conv2d and Linear can be."
            raise DataError(msg)
        if not 0 < (entry.input_amax or 0) <= float(np.finfo(np.float32).max):
            msg = (
                f"The range of {path} is {entry.input_amax}; expected a float32 above 0. Calibrate it or leave it out."
            )
            raise DataError(msg)
        scale = input_scale(entry.input_amax or 0, entry.precision, path, plan.remainder)
        stored = partial(stored_scales, path=path, remainder=plan.remainder)
        weight = np.zeros(0, np.float32)
        if not isinstance(layer, ResidualAdd):
            if not layer.weight.isfinite().all():
                msg = f"{path} has weights that are NaN or infinite: mend the checkpoint."
                raise DataError(msg)
            if entry.precision == "int8":
                weight = weight_scales(layer.weight, weight_calibrator, stored)
            else:
                largest = np.float32(CODES[entry.precision])
                weight = stored(np.array([float(layer.weight.abs().max()) or 1.0], np.float32) / largest)
        scales[path] = Quantization(scale, weight, entry.precision)
    return scales


def fake_quantize(x: Tensor, scale: float, codes: str) -> Tensor:
    """Round a tensor to what its codes stand for: INT8 in [-128, 127], or E4M3 in [-448, 448], or not at all."""
    if codes == "":
        return x
    if codes == "fp8":
        return round_to_e4m3(x / scale) * scale
    rounded: Tensor = torch.fake_quantize_per_tensor_affine(x, scale, 0, -128, 127)
    return rounded


def round_to_e4m3(x: Tensor) -> Tensor:
    """The nearest E4M3 values, ties to even; what is beyond 448 becomes 448."""
    return x.clamp(-448.0, 448.0).to(torch.float8_e4m3fn).to(x.dtype)


def quantize_weight(weight: Tensor, scales: Tensor, codes: str = "int8") -> Tensor:
    """Round weights `(C_out, ...)` to what their codes stand for at their channel's scale; INT8 in [-127, 127]."""
    if codes == "fp8":
        return round_to_e4m3(weight / scales) * scales
    zeros = torch.zeros_like(scales, dtype=torch.int32)
    rounded: Tensor = torch.fake_quantize_per_channel_affine(weight, scales, zeros, 0, -QMAX, QMAX)
    return rounded


class QuantConv2d(nn.Conv2d):
    """Convolution on a fake-quantised input; `weight` holds the values that its INT8 codes stand for."""

    def __init__(self, conv: nn.Conv2d, scales: Quantization) -> None:
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
        _take_over(self, conv, scales)
        self.input_scale, self.codes = scales.input, scales.codes

    def forward(self, x: Tensor) -> Tensor:
        """Convolve `(N, C_in, H, W)`."""
        x = fake_quantize(x, self.input_scale, self.codes)
        y: Tensor = self._conv_forward(x, self.weight, self.bias)
        return y


class QuantLinear(nn.Linear):
    """Linear layer on a fake-quantised input; `weight` as in `QuantConv2d`."""

    def __init__(self, linear: nn.Linear, scales: Quantization) -> None:
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        _take_over(self, linear, scales)
        self.input_scale, self.codes = scales.input, scales.codes

    def forward(self, x: Tensor) -> Tensor:
        """Transform the last axis."""
        x = fake_quantize(x, self.input_scale, self.codes)
        return nn.functional.linear(x, self.weight, self.bias)


class QuantResidualAdd(ResidualAdd):
    """Residual addition whose identity is fake-quantised; the branch comes out of an INT8 layer as it is."""

    def __init__(self, scales: Quantization) -> None:
        super().__init__()
        self.input_scale, self.codes = scales.input, scales.codes

    def forward(self, branch: Tensor, identity: Tensor) -> Tensor:
        """Add two tensors of one shape."""
        return branch + fake_quantize(identity, self.input_scale, self.codes)


QUANTIZED = (QuantConv2d, QuantLinear, QuantResidualAdd)


def _take_over(quantized: nn.Conv2d | nn.Linear, source: nn.Conv2d | nn.Linear, scales: Quantization) -> None:
    weight = quantize_weight(source.weight.detach(), torch.from_numpy(scales.weight), scales.codes)
    quantized.weight = nn.Parameter(weight, requires_grad=False)
    quantized.bias = source.bias
    quantized.train(source.training)


def _share_weight(
    quantized: nn.Conv2d | nn.Linear,
    source: nn.Conv2d | nn.Linear,
    scales: Quantization,
    rounded: dict[tuple[int, bytes, str], nn.Parameter],
) -> None:
    """Layers of one weight have one rounded weight."""
    key = (id(source.weight), scales.weight.tobytes(), scales.codes)
    own: nn.Parameter = quantized.weight  # type: ignore[assignment] # torch's annotation
    quantized.weight = rounded.setdefault(key, own)


def apply_scales(model: nn.Module, scales: dict[str, Quantization]) -> nn.Module:
    """Quantise layers.

    Args:
        model: The deploy form; left as it is. Weights that are not quantised are shared with the result.
        scales: Scales by the name of the layer, from `plan_scales`.

    Returns:
        The quantised module, in evaluation mode.
    """
    quantized = share_weights(model)
    rounded: dict[tuple[int, bytes, str], nn.Parameter] = {}
    for path, layer_scales in scales.items():
        layer = quantized.get_submodule(path)
        replacement: nn.Module
        if isinstance(layer, nn.Conv2d):
            replacement = QuantConv2d(layer, layer_scales)
            _share_weight(replacement, layer, layer_scales, rounded)
        elif isinstance(layer, nn.Linear):
            replacement = QuantLinear(layer, layer_scales)
            _share_weight(replacement, layer, layer_scales, rounded)
        elif isinstance(layer, ResidualAdd):
            replacement = QuantResidualAdd(layer_scales)
        else:
            msg = f"{path} is a {type(layer).__name__}; only Conv2d and Linear can be quantised."
            raise DataError(msg)
        quantized.set_submodule(path, replacement)
    quantized.eval()
    return quantized


def _holds(kind: torch.dtype, parameter: Tensor) -> bool:
    """Whether a type holds a parameter, rounded: what becomes zero or infinite in it stays FP32 in a graph."""
    rounded = parameter.to(kind)
    return bool((rounded.isfinite() & ((rounded == 0) == (parameter == 0))).all())


def with_stored_weights(quantized: nn.Module, plan: PrecisionPlan) -> nn.Module:
    """A network whose parameters are what its graph stores, and whose activations nothing rounds.

    Args:
        quantized: The quantised module, or the deploy form where nothing is; left as it is. Parameters that are stored
            as they are there are shared with the result.
        plan: The types of what is not quantised.

    Returns:
        The network in evaluation mode. Weights of quantised layers are what their codes stand for, other parameters and
        buffers in FP16 or BF16 are rounded to that.
    """
    stored, types = share_weights(quantized), plan.types()
    rounded: dict[tuple[int, torch.dtype], nn.Parameter] = {}
    for path, module in stored.named_modules():
        has_codes = isinstance(module, QUANTIZED)
        if has_codes:
            module.codes = NOT_ROUNDED
        kind = TYPES[types.get(path, plan.remainder)]
        for name, parameter in module.named_parameters(recurse=False):
            coded = has_codes and name == "weight"
            if parameter.dtype == torch.float32 != kind and not coded and _holds(kind, parameter):
                key = (id(parameter), kind)
                if key not in rounded:
                    rounded[key] = nn.Parameter(parameter.to(kind).float(), requires_grad=False)
                setattr(module, name, rounded[key])
        for name, buffer in () if has_codes else list(module.named_buffers(recurse=False)):
            if buffer.dtype == torch.float32 != kind and _holds(kind, buffer):
                setattr(module, name, buffer.to(kind).float())
    return stored.eval()
