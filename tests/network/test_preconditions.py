"""What is refused before anything long is done."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pcn_deploy.errors import ModelError
from pcn_deploy.graph.export import to_onnx
from pcn_deploy.graph.torchscript import to_torchscript
from pcn_deploy.network.outputs import choose_outputs
from pcn_deploy.network.preconditions import check_behaviour, check_definition
from pcn_deploy.specs import BatchRange
from pcn_deploy.tasks.distance import least_sqnr_db

IMAGES = torch.rand(2, 3, 8, 8) * torch.tensor([1.0, -3.0]).reshape(2, 1, 1, 1)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.head = nn.Linear(4, 5)

    def features(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x).abs().mean((2, 3))
        return y

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.features(x))
        return y


def scripted() -> nn.Module:
    return torch.jit.script(Net())


def on_meta() -> nn.Module:
    with torch.device("meta"):
        return Net()


def lazy() -> nn.Module:
    return nn.Sequential(nn.LazyConv2d(4, 3))


def hooked() -> nn.Module:
    net = Net()
    net.conv.register_forward_hook(lambda _module, _inputs, output: output * 1.15)
    return net


def hooked_before() -> nn.Module:
    net = Net()
    net.register_forward_pre_hook(lambda _module, inputs: (inputs[0] * 1.15,))
    return net


def partly_half() -> nn.Module:
    net = Net()
    net.head.half()
    return net


@pytest.mark.parametrize(
    ("make", "place", "found", "advice"),
    [
        (scripted, "the network itself (class RecursiveScriptModule)", "it is a ScriptModule", "before torch.jit.sc"),
        (on_meta, "conv (class Conv2d)", "its weight is on the meta device", "--weights"),
        (lazy, "0 (class LazyConv2d)", "its weight has no shape", "run the network once"),
        (hooked, "conv (class Conv2d)", "it has a forward hook", "do in forward"),
        (hooked_before, "the network itself (class Net)", "it has a forward hook", "do in forward"),
        (partly_half, "head (class Linear)", "its weight is float16", "net.float()"),
        (lambda: Net().double(), "conv (class Conv2d)", "its weight is float64", "net.float()"),
        (lambda: Net().bfloat16(), "conv (class Conv2d)", "its weight is bfloat16", "net.float()"),
    ],
)
def test_definitions_that_no_graph_can_be_made_from(
    make: Callable[[], nn.Module], place: str, found: str, advice: str
) -> None:
    with pytest.raises(ModelError) as caught:
        check_definition(make())
    first, cause, way_round = str(caught.value).splitlines()
    assert first == f"The network cannot be compiled: {place}"
    assert cause.startswith(f"Cause: {found}")
    assert way_round.startswith("Way round: ") and advice in way_round


def test_an_ordinary_network_is_let_through() -> None:
    net = Net().eval()
    check_definition(net)
    check_behaviour(net, IMAGES, batched=True)


class Counts(Net):
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        return super().forward(x)


def test_a_network_with_a_state_is_refused_and_its_state_put_back() -> None:
    net = Counts().eval()
    with pytest.raises(ModelError, match=r"the network itself \(class Counts\)\nCause: .* its count: "):
        check_behaviour(net, IMAGES, batched=False)
    assert net.count == 0


class Normalises(Net):
    """Trained statistics are not used: the batch's own are, and the buffers updated."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)

    def features(self, x: Tensor) -> Tensor:
        mean, var = self.norm.running_mean, self.norm.running_var
        return F.batch_norm(super().features(x.repeat(2, 1, 1, 1)), mean, var, training=True)[: len(x)]


def test_the_buffer_that_changes_is_named_with_its_module() -> None:
    with pytest.raises(ModelError, match=r"norm \(class BatchNorm1d\)\nCause: .* its running_mean: "):
        check_behaviour(Normalises().eval(), IMAGES, batched=False)


class InitialisesItself(Net):
    def forward(self, x: Tensor) -> Tensor:
        self.head.bias.data += 0.25
        return super().forward(x)


def test_a_network_that_changes_a_parameter_is_refused() -> None:
    with pytest.raises(ModelError, match=r"head \(class Linear\)\nCause: forward changes its bias: "):
        check_behaviour(InitialisesItself().eval(), IMAGES, batched=False)


class MixedPrecision(Net):
    def features(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return super().features(x).float()


def test_a_network_that_chooses_its_types_is_refused() -> None:
    with pytest.raises(ModelError, match="forward computes in bfloat16"):
        check_behaviour(MixedPrecision().eval(), IMAGES, batched=False)


class WritesIntoTheImage(Net):
    def features(self, x: Tensor) -> Tensor:
        return super().features(x.sub_(0.5))


def test_a_network_may_write_into_its_image() -> None:
    before = IMAGES.clone()
    net = WritesIntoTheImage().eval()
    check_behaviour(net, IMAGES, batched=True)
    to_torchscript(net, IMAGES)
    assert torch.equal(IMAGES, before)


class Drops(Net):
    def features(self, x: Tensor) -> Tensor:
        return super().features(F.dropout(x))


class Noisy(Net):
    def features(self, x: Tensor) -> Tensor:
        y = super().features(x)
        return y + 1e-3 * torch.randn_like(y)


@pytest.mark.parametrize("kind", [Drops, Noisy])
def test_random_logits_are_refused(kind: Callable[[], nn.Module]) -> None:
    with pytest.raises(ModelError, match="two runs on the same image"):
        check_behaviour(kind().eval(), IMAGES, batched=False)


class SkipsALayer(Net):
    def __init__(self, draw: Callable[[], float]) -> None:
        super().__init__()
        self.draw = draw

    def features(self, x: Tensor) -> Tensor:
        y = super().features(x)
        return y if self.draw() > 1e-9 else 2 * y


@pytest.mark.parametrize("draw", [random.random, np.random.rand])
def test_decisions_by_lot_are_refused_whatever_comes_up(draw: Callable[[], float]) -> None:
    with pytest.raises(ModelError, match="draws a random number"):
        check_behaviour(SkipsALayer(draw).eval(), IMAGES, batched=False)


class DropsRarely(Net):
    def features(self, x: Tensor) -> Tensor:
        y = super().features(x)
        return y * (torch.rand(y.shape[0], 1) > 1e-9).float()


def test_a_graph_that_draws_lots_is_refused() -> None:
    with pytest.raises(ModelError, match=r"forward draws random numbers .* RandomUniform"):
        to_onnx(DropsRarely().eval(), (3, 8, 8), BatchRange(min=1, opt=2, max=4), {})


class ByBatch(Net):
    def features(self, x: Tensor) -> Tensor:
        y = super().features(x)
        return y * 1.5 if x.shape[0] > 1 else y


class Centred(Net):
    def features(self, x: Tensor) -> Tensor:
        y = super().features(x)
        return y - 0.1 * y.mean(0)


class HiddenLeak(Net):
    """What it takes from the other images is small beside what all logits have in common."""

    def __init__(self) -> None:
        super().__init__()
        self.head.bias.data[:] = 1000

    def features(self, x: Tensor) -> Tensor:
        y = super().features(x)
        return y + 0.5 * y.mean(0)


class Accumulates(Net):
    """The first image of a batch is not touched by the others."""

    def features(self, x: Tensor) -> Tensor:
        y = super().features(x)
        return y + 0.05 * y.cumsum(0)


@pytest.mark.parametrize("kind", [ByBatch, HiddenLeak, Centred, Accumulates])
def test_logits_that_depend_on_other_images_are_refused(kind: Callable[[], nn.Module]) -> None:
    with pytest.raises(ModelError, match="when another image is in its batch"):
        check_behaviour(kind().eval(), IMAGES, batched=True)
    check_behaviour(kind().eval(), IMAGES, batched=False)


class FaintLeak(Net):
    """70 dB below the logits: more than float32 rounds off."""

    def features(self, x: Tensor) -> Tensor:
        y = super().features(x)
        return y + 3e-4 * y.mean(0)


def test_a_faint_dependence_is_told_from_rounding() -> None:
    with pytest.raises(ModelError, match="when another image is in its batch"):
        check_behaviour(FaintLeak().eval(), IMAGES, batched=True)


class Chaotic(Net):
    """Adds the pixels in another order where there are several images, as kernels do, and enlarges its rounding 2^18
    times; it asks for float32 by name, which must not round."""

    def features(self, x: Tensor) -> Tensor:
        total = torch.zeros(x.shape[:2])
        for row in sorted(range(x.shape[2]), reverse=x.shape[0] > 1):
            total = total + x[:, :, row].sum(2).to(torch.float32)
        y = torch.cat([total, total[:, :1].float() / 2], 1) % 1
        for _ in range(18):
            y = 4 * y * (1 - y)
        return y


def test_rounding_that_a_network_enlarges_is_no_dependence() -> None:
    torch.manual_seed(0)
    net, images = Chaotic().eval(), torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        alone, together = net(images[:1]), net(images)[:1]
    assert least_sqnr_db([alone.numpy()], [together.numpy()]) < 60
    check_behaviour(net, images, batched=True)


class InFloat32Only(Chaotic):
    """Cannot be executed in another type, so that nothing tells its rounding from a dependence."""

    def features(self, x: Tensor) -> Tensor:
        if x.dtype != torch.float32:
            raise TypeError
        return super().features(x)


def test_what_runs_in_float32_only_is_judged_in_float32() -> None:
    with pytest.raises(ModelError, match="when another image is in its batch"):
        check_behaviour(InFloat32Only().eval(), torch.rand(2, 3, 32, 32), batched=True)


class Squeezed(Net):
    def features(self, x: Tensor) -> Tensor:
        return super().features(x).squeeze()


class Answers(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).argmax(1)


@pytest.mark.parametrize(("kind", "advice"), [(Squeezed, r"x\.flatten\(1\)"), (Answers, "take argmax or topk")])
def test_outputs_that_are_no_rows_of_numbers(kind: Callable[[], nn.Module], advice: str) -> None:
    with pytest.raises(ModelError, match=advice):
        choose_outputs(kind().eval(), IMAGES[:1])


def test_what_cannot_be_executed() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    with pytest.raises(ModelError, match=r"shape \(1, 3, 8, 8\): 1 \(class Linear\)\nCause: .*\n.*\n.*--resolution"):
        check_behaviour(net, IMAGES, batched=True)
    with pytest.raises(ModelError, match=r"Bilinear[\s\S]*one batch of images"):
        check_behaviour(nn.Bilinear(3, 3, 2), IMAGES, batched=True)


class OnOtherDevices(Net):
    def features(self, x: Tensor) -> Tensor:
        return super().features(x) + torch.zeros(1, device="meta")


def test_the_place_of_what_cannot_be_executed_is_named() -> None:
    with pytest.raises(ModelError) as caught:
        check_behaviour(OnOtherDevices().eval(), IMAGES, batched=True)
    message = str(caught.value)
    assert f"the network itself (class OnOtherDevices), {__file__}:" in message
    assert '    return super().features(x) + torch.zeros(1, device="meta")\n' in message
    assert "register_buffer" in message


def test_infinite_logits_are_left_to_those_who_compare_them() -> None:
    net = Net().eval()
    net.head.weight.data[:] = torch.inf
    check_behaviour(net, IMAGES, batched=True)
