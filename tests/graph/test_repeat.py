"""Exporting one block of many: the unrolled graph is the graph of the whole network, or the run is left alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn

from pcn_deploy.errors import ModelError
from pcn_deploy.graph import export
from pcn_deploy.graph.repeat import SCOPES, Run, _body, _boundary, find_runs, keep_first
from pcn_deploy.models.patchconvnet import PatchConvNet
from pcn_deploy.network.deploy import to_deploy
from pcn_deploy.specs import BatchRange

MakeNet = Callable[..., PatchConvNet]


def execute(graph: ir.Model, images: Tensor) -> npt.NDArray[np.float32]:
    session = ort.InferenceSession(export.serialise(graph), providers=["CPUExecutionProvider"])
    logits: npt.NDArray[np.float32] = session.run(None, {"images": images.numpy()})[0]
    return logits


def check_export(model: nn.Module, shape: tuple[int, int, int], runs: list[Run]) -> None:
    model.eval()
    images = torch.from_numpy(np.random.default_rng(0).standard_normal((2, *shape)).astype(np.float32))
    assert find_runs(model, images) == runs
    with torch.no_grad():
        expected = model(images).numpy()
    assert np.abs(expected).max() > 0
    np.testing.assert_allclose(execute(export.to_onnx(model, shape, BatchRange(), {}), images), expected, atol=1e-5)


def test_unrolled_graph_is_that_of_a_full_export(make_net: MakeNet, monkeypatch: pytest.MonkeyPatch) -> None:
    net, _ = to_deploy(make_net(depth=4), torch.rand(1, 3, 32, 48))
    images = torch.rand(2, 3, 32, 48)
    assert find_runs(net, images) == [Run("blocks", ("0", "1", "2", "3"))]
    unrolled = export.to_onnx(net, (3, 32, 48), BatchRange(), {})
    monkeypatch.setattr(export, "find_runs", lambda _model, _example: [])
    full = export.to_onnx(net, (3, 32, 48), BatchRange(), {})
    np.testing.assert_allclose(execute(unrolled, images), execute(full, images), atol=1e-6)
    kinds = [Counter(node.op_type for node in graph.graph) for graph in (unrolled, full)]
    assert kinds[0] == kinds[1]
    assert kinds[0]["Conv"] == 4 + 4 * 5
    sizes = [
        sum(value.const_value.size for value in g.graph.initializers.values() if value.const_value is not None)
        for g in (unrolled, full)
    ]
    assert sizes[0] == sizes[1]


def test_each_block_reads_its_own_weights(make_net: MakeNet) -> None:
    net = make_net(depth=4)
    graph = export.to_onnx(net, (3, 32, 32), BatchRange(), {}).graph
    weights = net.state_dict()
    depthwise = [node for node in graph if node.op_type == "Conv" and node.attributes["group"].as_int() == 32]
    assert len(depthwise) == 4
    for index, node in enumerate(depthwise):
        for value, leaf in zip(node.inputs[1:], ("weight", "bias"), strict=True):
            assert value is not None and value.const_value is not None
            expected = weights[f"blocks.{index}.attn.qkv_pos.2.{leaf}"].numpy()
            np.testing.assert_array_equal(value.const_value.numpy(), expected)


def test_the_network_keeps_all_its_blocks(make_net: MakeNet) -> None:
    net = make_net(depth=4)
    short = keep_first(net, [Run("blocks", ("0", "1", "2", "3"))])
    assert [name for name, _ in short.get_submodule("blocks").named_children()] == ["0"]
    assert len(net.blocks) == 4
    assert short.state_dict()["blocks.0.gamma_1"].data_ptr() == net.state_dict()["blocks.0.gamma_1"].data_ptr()


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_equal_weights_everywhere_are_no_problem(make_net: MakeNet, value: float) -> None:
    net = make_net(depth=3)
    with torch.no_grad():
        for name, parameter in net.blocks.named_parameters():
            parameter.fill_(value if "norm" in name or value == 0 else 0.01)
        next(net.blocks[2].parameters()).fill_(0.3)
    check_export(net, (3, 32, 32), [Run("blocks", ("0", "1", "2"))])


def conv() -> nn.Conv2d:
    return nn.Conv2d(4, 4, 3, padding=1)


class Block(nn.Module):
    def __init__(self, slope: float = 0.1) -> None:
        super().__init__()
        self.conv, self.norm, self.slope = conv(), nn.BatchNorm2d(4), slope

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(self.conv(x))
        return nn.functional.leaky_relu(y, self.slope)


class Counting(nn.Module):
    """Weighs the sum of its blocks by their number."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(Block(), Block(), Block())
        self.stem = nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        z: Tensor = (y + self.blocks(y) / len(self.blocks)).mean((2, 3))
        return z


class Reading(Counting):
    """Reads a weight of its last block."""

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.blocks(self.stem(x)).mean((2, 3)) * self.blocks.get_parameter("2.conv.weight").sum()
        return y


@pytest.mark.parametrize("kind", [Counting, Reading])
def test_what_asks_more_of_its_blocks_is_exported_as_a_whole(kind: Callable[[], nn.Module]) -> None:
    check_export(kind(), (3, 8, 8), [])


class Masked(nn.Module):
    """Holds a tensor that is neither parameter nor buffer, too long for its text to show what differs."""

    def __init__(self, middle: float) -> None:
        super().__init__()
        self.conv, self.mask = conv(), torch.ones(5000)
        self.mask[2500] = middle

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x) * self.mask[2500]
        return y


def test_a_run_at_the_root_holds_the_runs_inside_it() -> None:
    nested = nn.Sequential(*(nn.Sequential(Block(), Block()) for _ in range(3)))
    check_export(nested, (4, 8, 8), [Run("", ("0", "1", "2"))])


def test_several_runs() -> None:
    net = nn.Sequential(nn.Sequential(conv(), conv()), nn.ReLU(), nn.Sequential(Block(), Block(), Block()))
    check_export(net, (4, 8, 8), [Run("0", ("0", "1")), Run("2", ("0", "1", "2"))])


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Sequential(*(nn.Conv2d(4, 4, 3, stride=2, padding=1) for _ in range(3))),
        lambda: nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=2, dilation=2)),
        lambda: nn.Sequential(Block(0.1), Block(0.3)),
        lambda: nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1, bias=False)),
        lambda: nn.Sequential(Masked(2.0), Masked(3.0)),
        lambda: nn.Sequential(nn.GELU(), nn.GELU()),
    ],
    ids=["shape changes", "another dilation", "another slope", "no bias", "another constant", "no weights"],
)
def test_blocks_that_differ_are_no_run(make: Callable[[], nn.Module]) -> None:
    assert find_runs(make().eval(), torch.zeros(1, 4, 9, 9)) == []


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(Block(), Block(), Block())


class OwnLoop(Blocks):
    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x) + x
        return x


class Twice(Blocks):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.blocks(self.blocks(x))
        return y


class AlsoAlone(Blocks):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.blocks(x) + self.blocks[1](x)
        return y


def test_blocks_that_the_network_executes_in_its_own_way_are_no_run() -> None:
    """Repeating the one exported block would compute something else, without any error."""
    for model in (OwnLoop(), Twice(), AlsoAlone()):
        check_export(model, (4, 6, 6), [])
    shared = conv()
    check_export(nn.Sequential(shared, shared, conv()), (4, 6, 6), [])


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, 2, width // 2).permute(2, 0, 3, 1, 4).unbind(0)
        update = ((q @ k.transpose(-1, -2)).softmax(-1) @ v).transpose(1, 2)
        y: Tensor = x + update.reshape(batch, tokens, width)
        return y


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(Attention(), Attention(), Attention())

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.blocks(x.reshape(x.shape[0], -1, 8))
        return y.mean(1)


def test_blocks_that_read_more_than_their_input_are_exported_in_full() -> None:
    """With a batch of any size, these blocks read the size of the batch too."""
    check_export(Transformer(), (4, 8, 8), [Run("blocks", ("0", "1", "2"))])


def test_one_activation_object_between_equal_blocks_stays_in_the_graph() -> None:
    shared = nn.ReLU()
    check_export(nn.Sequential(conv(), shared, conv(), shared, conv(), shared), (4, 8, 8), [])


def test_blocks_that_share_a_part_are_exported() -> None:
    blocks = [nn.Sequential(conv(), nn.ReLU()) for _ in range(3)]
    for block in blocks[1:]:
        block[0].weight = blocks[0][0].weight
    check_export(nn.Sequential(*blocks), (4, 8, 8), [Run("", ("0", "1", "2"))])


class Halved(nn.Module):
    """Reads the size of the batch for the target of its interpolation, as attention on a pooled map does."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = conv()

    def forward(self, x: Tensor) -> Tensor:
        small = nn.functional.avg_pool2d(self.conv(x), 3, 2, 1)
        return nn.functional.interpolate(small, size=[x.shape[2], x.shape[3]], mode="bilinear") + x


def test_blocks_that_read_the_size_of_the_batch_are_unrolled(monkeypatch: pytest.MonkeyPatch) -> None:
    """The exporter makes the nodes of that size without a note of their block, or once for all blocks."""
    exports: list[int] = []
    original = export._export

    def counting(model: nn.Module, *rest: object) -> object:
        exports.append(len(list(model.children())))
        return original(model, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(export, "_export", counting)
    check_export(nn.Sequential(*(Halved() for _ in range(4))), (4, 7, 9), [Run("", ("0", "1", "2", "3"))])
    assert exports == [1], "no second export of the whole network"


def graph_of(nodes: list[ir.Node], inputs: list[ir.Value], outputs: list[ir.Value]) -> ir.Graph:
    return ir.Graph(inputs, outputs, nodes=nodes, opset_imports={"": 20})


def node(op: str, inputs: list[ir.Value], scope: str | None, dtype: ir.DataType = ir.DataType.FLOAT) -> ir.Node:
    made = ir.Node("", op, inputs, metadata_props={} if scope is None else {SCOPES: f"['', '{scope}', '{scope}.conv']"})
    made.outputs[0].type = ir.TensorType(dtype)
    return made


def test_a_node_without_a_note_belongs_to_the_block_only_if_it_stands_between_its_nodes() -> None:
    images = ir.Value(name="images", type=ir.TensorType(ir.DataType.FLOAT))
    before = node("Relu", [images], None)
    first = node("Conv", [before.outputs[0]], "b.0")
    size = node("Shape", [first.outputs[0]], None, ir.DataType.INT64)
    leaving = node("Shape", [first.outputs[0]], None, ir.DataType.INT64)
    last = node("Resize", [first.outputs[0], size.outputs[0], leaving.outputs[0]], "b.0")
    after = node("Relu", [last.outputs[0], leaving.outputs[0]], "head")
    other = node("Conv", [after.outputs[0]], "b.01")
    nodes = [before, first, size, leaving, last, after, other]
    graph = graph_of(nodes, [images], list(other.outputs))
    assert _body(graph, "b.0") == [first, size, last]


@pytest.mark.parametrize(("dtype", "fits"), [(ir.DataType.INT64, True), (ir.DataType.FLOAT, False)])
def test_a_block_may_read_sizes_but_no_second_tensor(dtype: ir.DataType, fits: bool) -> None:
    images = ir.Value(name="images", type=ir.TensorType(ir.DataType.FLOAT))
    second = ir.Value(name="second", type=ir.TensorType(dtype))
    resize = node("Resize", [images, second], "b.0")
    after = node("Relu", [resize.outputs[0]], None)
    graph = graph_of([resize, after], [images, second], list(after.outputs))
    body = _body(graph, "b.0")
    if fits:
        assert _boundary(body) == (images, resize.outputs[0])
    else:
        with pytest.raises(ModelError, match="reads 2 tensors and returns 1"):
            _boundary(body)
