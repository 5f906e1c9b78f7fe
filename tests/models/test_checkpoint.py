"""Reading weights: every container the authors used, and everything that must be refused."""

from __future__ import annotations

import argparse
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from pcn_deploy.errors import CheckpointError
from pcn_deploy.models.checkpoint import load_strict, read_state_dict, without_prefix
from pcn_deploy.models.containers import StateDict
from pcn_deploy.models.layouts import infer_patchconvnet, stack_class_heads
from pcn_deploy.models.patchconvnet import PatchConvNet
from pcn_deploy.models.registry import create_model

MakeNet = Callable[..., PatchConvNet]


def read(path: Path) -> StateDict:
    return without_prefix(read_state_dict(path))


def assert_same(found: StateDict, expected: StateDict) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def prefixed(state: StateDict) -> StateDict:
    return {f"module.{name}": tensor for name, tensor in state.items()}


CONTAINERS: dict[str, Callable[[StateDict], Any]] = {
    "flat": lambda state: state,
    "model": lambda state: {"model": state, "epoch": 3, "lr": 0.1},
    "state_dict": lambda state: {"state_dict": state, "scaler": {"scale": 2.0}},
    "model_ema": lambda state: {"model_ema": state},
    "module prefix": prefixed,
    "model with module prefix": lambda state: {"model": prefixed(state)},
    "model before model_ema": lambda state: {"model_ema": {"norm.bias": torch.zeros(1)}, "model": state},
    "argparse.Namespace beside": lambda state: {"model": state, "args": argparse.Namespace(lr=3e-3, model="S60")},
}


@pytest.mark.parametrize("container", CONTAINERS)
def test_every_container_is_unwrapped(tmp_path: Path, make_net: MakeNet, container: str) -> None:
    state = make_net().state_dict()
    torch.save(CONTAINERS[container](state), tmp_path / "net.pth")
    assert_same(read(tmp_path / "net.pth"), state)


def test_safetensors(tmp_path: Path, make_net: MakeNet) -> None:
    state = make_net().state_dict()
    save_file(state, tmp_path / "net.safetensors")
    assert_same(read(tmp_path / "net.safetensors"), state)
    save_file(prefixed(state), tmp_path / "wrapped.safetensors")
    assert_same(read(tmp_path / "wrapped.safetensors"), state)
    (tmp_path / "net.safetensors").rename(tmp_path / "net.pth")
    assert_same(read(tmp_path / "net.pth"), state)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_become_float32(tmp_path: Path, make_net: MakeNet, dtype: torch.dtype) -> None:
    state = {name: tensor.to(dtype) for name, tensor in make_net().state_dict().items()}
    torch.save(state, tmp_path / "net.pth")
    loaded = create_model("patchconvnet", weights=tmp_path / "net.pth").state_dict()
    assert_same(loaded, {name: tensor.float() for name, tensor in state.items()})
    assert {tensor.dtype for tensor in loaded.values()} == {torch.float32}


def test_wrong_keys_are_listed_by_kind(make_net: MakeNet) -> None:
    net = make_net()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    state = {name: torch.zeros_like(tensor) for name, tensor in before.items()}
    del state["norm.bias"]
    state["pos_embed"] = torch.zeros(1)
    state["head.weight"] = torch.zeros(9, 32)
    with pytest.raises(CheckpointError) as caught:
        load_strict(net, state, "my.pth")
    assert str(caught.value).splitlines()[:-1] == [
        "my.pth does not fit this network:",
        "  1 missing: norm.bias",
        "  1 extra: pos_embed",
        "  1 misshapen: head.weight (9, 32) instead of (10, 32)",
    ]
    assert_same(net.state_dict(), before)


def test_a_long_list_of_keys_is_shortened_and_counted(make_net: MakeNet) -> None:
    with pytest.raises(CheckpointError, match=r"32 extra: x00, x01, .*x19 and 12 more"):
        load_strict(make_net(), make_net().state_dict() | {f"x{i:02}": torch.zeros(1) for i in range(32)}, "origin")


class Payload:
    """A pickle that makes a directory when it is loaded."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_malicious_pickle_is_refused_and_not_executed(tmp_path: Path, zipped: bool) -> None:
    marker, path = tmp_path / "executed", tmp_path / "evil.pth"
    content = {"extra": Payload(marker), "model": {"norm.bias": torch.zeros(3)}}
    if zipped:
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content, protocol=2))
    with pytest.raises(CheckpointError, match=r"refers to .*mkdir.*refused"):
        read_state_dict(path)
    assert not marker.exists()
    torch.load(path, weights_only=False) if zipped else pickle.loads(path.read_bytes())
    assert marker.exists(), "the payload was live"


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.9])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_truncated_file_is_refused(tmp_path: Path, make_net: MakeNet, share: float, suffix: str) -> None:
    path = tmp_path / f"net{suffix}"
    if suffix == ".pth":
        torch.save(make_net().state_dict(), path)
    else:
        save_file(make_net().state_dict(), path)
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(CheckpointError, match=rf"net\{suffix} is .*again|is corrupt"):
        read_state_dict(path)


def test_a_file_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    for name in ("notes.pth", "notes.safetensors"):
        (tmp_path / name).write_text("these are not the weights you are looking for\n" * 20)
        with pytest.raises(CheckpointError, match=name):
            read_state_dict(tmp_path / name)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.pth", tmp_path):
        with pytest.raises(CheckpointError, match=r"does not exist.*--weights"):
            read_state_dict(path)


@pytest.mark.parametrize("content", [{}, {"epoch": 3}, {"model": {"epoch": 3}}, [torch.zeros(1)], torch.zeros(2)])
def test_a_file_without_named_tensors_is_refused(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "net.pth")
    with pytest.raises(CheckpointError, match="no tensors by name"):
        read_state_dict(tmp_path / "net.pth")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_numbers_are_refused(tmp_path: Path, make_net: MakeNet, value: float) -> None:
    state = make_net().state_dict()
    state["blocks.1.norm1.bias"][3] = value
    torch.save(state, tmp_path / "net.pth")
    with pytest.raises(CheckpointError, match=r"NaN or infinite values in 1 tensors: blocks\.1\.norm1\.bias"):
        read_state_dict(tmp_path / "net.pth")


def official_heads(state: StateDict) -> StateDict:
    """The layout of the official multi-class-token files: one linear layer per class."""
    heads = {f"head.{i}.weight": row[None] for i, row in enumerate(state["head.weight"])}
    heads |= {f"head.{i}.bias": value[None] for i, value in enumerate(state["head.bias"])}
    return {name: tensor for name, tensor in state.items() if not name.startswith("head.")} | heads


def test_official_class_heads_are_stacked_in_numeric_order(tmp_path: Path, make_net: MakeNet) -> None:
    net = make_net(num_classes=12, multi_class_token=True)  # 12: as text, head.10 sorts before head.2
    official = official_heads(net.state_dict())
    assert "head.11.bias" in official
    assert_same(stack_class_heads(official), net.state_dict())
    torch.save(official, tmp_path / "multi.pth")
    loaded = create_model("patchconvnet", weights=tmp_path / "multi.pth")
    images = torch.rand(2, 3, 48, 32)
    assert torch.equal(loaded(images), net(images))


@pytest.mark.parametrize("absent", ["head.3.bias", "head.0.weight", "head.5.weight"])
def test_incomplete_class_heads_are_not_stacked_but_reported(tmp_path: Path, make_net: MakeNet, absent: str) -> None:
    state = official_heads(make_net(num_classes=12, multi_class_token=True).state_dict())
    del state[absent]
    torch.save(state, tmp_path / "multi.pth")
    with pytest.raises(CheckpointError, match=rf"1 tensors are missing: {absent}"):
        create_model("patchconvnet", weights=tmp_path / "multi.pth", num_classes=12)


def test_weights_of_another_family_are_named_so() -> None:
    with pytest.raises(CheckpointError, match=r"not a PatchConvNet \(KeyError: 'cls_token'\).*conv1\.weight"):
        infer_patchconvnet({"conv1.weight": torch.zeros(1)})
    with pytest.raises(CheckpointError, match="not a PatchConvNet"):
        infer_patchconvnet({"cls_token": torch.zeros(1, 1, 8), "head.weight": torch.zeros(3, 8)})


def test_a_flipped_bit_is_found(tmp_path: Path, make_net: MakeNet) -> None:
    path = tmp_path / "w.pth"
    torch.save(make_net().state_dict(), path)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="checksum"):
        read_state_dict(path)


@pytest.mark.parametrize(
    "tensor", [torch.eye(3).to_sparse(), torch.zeros(3, dtype=torch.complex64)], ids=["sparse", "complex"]
)
def test_tensors_that_are_no_plain_numbers_are_refused(tmp_path: Path, tensor: torch.Tensor) -> None:
    torch.save({"weight": tensor}, tmp_path / "w.pth")
    with pytest.raises(CheckpointError):
        read_state_dict(tmp_path / "w.pth")


def test_integers_in_place_of_weights_are_refused(make_net: MakeNet) -> None:
    net = make_net()
    state = net.state_dict() | {"head.bias": torch.zeros(10, dtype=torch.int64)}
    with pytest.raises(CheckpointError, match=r"head\.bias is torch\.int64"):
        load_strict(net, state, "w.pth")


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "backbone.", "module._orig_mod.", "ema.model."])
def test_a_prefix_of_all_keys_is_taken_off(tmp_path: Path, make_net: MakeNet, prefix: str) -> None:
    state = make_net().state_dict()
    torch.save({f"{prefix}{name}": tensor for name, tensor in state.items()}, tmp_path / "w.pth")
    assert_same(create_model("patchconvnet", weights=tmp_path / "w.pth").state_dict(), state)
    own = make_net(2)
    load_strict(own, torch.load(tmp_path / "w.pth"), "w.pth")
    assert_same(own.state_dict(), state)


def test_a_prefix_that_the_network_has_too_stays(make_net: MakeNet) -> None:
    net = torch.nn.Module()
    net.backbone = make_net()
    state = {name: tensor + 1 for name, tensor in net.state_dict().items()}
    load_strict(net, {f"model.{name}": tensor for name, tensor in state.items()}, "w.pth")
    assert_same(net.state_dict(), state)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A file for each of several registered networks, and one of a network beside a loss."""
    folder = tmp_path_factory.mktemp("checkpoints")
    states = {
        name: create_model(name, random_weights=True).state_dict()
        for name in ("mnasnet_075", "aa_mnasnet_075", "resnet34", "aa_resnet50_legacy")
    }
    public = {
        name.replace("attention.conv_qkv", "conv_kqv").replace("attention.", ""): tensor
        for name, tensor in states.pop("aa_resnet50_legacy").items()
    }
    states |= {"public": public, "small": PatchConvNet(width=32, depth=1, num_classes=3).state_dict()}
    inner = {f"model.{name}": tensor for name, tensor in states["mnasnet_075"].items()}
    states["beside"] = {**inner, "loss.weight": torch.ones(3)}
    for name, state in states.items():
        torch.save(state, folder / f"{name}.pth")
    return {name: folder / f"{name}.pth" for name in states}


@pytest.mark.parametrize(
    ("file", "model", "words"),
    [
        ("mnasnet_075", "aa_mnasnet_075", "It fits mnasnet_075: give that as the model."),
        ("aa_mnasnet_075", "mnasnet_075", "It fits aa_mnasnet_075: give that as the model."),
        ("public", "aa_resnet50", "It fits aa_resnet50_legacy: give that as the model."),
        ("resnet34", "patchconvnet", "It fits resnet34: give that as the model."),
        ("small", "resnet34", "It fits patchconvnet: give that as the model."),
        ("beside", "resnet34", "Its 328 tensors under 'model.' fit mnasnet_075: save those only."),
    ],
)
def test_the_right_network_is_named(checkpoints: dict[str, Path], file: str, model: str, words: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        create_model(model, weights=checkpoints[file])
    assert str(caught.value).splitlines()[-1] == words


def test_what_keeps_the_right_network_from_loading(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"instead of \(7,\)\n.*\nIt fits resnet34 as it is: leave --num-classes"):
        create_model("resnet34", weights=checkpoints["resnet34"], num_classes=7)
    torch.save({"conv1.weight": torch.zeros(3), "fc.weight": torch.zeros(2)}, tmp_path / "odd.pth")
    with pytest.raises(CheckpointError) as caught:
        create_model("resnet34", weights=tmp_path / "odd.pth")
    assert "fits" not in str(caught.value)


@pytest.mark.parametrize("batches", [7.0, float("inf")])
def test_counters_of_a_halved_checkpoint(tmp_path: Path, batches: float) -> None:
    """What halves every tensor halves the counters of BatchNorm too; above 65504 batches they are infinite then."""
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4))
    state = {name: tensor.half() for name, tensor in net.state_dict().items()}
    state["1.num_batches_tracked"] = torch.tensor(batches).half()
    torch.save(state, tmp_path / "half.pth")
    load_strict(net, read_state_dict(tmp_path / "half.pth"), "half.pth")
    loaded = net.state_dict()
    assert torch.equal(loaded["1.num_batches_tracked"], torch.tensor(7 if batches == 7.0 else 0))
    assert torch.equal(loaded["1.running_var"], state["1.running_var"].float())


def test_a_prefix_that_only_some_keys_have_is_part_of_their_name(tmp_path: Path) -> None:
    state = {"module.weight": torch.zeros(2), "bias": torch.zeros(2)}
    torch.save(state, tmp_path / "w.pth")
    assert_same(read(tmp_path / "w.pth"), state)


def test_a_stray_block_is_named(make_net: MakeNet) -> None:
    state = make_net().state_dict() | {"blocks.99999.gamma_1": torch.zeros(32)}
    with pytest.raises(CheckpointError, match="numbered up to 99999"):
        infer_patchconvnet(state)


def test_official_heads_of_one_class_mean_a_class_token(tmp_path: Path, make_net: MakeNet) -> None:
    net = make_net(num_classes=1, multi_class_token=True)
    torch.save(official_heads(net.state_dict()), tmp_path / "w.pth")
    loaded = create_model("patchconvnet", weights=tmp_path / "w.pth")
    assert isinstance(loaded, PatchConvNet)
    assert loaded.multi_class_token
