"""The three ways a network is executed: eagerly, as frozen TorchScript, and by ONNX Runtime."""

from __future__ import annotations

import io
from collections.abc import Callable

import onnxruntime as ort
import torch
from torch import Tensor, nn

from pcn_deploy.graph.export import serialise, to_onnx
from pcn_deploy.graph.torchscript import to_torchscript
from pcn_deploy.specs import BatchRange

Execute = Callable[[nn.Module, Tensor], Tensor]


def eager(model: nn.Module, images: Tensor) -> Tensor:
    with torch.inference_mode():
        logits: Tensor = model(images)
    return logits


def torchscript(model: nn.Module, images: Tensor) -> Tensor:
    frozen = torch.jit.load(io.BytesIO(to_torchscript(model, images)))  # type: ignore[no-untyped-call]
    assert not list(frozen.named_parameters()), "freezing turns weights into constants"
    return eager(frozen, images)


def onnxruntime(model: nn.Module, images: Tensor) -> Tensor:
    channels, height, width = images.shape[1:]
    data = serialise(to_onnx(model, (channels, height, width), BatchRange(), {}))
    session = ort.InferenceSession(data, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


EXECUTORS: tuple[Execute, ...] = (eager, torchscript, onnxruntime)
