"""INT8 in residual networks: an addition takes its identity in INT8, its branch as the convolution leaves it."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn

from pcn_deploy.calibration.collect import calibrate
from pcn_deploy.calibration.plan.facts import inspect_layers
from pcn_deploy.calibration.plan.rules import LayerFacts, PlanEntry, make_plan
from pcn_deploy.calibration.quantized import Quantization, apply_scales, plan_scales
from pcn_deploy.data.images import ImageSource
from pcn_deploy.data.transform import Transform
from pcn_deploy.errors import ModelError
from pcn_deploy.graph.export import serialise, to_onnx
from pcn_deploy.models.layers import ResidualAdd
from pcn_deploy.models.resnet import ResNet
from pcn_deploy.network.deploy import to_deploy
from pcn_deploy.specs import BatchRange

SHAPE = (3, 64, 48)


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.from_numpy(np.random.default_rng(3).standard_normal((4, *SHAPE)).astype(np.float32))


@pytest.fixture(scope="module")
def network(fill: ModuleType) -> nn.Module:
    """Two blocks per stage: the second of each adds its input as it is, the first that of a shortcut."""
    net = ResNet(block="basic", depths=(2, 1, 1, 1), num_classes=7)
    fill.fill_(net, 1)
    return to_deploy(net.eval(), torch.rand(1, *SHAPE))[0]


@pytest.fixture(scope="module")
def scales(network: nn.Module, images: Tensor) -> dict[str, Quantization]:
    plan = make_plan(inspect_layers(network, images[:1]), "int8", "fp32")
    seen = calibrate(
        network, list(plan.quantized_entries), ImageSource(images.numpy(), Transform(resolution=SHAPE[1:])), "max"
    )
    assert seen.amax["layer1.1.add"] == seen.amax["layer1.1.conv1"], "identity and input of the block are one tensor"
    return plan_scales(network, plan.with_ranges(seen.ranges))


def decide(branch: str, groups: int = 1, identity: tuple[str, ...] = ("relu", "dense")) -> PlanEntry:
    layers = [
        LayerFacts(path="conv", kind="Conv2d", rows=64, in_channels=64, out_channels=64, groups=groups),
        LayerFacts(path="dense", kind="Conv2d", rows=64, in_channels=64, out_channels=64),
        LayerFacts(path="add", kind="ResidualAdd", branch=branch, identity=identity),
    ]
    return make_plan(layers, "int8").entries[2]


def test_an_addition_is_int8_where_its_branch_is() -> None:
    assert (decide("conv").precision, decide("conv").reason[:13]) == ("int8", "identity only")
    for entry in (decide("conv", groups=64), decide("")):
        assert (entry.precision, entry.reason) == ("fp16", "its branch does not end in an INT8 layer")
    stream = decide("conv", identity=("norm", "mlp.add"))
    assert (stream.precision, stream.reason.split(":")[0]) == ("fp16", "no INT8 layer makes or reads its identity")


def test_additions_alone_are_no_reason_for_int8() -> None:
    layers = [
        LayerFacts(path="conv", kind="Conv2d", rows=64, in_channels=64, out_channels=64, groups=64),
        LayerFacts(path="add", kind="ResidualAdd", branch="conv"),
    ]
    with pytest.raises(ModelError, match="No layer of this network gains from INT8"):
        make_plan(layers, "int8")


def test_the_branch_is_found_behind_a_folded_norm(network: nn.Module, images: Tensor) -> None:
    found = {layer.path: layer.branch for layer in inspect_layers(network, images[:1]) if layer.kind == "ResidualAdd"}
    assert found == {f"layer{s}.{b}.add": f"layer{s}.{b}.conv2" for s, b in ((1, 0), (1, 1), (2, 0), (3, 0), (4, 0))}


def test_identity_is_quantised_and_branch_is_not(network: nn.Module, scales: dict[str, Quantization]) -> None:
    graph = to_onnx(network, SHAPE, BatchRange(), scales).graph
    additions = [node for node in graph if node.op_type == "Add"]
    assert len(additions) == 5
    for node in additions:
        branch, identity = (value.producer() for value in node.inputs if value is not None)
        assert branch is not None and identity is not None
        assert (branch.op_type, identity.op_type) == ("Conv", "DequantizeLinear")
    tensors = [node.inputs[0] for node in graph if node.op_type == "QuantizeLinear"]
    assert len(tensors) == len(set(tensors)), "one tensor is quantised once, for all its readers"


class Block(nn.Module):
    """One residual block, so that no rounding difference is carried on to a second code."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(16, 16, 3, padding=1)
        self.add = ResidualAdd()

    def forward(self, x: Tensor) -> Tensor:
        total: Tensor = self.add(self.conv(x), x)
        return total.flatten(1)


def test_graph_equals_the_quantised_module(fill: ModuleType) -> None:
    block = Block().eval()
    fill.fill_(block, 1)
    images = torch.from_numpy(fill.images_for((2, 16, 6, 5), 1))
    no_weight = np.empty(0, np.float32)
    scales = {"conv": Quantization(0.02, np.full(16, 0.01, np.float32)), "add": Quantization(0.3, no_weight)}
    quantized = apply_scales(block, scales)
    with torch.inference_mode():
        expected, plain = quantized(images), block(images)
        added = quantized.get_submodule("add")(torch.zeros(3), torch.tensor([0.1, 0.5, 1e9]))
    assert added.tolist() == pytest.approx([0.0, 0.6, 127 * 0.3])
    session = ort.InferenceSession(serialise(to_onnx(block, (16, 6, 5), BatchRange(), scales)))
    (found,) = session.run(None, {"images": images.numpy()})
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-5, rtol=0)
    assert (expected - plain).abs().max() > 0.1, "quantisation is visible at all"


def test_an_addition_that_is_not_in_the_graph_is_an_error(network: nn.Module, scales: dict[str, Quantization]) -> None:
    with pytest.raises(ModelError, match=r"0 additions of layer1\.7\.add"):
        to_onnx(network, SHAPE, BatchRange(), {"layer1.7.add": scales["layer1.1.add"]})
