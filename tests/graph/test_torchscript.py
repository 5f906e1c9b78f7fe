"""Whatever can be exported has a TorchScript form, however its code is written, and it computes the same."""

# mypy: disable-error-code="no-untyped-call, no-untyped-def, no-any-return"

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pcn_deploy.calibration.quantized import Quantization, apply_scales
from pcn_deploy.errors import ModelError
from pcn_deploy.graph.exported import export_program
from pcn_deploy.graph.torchscript import to_torchscript
from pcn_deploy.network.calls import Calls
from pcn_deploy.network.symbolic import trace
from pcn_deploy.specs import BatchRange

IMAGES = torch.rand(2, 3, 6, 8) * torch.tensor([1.0, -3.0]).reshape(2, 1, 1, 1)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.ReLU()])
        self.head = nn.Linear(4, 5)

    def features(self, x: Tensor) -> Tensor:
        return self.conv(x).abs().mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


# Code that TorchScript does not compile, or not save.


class Starred(Net):
    def forward(self, *x: Tensor, **options: Any) -> Tensor:
        return super().forward(x[0])


def scaled(x, **factors: float):
    return x * factors["by"]


class Helped(Net):
    def features(self, x: Tensor) -> Tensor:
        return scaled(super().features(x), by=2)


class Indexed(Net):
    def features(self, x: Tensor) -> Tensor:
        y = self.conv(x).mean((2, 3))
        for index in range(2):
            y = self.layers[index](y)
        return y


class Config:
    factor = 3


class Configured(Net):
    def __init__(self) -> None:
        super().__init__()
        self.config = Config()
        self.act = lambda x: x * self.config.factor

    def features(self, x: Tensor) -> Tensor:
        if x.shape[1] != 3:
            raise ValueError(f"{x.shape[1]:>3}")
        try:
            return self.act(self.conv(x).mean((2, 3)))
        except ValueError:
            return x


class Swish(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, x: Tensor) -> Tensor:
        return x * torch.sigmoid(x)

    @staticmethod
    def backward(context: Any, *gradients: Any) -> Any:
        raise NotImplementedError


class CustomGradient(Net):
    def features(self, x: Tensor) -> Tensor:
        return Swish.apply(self.conv(x)).mean((2, 3))


class Ignored(Net):
    """Scripts, and cannot be saved: Python code in a branch that is not taken."""

    @torch.jit.ignore  # type: ignore[untyped-decorator]
    def other(self, x: Tensor) -> Tensor:
        return x

    def forward(self, x: Tensor) -> Tensor:
        y = self.other(x) if x.shape[1] > 3 else self.features(x)
        return self.head(y)


# Numbers in another type than the signature has.


class NormOfOneAxis(Net):
    def features(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return (y / y.norm(dim=1, keepdim=True)).mean((2, 3))


class PadsByZero(Net):
    """The shortcut of the best-known ResNets for CIFAR."""

    def __init__(self) -> None:
        super().__init__()
        self.shortcut = lambda x: F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2), "constant", 0)
        self.head = nn.Linear(8, 5)

    def features(self, x: Tensor) -> Tensor:
        return self.shortcut(self.conv(x)).abs().mean((2, 3))


class WholeNumbers(Net):
    """Each of these takes floats."""

    def features(self, x: Tensor) -> Tensor:
        y = F.interpolate(self.conv(x), scale_factor=2)
        y = F.leaky_relu(F.celu(F.elu(y, 2), 1), 0)
        y = F.threshold(F.hardtanh(F.softplus(y, 2, 20), 0, 6), 0, 0).clamp(min=0)
        return torch.mean(F.normalize(y, 2, 1), (2, 3))


# Shapes.


class SizesOfTheBatch(Net):
    """What depends on the number of images stays free; what is on a device stays on that of the images."""

    def features(self, x: Tensor) -> Tensor:
        n, c = x.shape[:2]
        y = self.conv(x).reshape(n * 4, -1).mean(1).view(n, 4)
        y = y + torch.zeros(n, 4, device=x.device) + torch.arange(4) * c
        masked = y.masked_fill(y < 0, float("-inf")).softmax(1)
        parts = torch.cat([masked, y[:, :1]], 1).split([4, 1], 1)
        return parts[0] + x.new_full((n, 1), 2) * self.config_scale() * parts[1]

    def config_scale(self, *_: Any) -> float:
        return 0.5


KINDS = [
    Starred,
    Helped,
    Indexed,
    Configured,
    CustomGradient,
    Ignored,
    NormOfOneAxis,
    PadsByZero,
    WholeNumbers,
    SizesOfTheBatch,
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fixed", [None, BatchRange(min=3, opt=3, max=3)])
def test_what_exports_has_a_torchscript_form(kind: Callable[[], nn.Module], fixed: BatchRange | None) -> None:
    net = kind().eval()
    module = torch.jit.load(io.BytesIO(to_torchscript(net, IMAGES, fixed)))
    for count in (3,) if fixed else (1, 2, 5):
        images = torch.randn(count, *IMAGES.shape[1:])
        torch.testing.assert_close(module(images), net(images), atol=0, rtol=0)


class Wide(nn.Module):
    """With layers that become 8 bit, and an attribute that TorchScript cannot read."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.Flatten(2))
        self.head = nn.Linear(16, 16)
        self.act = lambda x: x * 2

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.act(self.layers(x)).transpose(1, 2)).mean(1)


@pytest.mark.parametrize("codes", ["int8", "fp8"])
def test_a_quantised_network_that_does_not_script_is_exported(codes: str) -> None:
    net = Wide().eval()
    per_channel = np.full(16 if codes == "int8" else 1, 2e-3, np.float32)
    scales = {path: Quantization(input=0.02, weight=per_channel, codes=codes) for path in ("layers.2", "head")}
    quantised = apply_scales(net, scales)
    module = torch.jit.load(io.BytesIO(to_torchscript(quantised, IMAGES)))
    for count in (1, 5):
        images = torch.randn(count, *IMAGES.shape[1:])
        torch.testing.assert_close(module(images), quantised(images), atol=0, rtol=0)
        assert not torch.allclose(module(images), net(images), atol=1e-5), "it is the quantised one"


class Caches(Net):
    """Keeps what it computed for a device and a size, as timm's LeViT does; scripting cannot read the attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.rand(4, 9))
        self.cache: dict[Any, Any] = {}
        self.sizes: list[Any] = []
        self.last: Any = None
        self.kept = torch.zeros(3)

    def features(self, x: Tensor) -> Tensor:
        key = f"{x.device}, {x.shape[1]}"
        if key not in self.cache:
            self.cache[key] = self.table[:, :4]
            self.sizes.append(x.shape[0])
            self.last = self.kept = self.made = x
        return super().features(x) @ self.cache[key]


class CachesInAPart(nn.Module):
    """The same one module deeper."""

    def __init__(self) -> None:
        super().__init__()
        self.part = Caches()

    def forward(self, x: Tensor) -> Tensor:
        return self.part(x)


def called(net: nn.Module) -> object:
    return Calls(net, (3, 6, 8), [""]).trace("", lambda *_: True)


LOOKS: dict[str, Callable[[nn.Module], object]] = {
    "script": lambda net: to_torchscript(net, IMAGES),
    "export": lambda net: export_program(net, IMAGES, BatchRange()),
    "trace": lambda net: trace(net, (3, 6, 8)),
    "call": called,
}


@pytest.mark.parametrize("kind", [Caches, CachesInAPart])
@pytest.mark.parametrize("look", LOOKS)
def test_a_cache_of_the_network_is_left_as_it_was(look: str, kind: Callable[[], nn.Module]) -> None:
    whole = kind().eval()
    net: Any = getattr(whole, "part", whole)
    before = set(vars(net))
    LOOKS[look](whole)
    if look == "script":  # runs the network itself too, which fills its cache with what is right
        kinds = {type(value) for value in (*net.cache.values(), *net.sizes, net.last)}
        assert kinds <= {Tensor, int, type(None)}
    else:
        assert set(vars(net)) == before
        assert (net.cache, net.sizes, net.last) == ({}, [], None)
        assert torch.equal(net.kept, torch.zeros(3))
    with torch.no_grad():
        torch.testing.assert_close(whole(IMAGES), net.head(Net.features(net, IMAGES) @ net.table[:, :4]))


class AsksForTheType(Net):
    def forward(self, x: Tensor, **options: Any) -> Tensor:
        y = self.features(x)
        return self.head(y * 1.15 if type(y) is Tensor else y)


class AsksHowItRuns(Net):
    def forward(self, x: Tensor) -> Tensor:
        y = self.features(x)
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            y = y * 1.15
        return self.head(y)


class AsksForExport(Net):
    def forward(self, x: Tensor, **options: Any) -> Tensor:
        y = self.features(x)
        return self.head(y if torch.compiler.is_exporting() else y * 1.15)


class DependsOnBlack(Net):
    """What a comparison of one image would not show: it is right where the image is not black."""

    def forward(self, x: Tensor, **options: Any) -> Tensor:
        y = self.head(self.features(x))
        return y if torch.compiler.is_exporting() else y + torch.where(x.abs().sum((1, 2, 3)) > 0, 0.0, 1.0)[:, None]


def test_a_script_that_decides_otherwise_is_not_taken() -> None:
    net = AsksHowItRuns().eval()
    module = torch.jit.load(io.BytesIO(to_torchscript(net, IMAGES)))
    torch.testing.assert_close(module(IMAGES), net(IMAGES))


@pytest.mark.parametrize("kind", [AsksForTheType, AsksForExport, DependsOnBlack])
def test_an_export_that_decides_otherwise_is_refused(kind: Callable[[], nn.Module]) -> None:
    with pytest.raises(ModelError, match=r"computes something else than the network itself \(-?\d+\.\d dB\)"):
        to_torchscript(kind().eval(), IMAGES[:1])


def test_what_neither_scripts_nor_exports_is_refused_with_the_place() -> None:
    class ByValue(Net):
        def forward(self, x: Tensor, **options: Any) -> Tensor:
            y = self.features(x)
            if x.sum() > 0:
                y = -y
            return self.head(y)

    with pytest.raises(ModelError) as caught:
        to_torchscript(ByValue().eval(), IMAGES)
    message = str(caught.value)
    assert message.startswith(
        f"The network cannot be exported to ONNX: the network itself (class ByValue), {__file__}:"
    )
    assert "    if x.sum() > 0:\n" in message and "torch.where" in message
