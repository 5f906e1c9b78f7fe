"""The attention map as an output: in every form of the network it is what the definition says."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn

from pcn_deploy.calibration.plan.facts import inspect_layers
from pcn_deploy.calibration.plan.rules import make_plan
from pcn_deploy.calibration.quantized import Quantization
from pcn_deploy.errors import ModelError
from pcn_deploy.graph import export
from pcn_deploy.graph.repeat import Run, find_runs
from pcn_deploy.graph.torchscript import to_torchscript
from pcn_deploy.models.aggregation import AttentionPool2d
from pcn_deploy.models.patchconvnet import PatchConvNet
from pcn_deploy.network.attention_map import output_attention_map, with_attention_map
from pcn_deploy.network.deploy import to_deploy
from pcn_deploy.specs import ATTENTION_MAP, LOGITS, BatchRange, OutputSpec

Arrays = tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]

SHAPE = (3, 24, 40)
"""Not square, and 6x10 patches of 4 pixels, so that height and width cannot be taken for each other."""

OUTPUTS = (OutputSpec(LOGITS, LOGITS), OutputSpec(ATTENTION_MAP, ATTENTION_MAP))


class Convolutional(nn.Module):
    """A network of the user, who wrote average pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 16, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1),
            nn.ReLU(),
        )
        self.avgpool: nn.Module = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(32, 7)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(torch.flatten(self.avgpool(self.features(x)), 1))
        return y


@pytest.fixture(scope="module")
def networks(make_net: Callable[..., PatchConvNet], fill: ModuleType) -> dict[str, nn.Module]:
    """One class token, one per class, and the user's network with the pooling replaced."""
    own = Convolutional()
    own.avgpool = AttentionPool2d(32)
    fill.fill_(own, 5)
    listed = nn.Sequential(nn.Conv2d(3, 32, 4, 4), nn.Tanh(), AttentionPool2d(32), nn.Flatten())
    fill.fill_(listed, 6)
    return {
        "one token": make_net(patch=4),
        "token per class": make_net(patch=4, multi_class_token=True),
        "own": own.eval(),
        "sequential": listed.eval(),
    }


NETWORKS = ("one token", "token per class", "own", "sequential")


def images(count: int = 3) -> Tensor:
    return torch.from_numpy(np.random.default_rng(2).standard_normal((count, *SHAPE)).astype(np.float32))


def block_path(name: str) -> str:
    return {"own": "avgpool.block", "sequential": "2.block"}.get(name, "blocks_token_only.0")


def by_definition(network: nn.Module, path: str) -> npt.NDArray[np.float64]:
    """softmax(q.k / sqrt(C)) of arXiv 2112.13692, in float64 and with numpy, from what goes into the block."""
    entered: list[Any] = []
    handle = network.get_submodule(path).register_forward_pre_hook(lambda _module, inputs: entered.append(inputs))
    with torch.no_grad():
        network(images())
    handle.remove()
    tokens, features = (tensor.detach().double().numpy() for tensor in entered[0])
    weights = {name: tensor.double().numpy() for name, tensor in network.get_submodule(path).state_dict().items()}

    def normalised(rows: Any) -> Any:
        centred = rows - rows.mean(-1, keepdims=True)
        unit = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)
        return unit * weights["norm1.weight"] + weights["norm1.bias"]

    batch, width, height, columns = features.shape
    maps = np.zeros((batch, tokens.shape[1], height, columns))
    for index in range(batch):
        own = normalised(tokens[index])
        patches = normalised(np.array([features[index, :, y, x] for y in range(height) for x in range(columns)]))
        attended = np.concatenate([own, patches]) if len(own) == 1 else patches
        query = own @ weights["attn.q.weight"].T + weights["attn.q.bias"]
        keys = attended @ weights["attn.k.weight"].T + weights["attn.k.bias"]
        powers = np.exp(query @ keys.T / width**0.5)
        softmax = powers / powers.sum(1, keepdims=True)
        maps[index] = softmax[:, len(attended) - len(patches) :].reshape(-1, height, columns)
    return maps


def deployed(network: nn.Module) -> nn.Module:
    return output_attention_map(to_deploy(network, torch.rand(1, *SHAPE))[0], SHAPE)


def torch_outputs(function: Callable[[Tensor], Any]) -> Arrays:
    with torch.no_grad():
        logits, attention = function(images())
    return logits.numpy(), attention.numpy()


def scripted_outputs(network: nn.Module) -> Arrays:
    return torch_outputs(torch.jit.load(io.BytesIO(to_torchscript(deployed(network), images()))))  # type: ignore[no-untyped-call]


def onnx_outputs(network: nn.Module) -> Arrays:
    graph = export.to_onnx(deployed(network), SHAPE, BatchRange(), {}, outputs=OUTPUTS)
    spec = export.engine_spec(graph, BatchRange())
    assert [(each.name, each.shape[0], each.shape[2:]) for each in spec.outputs] == [
        ("logits", "batch", ()),
        ("attention_map", "batch", (6, 10)),
    ]
    session = ort.InferenceSession(export.serialise(graph), providers=["CPUExecutionProvider"])
    logits, attention = session.run(None, {export.INPUT_NAME: images().numpy()})
    return logits, attention


FORMS: dict[str, Callable[[nn.Module], Arrays]] = {
    "eager": lambda network: torch_outputs(with_attention_map(network)),
    "deploy form": lambda network: torch_outputs(deployed(network)),
    "TorchScript": scripted_outputs,
    "ONNX Runtime": onnx_outputs,
}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("form", FORMS)
def test_the_map_is_the_softmax_of_the_definition(networks: dict[str, nn.Module], name: str, form: str) -> None:
    network = networks[name]
    logits, attention = FORMS[form](network)
    expected = by_definition(network, block_path(name))
    assert attention.shape == (3, 10 if name == "token per class" else 1, 6, 10)
    assert attention.dtype == np.float32
    assert np.ptp(expected, axis=(2, 3)).min() > 0.1 * expected.mean(), "the weights must differ, or any map would pass"
    np.testing.assert_allclose(attention, expected, atol=1e-5)
    with torch.no_grad():
        np.testing.assert_allclose(logits, network(images()).numpy(), atol=1e-4, rtol=1e-4)
    sums = attention.sum((2, 3))
    if name == "token per class":
        np.testing.assert_allclose(sums, 1, atol=1e-5)
    else:
        assert (sums < 1 - 1e-4).all(), "the weight of the token itself is no place in the image"


@pytest.mark.parametrize("name", NETWORKS)
def test_modules_and_plan_are_those_without_the_map(networks: dict[str, nn.Module], name: str) -> None:
    plain, _ = to_deploy(networks[name], torch.rand(1, *SHAPE))
    both = output_attention_map(plain, SHAPE)
    leaves = [
        {path: type(module) for path, module in form.named_modules() if not list(module.children())}
        for form in (plain, both)
    ]
    assert leaves[0] == leaves[1]
    one, other = (
        make_plan(inspect_layers(form, torch.zeros(1, *SHAPE)), "int8", "fp16").to_json() for form in (plain, both)
    )
    assert one["entries"] == other["entries"]
    assert {entry["precision"] for entry in one["entries"]} >= {"int8"}
    with torch.no_grad():
        assert isinstance(plain(images()), Tensor), "the network given is left as it is"


def test_the_blocks_are_still_unrolled(networks: dict[str, nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    both = deployed(networks["one token"])
    assert find_runs(both, images(1)) == [Run("blocks", ("0", "1", "2"))]
    exported: list[int] = []
    real = export._export

    def counted(model: nn.Module, *rest: Any) -> Any:
        exported.append(sum(1 for name, _ in model.named_modules() if name.endswith(".qkv_pos")))
        return real(model, *rest)

    monkeypatch.setattr(export, "_export", counted)
    quantized = {
        name: Quantization(0.1, np.full(module.out_channels, 0.1, np.float32))
        for name, module in both.named_modules()
        if isinstance(module, nn.Conv2d)
    }
    graph = export.to_onnx(both, SHAPE, BatchRange(), quantized, outputs=OUTPUTS).graph
    assert exported == [1], "one block of three, and no second attempt with all of them"
    kinds = [node.op_type for node in graph]
    assert kinds.count("Conv") == 2 + 3 * 5
    assert kinds.count("QuantizeLinear") >= 2 + 3 * 5 - 4


def test_pooling_is_replaced_in_one_line() -> None:
    network = Convolutional().eval()
    network.avgpool = AttentionPool2d(32)
    network.eval()
    with torch.no_grad():
        assert network.avgpool(torch.rand(2, 32, 5, 3)).shape == (2, 32, 1, 1)
        logits, attention = with_attention_map(network)(images())
    assert attention.shape == (3, 1, 6, 10)
    assert logits.shape == (3, 7)
    trained = network.train()(images()).square().sum()
    trained.backward()
    for name, parameter in network.avgpool.named_parameters():
        assert parameter.grad is not None, name
        if not name.endswith("attn.k.bias"):  # it cancels in the softmax
            assert parameter.grad.abs().max() > 0, name


def test_the_hook_is_gone_afterwards(networks: dict[str, nn.Module]) -> None:
    network = networks["own"]
    with torch.no_grad():
        with_attention_map(network)(images(1))
        with pytest.raises(RuntimeError, match=r"[Ee]xpected"):
            with_attention_map(network)(torch.zeros(3))
    assert not any(module._forward_hooks for module in network.modules())


@pytest.mark.parametrize("make", [lambda network: output_attention_map(network, SHAPE), with_attention_map])
def test_one_aggregation_is_needed(make: Callable[[nn.Module], Any]) -> None:
    with pytest.raises(ModelError, match=r"holds no attention-based aggregation.*replace its average pooling"):
        make(Convolutional())
    two = nn.Sequential(AttentionPool2d(3), AttentionPool2d(3))
    with pytest.raises(ModelError, match=r"holds 2 .*\(0\.block, 1\.block\); .*needs exactly one"):
        make(two)


class Pooled(Convolutional):
    """The same with attention-based aggregation."""

    def __init__(self) -> None:
        super().__init__()
        self.avgpool = AttentionPool2d(32)

    def logits(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(self.avgpool(x).flatten(1))
        return y


class Switched(Pooled):
    def forward(self, x: Tensor, features_only: bool = False, *rest: int, **more: int) -> Tensor:
        if features_only or rest or more:
            return x
        y: Tensor = self.features(x)
        return self.logits(y)


class Checked(Pooled):
    """What it decides by sizes is the same for every image."""

    def __init__(self) -> None:
        super().__init__()
        self.offset: Tensor
        self.register_buffer("offset", torch.ones(32))

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        assert channels == 3, f"{channels:>3} channels"
        if x.dim() != 4 or x.dtype != torch.float32 or height % 4:
            raise ValueError
        y: Tensor = self.features(x)
        if y.shape[2:] != (6, 10) or y.size(1) < 4:
            raise ValueError
        for _ in range(y.shape[2] // 3):
            y = y + self.offset.view(1, -1, 1, 1)
        return self.logits(y.reshape(batch, -1, height // 4, int(width / 4)))


class Conditional(Pooled):
    def forward(self, x: Tensor) -> Tensor:
        if x.mean() > 0:  # HERE
            x = -x
        return super().forward(x)


class OneImage(Pooled):
    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] == 1:  # HERE
            x = -x
        return super().forward(x)


class OneShape(Pooled):
    """A comparison of tuples, which decides before a symbol could be seen."""

    def forward(self, x: Tensor) -> Tensor:
        if x.shape == (1, *SHAPE):  # HERE
            x = -x
        return super().forward(x)


class ManyImages(Pooled):
    def forward(self, x: Tensor) -> Tensor:
        if x.size(0) > 8:  # HERE
            x = -x
        return super().forward(x)


class Typed(Pooled):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return 2 * y if type(y) is Tensor else y


class Twice(nn.Module):
    """One aggregation, executed for each of two scales."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = AttentionPool2d(3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.pool(x) + self.pool(x[:, :, ::2, ::2])
        return y.flatten(1)


@pytest.mark.parametrize("make", [Switched, Checked])
def test_defaults_and_sizes_are_decided(make: type[Pooled], fill: ModuleType) -> None:
    network = make().eval()
    fill.fill_(network, 5)
    both = output_attention_map(network, SHAPE)
    wanted = torch_outputs(with_attention_map(network))
    scripted = torch.jit.load(io.BytesIO(to_torchscript(both, images())))  # type: ignore[no-untyped-call]
    for form in (both, scripted):
        for one, other in zip(torch_outputs(form), wanted, strict=True):
            np.testing.assert_allclose(one, other, atol=1e-5)
    assert wanted[0].shape == (3, 7)


@pytest.mark.parametrize("make", [Conditional, OneImage, OneShape, ManyImages])
def test_what_depends_on_images_is_refused_with_its_line(make: type[Pooled]) -> None:
    start = make.forward.__code__.co_firstlineno
    words = re.escape(f"cannot be made an output: the network itself (class {make.__name__}), {__file__}:{start + 1}\n")
    with pytest.raises(ModelError, match=rf"of avgpool\.block {words}") as raised:
        output_attention_map(make().eval(), SHAPE)
    assert "Way round: " in str(raised.value)
    assert "may still build without --with-attention-map" in str(raised.value)


def test_a_branch_that_tracing_drops_is_noticed() -> None:
    with pytest.raises(ModelError, match=r"gives other numbers than the network itself.*\nWay round: take isinstance"):
        output_attention_map(Typed().eval(), SHAPE)


class TwoViews(Pooled):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = super().forward(torch.cat([x, x.flip(3)]))
        return y[: x.shape[0]] + y[x.shape[0] :]


def test_several_views_in_one_batch_have_no_map_each() -> None:
    with pytest.raises(ModelError, match="there are 6 maps for 3 images"):
        output_attention_map(TwoViews().eval(), (3, 32, 32))


def test_an_aggregation_executed_twice() -> None:
    with pytest.raises(ModelError, match=r"pool\.block is executed 2 times for one image"):
        output_attention_map(Twice(), SHAPE)


def test_only_the_code_around_the_aggregation_is_traced() -> None:
    """A condition elsewhere is no obstacle: that module stays as it is."""

    class Inner(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return -x if x.mean() > 0 else x

    network = nn.Sequential(nn.Conv2d(3, 8, 3), Inner(), AttentionPool2d(8), nn.Flatten()).eval()
    both = output_attention_map(network, SHAPE)
    expected = torch_outputs(with_attention_map(network))
    for one, other in zip(torch_outputs(both), expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)
