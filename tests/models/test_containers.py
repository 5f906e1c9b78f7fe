"""Which weights of a checkpoint are taken: files as the tools of the field write them, made by hand."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from pcn_deploy.artefact.provenance import ModelSource
from pcn_deploy.errors import CheckpointError, OptionError
from pcn_deploy.models.checkpoint import load_strict, read_checkpoint, without_prefix
from pcn_deploy.models.containers import StateDict
from pcn_deploy.models.registry import create_model

SHAPE: dict[str, Any] = {"width": 16, "depth": 1, "patch": 4}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.norm(self.conv(x)).mean((2, 3)))
        return logits


def state(seed: int) -> StateDict:
    torch.manual_seed(seed)
    return Net().state_dict()


RAW, AVERAGE = state(0), state(1)


def under(prefix: str, given: StateDict) -> StateDict:
    return {prefix + name: value for name, value in given.items()}


def averaged_model() -> StateDict:
    """What torchvision's reference training saves as `model_ema`, by the class itself."""
    network = Net()
    network.load_state_dict(AVERAGE)
    return dict(AveragedModel(network, use_buffers=True).state_dict())


def parameters(given: StateDict) -> StateDict:
    return {name: value for name, value in given.items() if name in dict(Net().named_parameters())}


BOTH: dict[str, Callable[[], dict[str, Any]]] = {
    "timm": lambda: {"state_dict": RAW, "state_dict_ema": AVERAGE, "arch": "net", "optimizer": {"state": {}}},
    "capitals": lambda: {"state_dict": RAW, "state_dict_EMA": AVERAGE},
    "one word": lambda: {"model": RAW, "modelEMA": AVERAGE},
    "DeiT": lambda: {"model": RAW, "model_ema": AVERAGE, "epoch": 3, "scaler": {"scale": torch.tensor(2.0)}},
    "DeiT from several GPUs": lambda: {"model": under("module.", RAW), "model_ema": AVERAGE},
    "compiled and from several GPUs": lambda: {
        "model": under("_orig_mod.module.", RAW),
        "model_ema": under("module._orig_mod.", AVERAGE),
    },
    "torchvision": lambda: {"model": RAW, "model_ema": averaged_model(), "epoch": 3},
    "mmengine": lambda: {
        "meta": {"mmengine_version": "0.10"},
        "state_dict": AVERAGE,
        "ema_state_dict": {**under("module.", RAW), "steps": torch.tensor(7)},
    },
    "mmcv": lambda: {"state_dict": {**AVERAGE, **{f"ema_{k.replace('.', '_')}": v for k, v in RAW.items()}}},
    "a dict of the average": lambda: {"state_dict": RAW, "ema_state_dict": AVERAGE},
    "Lightning's WeightAveraging": lambda: {
        "state_dict": under("model.", AVERAGE),
        "current_model_state": under("model.", RAW),
        "averaging_state": {"n_averaged": torch.tensor(3)},
    },
    "Lightning, a member": lambda: {
        "state_dict": {
            **under("model.", RAW),
            **under("ema_model.module.", AVERAGE),
            "ema_model.n_averaged": torch.tensor(5),
            "criterion.weight": torch.ones(3),
        }
    },
    "ema_pytorch": lambda: {
        "state_dict": {
            **under("net.", RAW),
            **under("ema.ema_model.", AVERAGE),
            **under("ema.online_model.", RAW),
            "ema.initted": torch.tensor([True]),
            "ema.step": torch.tensor([9]),
        }
    },
    "LitEma, without buffers": lambda: {
        "state_dict": {
            **under("model.", RAW),
            **{f"model_ema.{name.replace('.', '')}": value for name, value in parameters(AVERAGE).items()},
            "model_ema.decay": torch.tensor(0.99),
            "model_ema.num_updates": torch.tensor(9),
        }
    },
    "RT-DETR": lambda: {"model": RAW, "ema": {"module": AVERAGE, "updates": 12, "warmups": 100}},
    "a shadow": lambda: {"model": RAW, "ema": {"updates": 5, "shadow": AVERAGE}},
    "BasicSR": lambda: {"params": RAW, "params_ema": AVERAGE},
    "a callback": lambda: {
        "state_dict": under("net.", RAW),
        "callbacks": {
            "ModelCheckpoint{'monitor': None}": {"best_model_score": torch.tensor(0.5)},
            "EMACallback": {"ema_state_dict": under("net.", AVERAGE), "_ema_state_dict_ready": True},
        },
    },
    "a callback that is the average": lambda: {"state_dict": RAW, "callbacks": {"EMA{'decay': 0.999}": AVERAGE}},
    "Lightning's StochasticWeightAveraging": lambda: {
        "state_dict": RAW,
        "callbacks": {"StochasticWeightAveraging": {"n_averaged": 3, "average_model_state": AVERAGE}},
    },
    "a checkpoint in another": lambda: {
        "checkpoint": {"model": RAW, "model_ema": AVERAGE, "epoch": 3},
        "args": {"lr": 1},
    },
    "a checkpoint in another in another": lambda: {"a": {"b": {"state_dict": RAW, "ema": {"module": AVERAGE}}}},
    "an average in what is best": lambda: {"state_dict": RAW, "best": {"metric": 81.0, "state_dict_ema": AVERAGE}},
    "an average in an optimizer": lambda: {"state_dict": RAW, "optimizer_states": [{"opt": {}, "ema": AVERAGE}]},
    "another average first": lambda: {
        "state_dict": RAW,
        "loss_ema": {"a": torch.ones(1), "b": torch.ones(1)},
        "extra": {"weights_ema": AVERAGE},
    },
    "safetensors": lambda: {**under("model.", RAW), **under("model_ema.", AVERAGE)},
}


def saved(tmp_path: Path, content: Any) -> Path:
    torch.save(content, tmp_path / "net.pth")
    return tmp_path / "net.pth"


def same(found: StateDict, expected: StateDict, names: StateDict | None = None) -> None:
    found = without_prefix(found)
    assert found.keys() >= expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in names or expected)


@pytest.mark.parametrize("tool", BOTH)
def test_the_average_is_taken_and_the_raw_weights_where_asked_for(tmp_path: Path, tool: str) -> None:
    path = saved(tmp_path, BOTH[tool]())
    names = parameters(AVERAGE) if "without buffers" in tool else AVERAGE
    for which, kind, expected in (("auto", "ema", AVERAGE), ("ema", "ema", AVERAGE), ("raw", "raw", RAW)):
        taken = read_checkpoint(path, which)
        assert taken.kind == kind
        same(taken.state, expected, names)
        other = "raw" if kind == "ema" else "ema"
        assert f"--checkpoint-weights {other} takes the others" in taken.note


PLACES = {
    "mmengine": "ema_state_dict",
    "a dict of the average": "ema_state_dict",
    "RT-DETR": "ema.module",
    "a callback": "callbacks.EMACallback.ema_state_dict",
    "a checkpoint in another": "checkpoint.model_ema",
    "a checkpoint in another in another": "a.b.ema.module",
    "an average in what is best": "best.state_dict_ema",
    "an average in an optimizer": "optimizer_states[0].ema",
    "another average first": "extra.weights_ema",
}


@pytest.mark.parametrize("tool", PLACES)
def test_the_note_names_where_the_weights_are(tmp_path: Path, tool: str) -> None:
    content: Any = BOTH[tool]()
    note = read_checkpoint(saved(tmp_path, content)).note
    assert f"'{PLACES[tool]}'" in note
    for part in PLACES[tool].replace("[0]", ".0").split("."):  # it leads to the tensors
        content = content[int(part) if isinstance(content, list) else part]
    assert all(isinstance(value, Tensor) for value in content.values())


def test_an_average_of_an_object_is_named_to_its_end(tmp_path: Path) -> None:
    note = read_checkpoint(saved(tmp_path, {"state_dict": RAW, "ema_state_dict": {"module": AVERAGE}})).note
    assert "averaged weights ('ema_state_dict.module') and raw ones ('state_dict')" in note


def test_fairseq_evaluates_the_raw_weights(tmp_path: Path) -> None:
    path = saved(tmp_path, {"model": RAW, "extra_state": {"epoch": 3, "ema": AVERAGE}})
    taken = read_checkpoint(path)
    same(taken.state, RAW)
    assert "the raw ones were taken, as fairseq evaluates; --checkpoint-weights ema takes the others" in taken.note
    same(read_checkpoint(path, "ema").state, AVERAGE)


REASONS = {
    "timm": "as timm's loader does",
    "DeiT": "as timm's loader does",
    "mmengine": "which the tool that wrote the file puts there for evaluation",
    "a callback": "as such callbacks validate",
    "RT-DETR": "as an average is kept to be evaluated",
    "BasicSR": "as an average is kept to be evaluated",
    "LitEma, without buffers": "as an average is kept to be evaluated",
    "Lightning's StochasticWeightAveraging": "as an average is kept to be evaluated",
}


@pytest.mark.parametrize("tool", REASONS)
def test_the_reason_is_that_of_the_tool(tmp_path: Path, tool: str) -> None:
    assert (
        f"the averaged (EMA) ones were taken, {REASONS[tool]};" in read_checkpoint(saved(tmp_path, BOTH[tool]())).note
    )


@pytest.mark.parametrize(
    ("beside", "place"),
    [
        ({"ema_state": {"decay": 0.99, "shadow_params": list(AVERAGE.values())}}, "ema_state.shadow_params"),
        ({"optimizer_states": [{"opt": {}, "ema": tuple(AVERAGE.values())}]}, "optimizer_states[0].ema"),
        ({"callbacks": {"EMA": {"cur_step": 3, "ema_weights": list(AVERAGE.values())}}}, "callbacks.EMA.ema_weights"),
    ],
)
def test_an_average_without_names_is_left_and_told(tmp_path: Path, beside: dict[str, Any], place: str) -> None:
    taken = read_checkpoint(saved(tmp_path, {"state_dict": RAW, **beside}))
    same(taken.state, RAW)
    assert f"an average too ('{place}'), without the names of its tensors: it was left" in taken.note


ONE: dict[str, Callable[[], dict[str, Any]]] = {
    "a config beside": lambda: {"model": {"name": "net", "depth": 3}, "state_dict": RAW},
    "a config with one tensor beside": lambda: {"model": {"std": torch.ones(3)}, "state_dict": RAW},
    "pytorch-cifar": lambda: {"net": RAW, "acc": 95.1, "epoch": 199},
    "DeepSpeed": lambda: {"module": RAW, "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}}},
    "a list of losses beside": lambda: {"weights": RAW, "loss_state": {"weight": torch.ones(3), "bias": torch.ones(3)}},
    "one inside another": lambda: {"model": {"state_dict": RAW, "cfg": {}}},
}


@pytest.mark.parametrize("tool", ONE)
def test_the_only_weights_are_taken_without_a_word(tmp_path: Path, tool: str) -> None:
    taken = read_checkpoint(saved(tmp_path, ONE[tool]()))
    assert (taken.kind, taken.note) == ("raw", "")
    same(taken.state, RAW)


@pytest.mark.parametrize(
    "content", [{"model_ema": AVERAGE}, averaged_model(), {"ema": {"module": AVERAGE}}, {"swa_state_dict": AVERAGE}]
)
def test_an_average_alone_is_taken(tmp_path: Path, content: Any) -> None:
    path = saved(tmp_path, content)
    for which in ("auto", "ema"):
        taken = read_checkpoint(path, which)
        assert (taken.kind, taken.note) == ("ema", "")
        same(taken.state, AVERAGE)
    with pytest.raises(CheckpointError, match=r"holds no raw weights, only averaged \(EMA\) ones"):
        read_checkpoint(path, "raw")


def test_raw_weights_alone_are_no_average(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds no averaged \(EMA\) weights, only raw ones under 'model'"):
        read_checkpoint(saved(tmp_path, {"model": RAW}), "ema")


@pytest.mark.parametrize("name", ["ema", "swa_attention"])
def test_a_module_that_is_called_like_an_average_is_none(tmp_path: Path, name: str) -> None:
    content = {**RAW, f"{name}.conv.weight": torch.ones(4, 4, 1, 1), f"{name}.norm.weight": torch.ones(4)}
    taken = read_checkpoint(saved(tmp_path, content))
    assert (taken.kind, taken.note) == ("raw", "")
    assert taken.state.keys() == content.keys()


def test_an_average_of_something_else_is_left_and_told(tmp_path: Path) -> None:
    content = {"model": RAW, "model_ema": {"a": torch.ones(1), "b": torch.ones(1)}}
    taken = read_checkpoint(saved(tmp_path, content))
    same(taken.state, RAW)
    assert "an average too ('model_ema'), of other tensors: it was left" in taken.note


def test_a_kind_that_there_is_not_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="'best' of a checkpoint: known are auto, ema, raw"):
        create_model("patchconvnet", weights=saved(tmp_path, RAW), checkpoint_weights="best")


def test_a_python_user_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    raw, average = (
        ModelSource(model="patchconvnet", architecture=SHAPE, num_classes=3, seed=seed).create() for seed in (0, 1)
    )
    path = saved(tmp_path, {"state_dict": raw.state_dict(), "state_dict_ema": average.state_dict()})
    with caplog.at_level(logging.WARNING, logger="pcn_deploy"):
        network = create_model("patchconvnet", weights=path)
    same(network.state_dict(), average.state_dict())
    assert "the averaged (EMA) ones were taken" in caplog.text
    same(create_model("patchconvnet", weights=path, checkpoint_weights="raw").state_dict(), raw.state_dict())


def test_a_network_that_is_an_averaged_model_loads_its_own_state() -> None:
    network = AveragedModel(Net())
    load_strict(network, averaged_model(), "net.pth")
    same(network.module.state_dict(), AVERAGE)


def test_a_network_of_one_tensor_loads() -> None:
    """The search for a common beginning of its names had no end."""
    network = nn.ParameterDict({"w": nn.Parameter(torch.zeros(2))})
    load_strict(network, {"w": torch.ones(2)}, "net.pth")
    assert network["w"].tolist() == [1, 1]
