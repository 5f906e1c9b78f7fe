"""Logits that a network masks are as large as no error is: beside them the others must still be judged."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
import torch
from small_builds import images, options
from torch import Tensor, nn

import pcn_deploy
from pcn_deploy import Bundle
from pcn_deploy.proof.executions import prove
from pcn_deploy.tasks.classification import LogitsMeter
from pcn_deploy.tasks.metrics import live_classes


class Masked(nn.Module):
    """Ten logits of which five are masked."""

    def __init__(self, mask: float, *, added: bool = False) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.ReLU())
        self.head, self.mask, self.added = nn.Linear(32, 10), mask, added
        self.unused: Tensor
        self.register_buffer("unused", torch.arange(10) % 2 == 1)

    def forward(self, x: Tensor) -> Tensor:
        """Classify `(N, 3, H, W)`."""
        logits: Tensor = self.head(self.layers(x).mean((2, 3)))
        if self.added:
            return logits + self.mask * self.unused.float()
        return logits.masked_fill(self.unused, self.mask)


def negated(bundle: Bundle) -> Bundle:
    """The bundle with the weights of the head negated in its graph."""
    graph = onnx.load_from_string(bundle.read("model.onnx"))
    tensor = next(each for each in graph.graph.initializer if np.prod(each.dims) == 320)
    tensor.CopyFrom(onnx.numpy_helper.from_array(-onnx.numpy_helper.to_array(tensor), tensor.name))
    bundle.add_engine("cpu", "model.onnx", graph.SerializeToString(), {})
    return bundle


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize(("mask", "added"), [(-1e4, False), (-1e4, True), (-65504.0, False)])
def test_a_wrong_graph_is_seen_beside_a_mask(mask: float, added: bool, precision: str) -> None:
    torch.manual_seed(0)
    result = pcn_deploy.compile(Masked(mask, added=added).eval(), options(precision=precision), calibration=images(16))
    assert result, result.reports
    assert not prove(negated(result.bundle), "cpu")


def test_live_classes() -> None:
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((16, 6))
    assert live_classes(logits).all()
    assert live_classes(logits[:1]).all(), "one image tells nothing"
    logits[:, 2] = -1e9
    logits[:, 4] -= 1e4
    assert live_classes(logits).tolist() == [True, True, False, True, False, True]
    priors = np.array([0.3, 0.1, -0.2]) + 1e-5 * logits[:, :3] * np.array([1, 1, 0])
    assert live_classes(priors).all(), "priors of weights that nobody trained are no masks"
    assert live_classes(np.tile(logits[:1], (4, 1))).all(), "nothing moves"


def test_a_masked_class_that_becomes_the_answer_is_an_error() -> None:
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((16, 4))
    logits[:, 3] = -1e9
    wrong = logits.copy()
    wrong[5, 3] = 50.0
    for found, passes in ((logits, True), (wrong, False)):
        meter = LogitsMeter(live=live_classes(logits))
        meter.update(logits, found)
        assert (meter.metrics()["sqnr_db"] > 60) == passes


@pytest.mark.parametrize("write", [lambda x: x.sub_(0.5), lambda x: x.mul_(2)])
def test_a_network_that_writes_into_its_images_spoils_nobody_else_s(write: Any) -> None:
    class Writing(Masked):
        def forward(self, x: Tensor) -> Tensor:
            write(x)
            return super().forward(x)

    torch.manual_seed(0)
    net, given = Writing(-5.0).eval(), images(32)
    result = pcn_deploy.compile(net, options(precision="int8", recovery=("bias-correction",)), calibration=[given])
    assert result, result.reports
    kept = given.copy()
    with pcn_deploy.Engine.open(result.bundle, "cpu") as engine:
        assert pcn_deploy.verify(engine, [given], reference=net)
    np.testing.assert_array_equal(given, kept)


@pytest.mark.parametrize("value", [1e-12, 1e6])
def test_a_parameter_that_fp16_cannot_hold_stays_as_it_is(value: float) -> None:
    class Scaled(Masked):
        def __init__(self) -> None:
            super().__init__(-5.0)
            self.p = nn.Parameter(torch.tensor(value))

        def forward(self, x: Tensor) -> Tensor:
            logits = super().forward(x)
            return logits / (logits.abs().sum(1, keepdim=True) + self.p) * (self.p if value > 1 else 1)

    torch.manual_seed(0)
    result = pcn_deploy.compile(Scaled().eval(), options(precision="fp16"), calibration=images(16))
    assert result, result.reports
