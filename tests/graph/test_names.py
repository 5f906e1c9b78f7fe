"""A tensor that is called like a module holds what the module returns."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from small_builds import images, network, options

import pcn_deploy
from pcn_deploy import ImageSource
from pcn_deploy.calibration.quantized import apply_scales
from pcn_deploy.progress import silent
from pcn_deploy.verbs.steps.preparation import prepare

torch = pytest.importorskip("torch")

from torch import Tensor, nn  # noqa: E402


class Convolutional(nn.Module):
    """Blocks with a shortcut, one module called twice, and one that is never called."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU())
        self.body, self.act, self.unused = nn.Conv2d(16, 16, 3, 1, 1), nn.SiLU(), nn.Linear(3, 3)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.act(self.body(x)) + x
        logits: Tensor = self.head(self.act(x).mean((2, 3)))
        return logits


def tensors(data: bytes, given: Any) -> dict[str, Any]:
    """Every tensor of a graph, by ONNX's own evaluator."""
    from onnx.reference import ReferenceEvaluator

    model = onnx.load_from_string(data)
    known = {value.name for value in model.graph.output}
    names = [name for node in model.graph.node for name in node.output if name]
    assert len(names) == len(set(names))
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in known)
    found = ReferenceEvaluator(model).run(None, {"images": given})
    return dict(zip([value.name for value in model.graph.output], found, strict=True))


@pytest.mark.parametrize(("make", "least"), [(Convolutional, 3), (network, 12)])
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_a_tensor_named_like_a_module_is_what_it_returns(make: Any, least: int, precision: str) -> None:
    chosen, given, seen = options(precision=precision, remainder="fp32"), images(2), dict[str, Any]()
    bundle = pcn_deploy.compile(make(), chosen, calibration=images()).bundle
    prepared = prepare(make(), chosen, ImageSource([images()], chosen.transform), silent)
    simulated = apply_scales(prepared.deployed, prepared.scales)
    for name, module in simulated.named_modules():
        module.register_forward_hook(lambda _module, _given, made, name=name: seen.update({name: made}))
    with torch.no_grad():
        simulated(torch.from_numpy(given))
    compared = 0
    for name, value in tensors(bundle.read("model.onnx"), given).items():
        wanted = seen.get(name)
        if isinstance(wanted, Tensor):
            noise = np.square(wanted.numpy() - value).sum() / np.square(wanted.numpy()).sum()
            assert noise < (1e-9 if precision == "fp32" else 0.05), name
            compared += 1
    assert compared >= least
    nodes = [node.name for node in onnx.load_from_string(bundle.read("model.onnx")).graph.node]
    assert len(nodes) == len(set(nodes))
    assert any(name.startswith(("body.", "blocks.0.")) for name in nodes)
    assert not any("unused" in name or "_empty" in name for name in nodes)
