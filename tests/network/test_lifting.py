"""Products become layers, whatever way a network spells them: it computes the same, and every product has a name."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pcn_deploy.calibration.collect import calibrate
from pcn_deploy.calibration.plan.facts import inspect_layers, note_hidden_products, survey
from pcn_deploy.calibration.plan.rules import make_plan
from pcn_deploy.calibration.quantized import apply_scales, plan_scales
from pcn_deploy.data.images import ImageSource
from pcn_deploy.data.transform import Transform
from pcn_deploy.graph.export import serialise, to_onnx
from pcn_deploy.graph.torchscript import to_torchscript
from pcn_deploy.network.dataflow import DataFlow, is_plain_layer
from pcn_deploy.network.deploy import to_deploy
from pcn_deploy.network.lifting import become, hidden_products
from pcn_deploy.specs import BatchRange
from pcn_deploy.tasks.distance import least_sqnr_db

IMAGES = torch.rand(2, 16, 9, 7, generator=torch.Generator().manual_seed(0))


def weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape) / shape[-1] ** 0.5)


class Logits(nn.Module):
    """Mean over the map, whatever is done to it before."""

    def forward(self, x: Tensor) -> Tensor:
        return self.features(x).flatten(2).mean(2)

    def features(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class SameConv(nn.Conv2d):
    """Padded as in TensorFlow: more at the end."""

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.size()[-2:]
        assert height > 1 and width > 1
        return F.conv2d(F.pad(x, [0, 1, 0, 1], value=0), self.weight, self.bias, self.stride)


class StandardisedConv(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        rows = self.weight.reshape(1, self.out_channels, -1)
        rows = F.batch_norm(rows, None, None, training=True, momentum=0.0, eps=1e-6)
        return F.conv2d(x, rows.reshape_as(self.weight), self.bias, self.stride, self.padding, self.dilation)


class ScaledConv(nn.Conv2d):
    def _conv_forward(self, x: Tensor, kernel: Tensor, bias: Tensor | None) -> Tensor:
        y: Tensor = super()._conv_forward(x, kernel * 2, bias)
        return y


class LowRank(nn.Linear):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.a, self.b = weight(2, inputs), weight(outputs, 2)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight + self.b @ self.a, self.bias)


class Subclasses(Logits):
    def __init__(self) -> None:
        super().__init__()
        self.stem = SameConv(16, 16, 3, stride=2)
        self.body = StandardisedConv(16, 24, 3, padding=1)
        self.scaled = ScaledConv(24, 16, 1)
        self.low = LowRank(16, 20)

    def features(self, x: Tensor) -> Tensor:
        x = self.scaled(self.body(self.stem(x)).relu())
        y: Tensor = self.low(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return y


class Functions(Logits):
    """Every function that multiplies by a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel, self.point_weight = weight(16, 16, 3, 3), weight(16, 16, 1, 1)
        self.fc_weight, self.fc_bias = weight(24, 16), weight(24)
        self.right, self.left, self.mm = weight(24, 16), weight(16, 16), weight(16, 20)
        self.sums, self.heads, self.back = weight(20, 16), weight(4, 16, 8), weight(4, 8, 16)
        self.unused = nn.Linear(16, 16)

    def features(self, x: Tensor) -> Tensor:
        x = F.conv2d(x, self.kernel, None, (1, 1), "same")
        x = torch.conv2d(x, self.point_weight * 0.5, bias=self.fc_bias[:16], stride=2)
        y = x.flatten(2).transpose(1, 2)
        y = F.linear(y, self.fc_weight, bias=self.fc_bias) @ self.right
        y = torch.matmul(self.left, y.transpose(1, 2)).transpose(-2, -1)
        rows = torch.addmm(self.fc_bias[:20], y.reshape(-1, 16), self.mm).mm(self.sums)
        y = torch.einsum("bnc,hcd->bhnd", rows.view(y.shape), self.heads).relu()
        y = torch.einsum("bhnd,hdc->bnc", y, self.back)
        return F.linear(y, self.unused.weight, self.unused.bias).transpose(1, 2)


class CalledAgain(Logits):
    """One block in a loop, one convolution in two places, one weight under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Conv2d(16, 16, 1), nn.ReLU(), StandardisedConv(16, 16, 1))
        self.first, self.second = nn.Conv2d(16, 16, 1), nn.Conv2d(16, 16, 1)
        self.second.weight = self.first.weight
        self.stages = nn.Sequential(self.first, nn.ReLU(), self.first)

    def features(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = self.block(x) + x
        y: Tensor = self.second(self.stages(x)) + self.first(x)
        return y


class Part(nn.Module):
    """Calls what may be called elsewhere too."""

    def __init__(self, shared: nn.Module) -> None:
        super().__init__()
        self.shared = shared

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.shared(x).relu()
        return y


class HeldTwice(Logits):
    """One convolution in two modules; the one that holds it first is not the first by name."""

    def __init__(self) -> None:
        super().__init__()
        shared = nn.Conv2d(16, 16, 3, padding=1)
        self.later, self.earlier = Part(shared), Part(shared)

    def features(self, x: Tensor) -> Tensor:
        y: Tensor = self.later(self.earlier(x))
        return y


class Attention(Logits):
    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.need_weights = settings.pop("need_weights", False)
        self.mask = settings.pop("mask", "")
        self.attention = nn.MultiheadAttention(16, 4, **settings)
        self.keys = nn.Linear(16, settings.get("kdim") or 16)
        self.values = nn.Linear(16, settings.get("vdim") or 16)
        for bias in (self.attention.in_proj_bias, self.attention.out_proj.bias):
            if bias is not None:
                nn.init.normal_(bias)

    def features(self, x: Tensor) -> Tensor:
        y = x.flatten(2).transpose(1, 2) if self.attention.batch_first else x.flatten(2).permute(2, 0, 1)
        count = x.shape[2] * x.shape[3]
        pairs: Tensor | None = None
        keys: Tensor | None = None
        if self.mask in ("pairs", "both"):
            pairs = torch.ones(count, count, dtype=torch.bool).triu(1)
        if self.mask == "term":
            pairs = torch.ones(count, count).tril() * 3
        if self.mask in ("keys", "both"):
            keys = (torch.zeros_like(x[:, 0]).flatten(1) + torch.arange(count)) % 5 == 4
        y, weights = self.attention(y, self.keys(y), self.values(y), keys, self.need_weights, pairs)
        if not self.attention.batch_first:
            y = y.transpose(0, 1)
        found: Tensor = (
            y.transpose(1, 2) if weights is None else y.transpose(1, 2) * weights.amax((1, 2))[:, None, None]
        )
        return found


class Encoder(Logits):
    def __init__(self, **settings: Any) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, **settings)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        for name, parameter in self.encoder.named_parameters():
            if "bias" in name:
                nn.init.normal_(parameter)

    def features(self, x: Tensor) -> Tensor:
        y: Tensor = self.encoder(x.flatten(2).transpose(1, 2))
        return y.transpose(1, 2)


class AttentionPool(Logits):
    """As in CLIP: the function, with weights of linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.c_proj = (nn.Linear(16, 16) for _ in range(4))

    def features(self, x: Tensor) -> Tensor:
        x = x.flatten(2).permute(2, 0, 1)
        x, _ = F.multi_head_attention_forward(
            query=x[:1],
            key=x,
            value=x,
            embed_dim_to_check=16,
            num_heads=4,
            q_proj_weight=self.q_proj.weight,
            k_proj_weight=self.k_proj.weight,
            v_proj_weight=self.v_proj.weight,
            in_proj_weight=None,
            in_proj_bias=torch.cat([self.q_proj.bias, self.k_proj.bias, self.v_proj.bias]),
            bias_k=None,
            bias_v=None,
            add_zero_attn=False,
            dropout_p=0.0,
            out_proj_weight=self.c_proj.weight,
            out_proj_bias=self.c_proj.bias,
            use_separate_proj_weight=True,
            training=self.training,
            need_weights=False,
        )
        return x.permute(1, 2, 0)


class RelativeAttention(nn.Module):
    """As in BEiT and EVA: a bias put together from parts, a table read by an index, arguments that are not tensors."""

    k_bias: Tensor
    index: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(16, 48, bias=False), nn.Linear(16, 16)
        self.q_bias, self.v_bias, self.table = weight(16), weight(16), weight(9, 4)
        self.register_buffer("k_bias", torch.zeros(16), persistent=False)
        self.register_buffer("index", torch.arange(64).reshape(8, 8) % 9)

    def forward(self, x: Tensor, term: Tensor, mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        n, rows, _ = x.shape
        qkv = F.linear(x, weight=self.qkv.weight, bias=torch.cat((self.q_bias, self.k_bias, self.v_bias)))
        q, k, v = qkv.reshape(n, rows, 3, 4, 4).permute(2, 0, 3, 1, 4).unbind(0)
        relative = self.table[self.index.view(-1)].view(8, 8, 4).permute(2, 0, 1)
        weights = q @ k.transpose(-2, -1) + relative + term
        if mask is not None or is_causal:
            weights = weights.tril()
        y: Tensor = self.proj((weights.softmax(-1) @ v).transpose(1, 2).reshape(n, rows, 16))
        return y


class Relative(Logits):
    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.attention, self.term, self.settings = RelativeAttention(), weight(8, 8), settings

    def features(self, x: Tensor) -> Tensor:
        x = x.flatten(2)[..., :8].transpose(1, 2)
        y: Tensor = self.attention(x, self.term * x.mean(), **self.settings).transpose(1, 2)
        return y


PROJECTIONS = {f"attention.{name}" for name in ("q_proj", "k_proj", "v_proj", "out_proj")}
ENCODER = {
    f"encoder.layers.{i}.{name}"
    for i in (0, 1)
    for name in (*(f"self_attn.{name.split('.')[1]}" for name in PROJECTIONS), "linear1", "linear2")
}
AROUND = {"keys", "values"}
NETWORKS: dict[str, tuple[Callable[[], nn.Module], set[str]]] = {
    "subclasses": (Subclasses, {"stem.conv", "body", "scaled", "low"}),
    "functions": (
        Functions,
        {"conv", "point", "fc", "unused"}
        | {f"{name}_linear" for name in ("right", "left", "mm", "sums", "heads", "back")},
    ),
    "called again": (
        CalledAgain,
        {f"{block}.{i}" for block in ("block", "block_2", "block_3") for i in (0, 2)}
        | {"first", "second", "stages.0", "stages.2"},
    ),
    "held twice": (HeldTwice, {"later.shared", "earlier.shared_2"}),
    "attention": (Attention, PROJECTIONS | AROUND),
    "attention, batch first": (lambda: Attention(batch_first=True, need_weights=True), PROJECTIONS | AROUND),
    "attention, other sizes": (lambda: Attention(kdim=24, vdim=20, need_weights=True), PROJECTIONS | AROUND),
    "attention, more positions": (lambda: Attention(add_bias_kv=True, add_zero_attn=True), PROJECTIONS | AROUND),
    "attention, masked": (lambda: Attention(mask="both", need_weights=True), PROJECTIONS | AROUND),
    "attention, masked keys": (lambda: Attention(mask="keys", add_bias_kv=True, bias=False), PROJECTIONS | AROUND),
    "attention, masked pairs": (lambda: Attention(mask="pairs", add_zero_attn=True), PROJECTIONS | AROUND),
    "attention, a term": (lambda: Attention(mask="term", batch_first=True), PROJECTIONS | AROUND),
    "encoder": (Encoder, ENCODER),
    "encoder, norm first": (lambda: Encoder(norm_first=True), ENCODER),
    "attention pool": (AttentionPool, PROJECTIONS),
    "relative positions": (Relative, {"attention.qkv", "attention.proj"}),
    "relative positions, settings": (
        lambda: Relative(mask=None, is_causal=False),
        {"attention.qkv", "attention.proj"},
    ),
}


def products_of(model: nn.Module) -> tuple[list[str], list[str]]:
    """The layers that multiplied, and the modules of products that no layer owns."""
    flow = DataFlow(model, IMAGES[:1].clone())
    owned = [each.path for each in flow.products if is_plain_layer(model.get_submodule(each.path))]
    return owned, [product.path for product in hidden_products(model, flow)]


@pytest.mark.parametrize("name", NETWORKS)
def test_every_product_is_a_layer_that_is_called_once(name: str) -> None:
    make, expected = NETWORKS[name]
    torch.manual_seed(1)
    plain = make().eval().requires_grad_(False)
    deployed, applied = to_deploy(plain, IMAGES)
    assert applied["lift_products"] > 0
    owned, hidden = products_of(deployed)
    assert hidden == []
    assert len(owned) == len(set(owned)), "each layer is called once"
    assert set(owned) == expected
    with torch.inference_mode():
        torch.testing.assert_close(deployed(IMAGES), plain(IMAGES), atol=1e-5, rtol=1e-4)
        other = torch.cat([IMAGES.flip(0), IMAGES])
        torch.testing.assert_close(deployed(other), plain(other), atol=1e-5, rtol=1e-4)
    to_torchscript(deployed, IMAGES[:1])


class Experts(Logits):
    """A weight per position: no layer does that."""

    def __init__(self) -> None:
        super().__init__()
        self.point, self.experts = nn.Conv2d(16, 16, 1), weight(4, 16, 16)

    def features(self, x: Tensor) -> Tensor:
        y: Tensor = self.point(x).flatten(2)[:, :, :4].permute(2, 0, 1)
        return torch.bmm(y, self.experts).permute(1, 2, 0)


def test_what_cannot_be_a_layer_is_named_with_its_line() -> None:
    deployed, _ = to_deploy(Experts().eval().requires_grad_(False), IMAGES)
    assert products_of(deployed) == (["point"], [""])
    (note,) = note_hidden_products(survey(deployed, IMAGES[:1].clone(), places=True)[1], "fp16")
    assert note.startswith(f"1 product is no layer and stays in fp16: the network itself (class Experts), {__file__}:")
    assert "return torch.bmm(y, self.experts)" in note


def test_a_shared_weight_is_stored_once_and_every_use_has_its_own_scale() -> None:
    torch.manual_seed(1)
    plain = CalledAgain().eval().requires_grad_(False)
    net, _ = to_deploy(plain, IMAGES)
    plan = make_plan(inspect_layers(net, IMAGES[:1]), "int8", "fp32")
    source = ImageSource([IMAGES.numpy()], Transform(resolution=(9, 7), mean=(0.0,) * 16, std=(1.0,) * 16))
    ranges = calibrate(net, list(plan.quantized_entries), source, "max").ranges
    assert len({ranges["block.0"], ranges["block_2.0"], ranges["block_3.0"]}) == 3
    scales = plan_scales(net, plan.with_ranges(ranges))
    model = to_onnx(net, (16, 9, 7), BatchRange(min=1, opt=2, max=2), scales)
    stored = [value for value in model.graph.initializers.values() if value.dtype == ir.DataType.INT8 and value.shape]
    codes = [value for value in stored if len(value.shape or ()) == 4]
    assert len(codes) == 3, "the two of the block, and that of the four other convolutions"
    found = ort.InferenceSession(serialise(model)).run(None, {"images": IMAGES.numpy()})[0]
    with torch.inference_mode():
        simulated = apply_scales(net, scales)(IMAGES)
    assert least_sqnr_db([simulated.numpy()], [found]) > 60
    assert least_sqnr_db([plain(IMAGES).numpy()], [found]) > 25


def test_a_module_that_became_another_one_lives_on_without_it() -> None:
    """CPython 3.13 collects what the shared `__dict__` of an object in a cycle of references holds."""
    module, other = nn.Identity(), nn.Sequential(nn.Linear(3, 2), nn.ReLU())
    cycle: list[Any] = [other]
    cycle.append(cycle)
    expected = other(torch.ones(1, 3))
    become(module, other)
    assert vars(module) is not vars(other)
    del other, cycle
    gc.collect()
    torch.testing.assert_close(module(torch.ones(1, 3)), expected)
