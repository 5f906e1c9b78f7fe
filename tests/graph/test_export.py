"""The ONNX file and the TorchScript file: interface, batch sizes, and networks that cannot be exported."""

from __future__ import annotations

import gc
import io
import weakref
from collections.abc import Callable

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn

from pcn_deploy.errors import ModelError
from pcn_deploy.graph.export import engine_spec, export_network, serialise, to_onnx
from pcn_deploy.graph.torchscript import to_torchscript
from pcn_deploy.graph.typed import reduce_precision
from pcn_deploy.models.patchconvnet import PatchConvNet
from pcn_deploy.specs import BatchRange

MakeNet = Callable[..., PatchConvNet]


def test_any_batch_size_runs(make_net: MakeNet) -> None:
    net = make_net(depth=2)
    batch = BatchRange(min=1, opt=4, max=16)
    told: list[int] = []
    graph = to_onnx(net, (3, 32, 48), batch, {}, lambda _step, done, total, _unit="": told.append(total - done))
    assert told[-1] == 0 and told == sorted(told, reverse=True)
    spec = engine_spec(graph, batch)
    assert [(x.name, x.dtype, x.shape) for x in (*spec.inputs, *spec.outputs)] == [
        ("images", "float32", ("batch", 3, 32, 48)),
        ("logits", "float32", ("batch", 10)),
    ]
    data = serialise(graph)
    onnx.checker.check_model(data, full_check=True)
    assert [(entry.domain, entry.version) for entry in onnx.load_from_string(data).opset_import] == [("", 20)]
    session = ort.InferenceSession(data, providers=["CPUExecutionProvider"])
    for count in (1, 3, 16):
        images = torch.rand(count, 3, 32, 48)
        with torch.inference_mode():
            expected = net(images).numpy()
        np.testing.assert_allclose(session.run(None, {"images": images.numpy()})[0], expected, atol=1e-4)


def test_a_fixed_batch_is_fixed(make_net: MakeNet) -> None:
    graph = to_onnx(make_net(depth=1), (3, 32, 32), BatchRange(min=3, opt=3, max=3), {})
    assert engine_spec(graph, BatchRange(min=3, opt=3, max=3)).inputs[0].shape == (3, 3, 32, 32)
    session = ort.InferenceSession(serialise(graph), providers=["CPUExecutionProvider"])
    assert session.run(None, {"images": np.zeros((3, 3, 32, 32), np.float32)})[0].shape == (3, 10)


def test_gelu_and_layer_norm_stay_single_operators(make_net: MakeNet) -> None:
    graph = to_onnx(make_net(depth=2), (3, 32, 32), BatchRange(), {})
    kinds = [node.op_type for node in graph.graph]
    assert kinds.count("Gelu") == 3 + 2 * 2 + 1
    assert kinds.count("LayerNormalization") == 2 + 3 + 1
    assert not {"Erf", "ReduceVar", "Sqrt"} & set(kinds)


def test_the_model_is_left_as_it_is(make_net: MakeNet) -> None:
    net = make_net()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    to_onnx(net, (3, 32, 32), BatchRange(), {})
    assert net.state_dict().keys() == before.keys()
    assert all(torch.equal(net.state_dict()[name], tensor) for name, tensor in before.items())
    assert all(parameter.requires_grad for parameter in net.parameters())


class DependsOnData(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if float(x.sum()) > 0 else -x


def test_what_was_exported_before_is_used_for_the_same_network_only(make_net: MakeNet) -> None:
    """A recovery, or a layer left out of it, makes another network; its weights are what counts then."""
    net, other, shape = make_net(seed=1), make_net(seed=2), (3, 32, 32)
    images = torch.rand(1, *shape)
    for model in (other, net):
        exported = export_network(net, shape, BatchRange())
        graph = to_onnx(model, shape, BatchRange(), {}, exported=exported)
        assert (graph is exported.graph) == (model is net)
        session = ort.InferenceSession(serialise(graph), providers=["CPUExecutionProvider"])
        with torch.inference_mode():
            wanted = model(images).numpy()
        np.testing.assert_allclose(session.run(None, {"images": images.numpy()})[0], wanted, atol=1e-4)


def test_a_network_that_cannot_be_exported_is_a_model_error() -> None:
    with pytest.raises(ModelError, match=r"cannot be exported to ONNX: the network itself \(class DependsOnData\)"):
        to_onnx(DependsOnData().eval(), (3, 4, 4), BatchRange(), {})


def test_torchscript_takes_any_size(make_net: MakeNet) -> None:
    net = make_net()
    frozen = torch.jit.load(io.BytesIO(to_torchscript(net, torch.rand(1, 3, 32, 32))))  # type: ignore[no-untyped-call]
    for shape in ((1, 3, 32, 32), (2, 3, 37, 61)):
        images = torch.rand(shape)
        with torch.inference_mode():
            torch.testing.assert_close(frozen(images), net(images), atol=1e-4, rtol=0)


def test_scripting_keeps_no_weights() -> None:
    """Torch keeps whatever it freezes, unless it was loaded from a file."""
    layer = nn.Conv2d(3, 4, 1).requires_grad_(False)
    weight = weakref.ref(layer.weight)
    to_torchscript(nn.Sequential(layer).eval(), torch.rand(1, 3, 4, 4))
    del layer
    gc.collect()
    assert weight() is None


@pytest.mark.parametrize(
    ("precision", "advice"), [("fp32", "Build it with --precision fp16"), ("fp16", "not FP32 any")]
)
def test_a_graph_too_large_for_one_file(
    make_net: MakeNet, monkeypatch: pytest.MonkeyPatch, precision: str, advice: str
) -> None:
    """Faked: protobuf refuses what exceeds 2 GiB."""

    def refuse(_model: object) -> None:
        raise ValueError("exceeds maximum protobuf size of 2GB")

    graph = to_onnx(make_net(depth=1), (3, 32, 48), BatchRange(), {})
    reduce_precision(graph, precision)
    monkeypatch.setattr("onnx_ir.to_proto", refuse)
    with pytest.raises(ModelError, match=rf"does not fit into one file: exceeds .* {advice}"):
        serialise(graph)
