"""What networks return, as tensors with names and roles."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from torch import Tensor, fx, nn  # noqa: E402

from pcn_deploy.errors import ModelError, OptionError  # noqa: E402
from pcn_deploy.network.outputs import as_tuple, choose_outputs  # noqa: E402
from pcn_deploy.specs import OutputSpec  # noqa: E402

IMAGES = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
Pair = namedtuple("Pair", ["near", "far"])


@dataclass
class Answer:
    logits: Tensor
    mask: Tensor
    hidden: Tensor | None = None


class Returning(nn.Module):
    """Two convolutions, whose maps and means are returned as a test says."""

    def __init__(self, form: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 6, 3)
        self.form = form

    def forward(self, x: Tensor) -> Any:
        feature = self.second(self.first(x).relu())
        return self.form(feature.mean((2, 3)), feature)


FORMS: dict[str, tuple[Callable[[Tensor, Tensor], Any], dict[str, str]]] = {
    "logits": (lambda row, _map: row, {"logits": "logits"}),
    "one row": (lambda row, _map: row[:, :1], {"logits": "logits"}),
    "map": (lambda _row, map_: map_, {"output": "tensor"}),
    "dict": (lambda row, map_: {"logits": row, "seg": map_}, {"logits": "logits", "seg": "tensor"}),
    "ordered": (lambda row, map_: OrderedDict(out=map_, aux=row), {"out": "tensor", "aux": "tensor"}),
    "map called logits": (lambda _row, map_: {"logits": map_}, {"logits": "tensor"}),
    "tuple": (lambda row, map_: (row, map_), {"output_0": "tensor", "output_1": "tensor"}),
    "list in a dict": (
        lambda row, map_: {"maps": [map_, map_ + 1], "x": row},
        {"maps_0": "tensor", "maps_1": "tensor", "x": "tensor"},
    ),
    "dict in a tuple": (lambda row, map_: (row, {"a": map_}), {"output_0": "tensor", "output_1.a": "tensor"}),
    "named tuple": (lambda row, map_: Pair(row, map_), {"near": "tensor", "far": "tensor"}),
    "dataclass": (lambda row, map_: Answer(row, map_), {"logits": "logits", "mask": "tensor"}),
    "names of ours": (
        lambda row, map_: {"images": row, "edge": map_, "simulated_x": row + 1, "edges": map_ + 1},
        dict.fromkeys(("_images", "_edge", "_simulated_x", "edges"), "tensor"),
    ),
    "one tensor twice": (lambda row, _map: (row, row), {"output_0": "tensor"}),
    "with others": (
        lambda row, map_: {"logits": row, "best": row.argmax(1), "size": 3, "all": row.sum(), "seg": map_},
        {"logits": "logits", "seg": "tensor"},
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_becomes_tensors_with_names(form: str) -> None:
    make, wanted = FORMS[form]
    model = Returning(make).eval()
    names = [name for name, _ in model.named_modules()]
    row, map_ = Returning(lambda row, map_: (row, map_)), None
    row.load_state_dict(model.state_dict())
    row, map_ = row(IMAGES)
    chosen, outputs, notes = choose_outputs(model, IMAGES)
    assert {output.name: output.role for output in outputs} == wanted
    found = as_tuple(chosen(IMAGES))
    assert len(found) == len(outputs)
    for tensor in found:
        assert any(tensor.shape == one.shape and torch.allclose(tensor, one, atol=2) for one in (row, map_, row[:, :1]))
    assert [name for name, _ in chosen.named_modules()] == names, "modules keep their names"
    assert type(chosen).__name__ == "Returning"
    assert bool(notes) == (form == "with others")
    if notes:
        assert "best, all" in notes[0]


def test_outputs_are_chosen_by_name_in_the_order_asked_for() -> None:
    model = Returning(lambda row, map_: {"logits": row, "seg": map_}).eval()
    row, map_ = model(IMAGES).values()
    chosen, outputs, notes = choose_outputs(model, IMAGES, [OutputSpec("seg", ""), OutputSpec("logits", "tensor")])
    assert outputs == (OutputSpec("seg", "tensor"), OutputSpec("logits", "tensor"))
    assert torch.equal(chosen(IMAGES)[0], map_)
    assert torch.equal(chosen(IMAGES)[1], row)
    assert not notes


def test_an_output_that_is_not_there() -> None:
    model = Returning(lambda row, map_: {"logits": row, "seg": map_}).eval()
    with pytest.raises(OptionError, match=r"no output 'mask' to build\. It has logits, seg"):
        choose_outputs(model, IMAGES, [OutputSpec("mask", "")])


def test_a_traced_network_stays_one() -> None:
    """As torchvision's feature extractors are: what a graph module computes is made of its graph."""
    model = Returning(lambda row, map_: {"row": row, "map": map_}).eval()
    traced = fx.symbolic_trace(model)
    chosen, outputs, _ = choose_outputs(traced, IMAGES, [OutputSpec("map", "")])
    assert torch.equal(chosen(IMAGES), model(IMAGES)["map"])
    assert outputs == (OutputSpec("map", "tensor"),)


@pytest.mark.parametrize(
    "form", [lambda row, _map: None, lambda row, _map: {"best": row.argmax(1)}, lambda row, _map: row.sum()]
)
def test_a_network_without_a_row_for_each_image(form: Callable[[Tensor, Tensor], Any]) -> None:
    with pytest.raises(ModelError, match="one row for each image"):
        choose_outputs(Returning(form).eval(), IMAGES)


def test_a_role_that_an_output_cannot_have_is_refused() -> None:
    class Net(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mean((2, 3))

    images, logits = torch.rand(2, 3, 4, 4), OutputSpec("logits", "logits")
    assert choose_outputs(Net().eval(), images, (logits,))[1] == (logits,)
    words = r"'logits' is \(2, 3\), and the role attention_map has axes \(batch, token, height, width\).*logits:tensor"
    with pytest.raises(OptionError, match=words):
        choose_outputs(Net().eval(), images, (OutputSpec("logits", "attention_map"),))
