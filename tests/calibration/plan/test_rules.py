"""The precision plan: each rule with its reason, and the placement for a PatchConvNet."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch

from pcn_deploy.calibration.plan.facts import inspect_layers
from pcn_deploy.calibration.plan.rules import REMAINDERS, LayerFacts, PrecisionPlan, make_plan
from pcn_deploy.errors import ModelError, OptionError
from pcn_deploy.models.patchconvnet import PatchConvNet
from pcn_deploy.network.deploy import to_deploy

MakeNet = Callable[..., PatchConvNet]
DENSE = {"kind": "Conv2d", "rows": 196, "in_channels": 64, "out_channels": 64}


def facts(path: str = "layer", **changes: Any) -> LayerFacts:
    return LayerFacts(path=path, **{**DENSE, **changes})


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, ""),
        ({"rows": 2, "out_channels": 16, "in_channels": 16}, ""),
        ({"in_channels": 3, "out_channels": 24, "kernel": (3, 3), "reads_image": True}, ""),
        ({"kind": "GELU", "in_channels": 0, "out_channels": 0}, "not a Conv2d or Linear"),
        ({"groups": 64}, "depthwise"),
        ({"groups": 2}, "grouped"),
        ({"groups": 2, "kernel": (3, 1)}, "grouped"),
        ({"groups": 4, "kernel": (3, 3), "out_channels": 68}, "grouped"),
        ({"rows": 1}, "matrix times vector"),
        ({"out_channels": 1}, "matrix times vector"),
        ({"in_channels": 15}, "fewer than 16 channels"),
        ({"out_channels": 8}, "fewer than 16 channels"),
        ({"in_channels": 3, "out_channels": 24, "kernel": (3, 3)}, "fewer than 16 channels"),
        ({"in_channels": 3, "out_channels": 20, "kernel": (3, 3), "reads_image": True}, "fewer than 16 channels"),
        ({"in_channels": 3, "out_channels": 24, "kernel": (1, 3), "reads_image": True}, "fewer than 16 channels"),
    ],
)
@pytest.mark.parametrize("remainder", ["fp16", "fp32"])
def test_every_rule_gives_its_reason(changes: dict[str, Any], reason: str, remainder: str) -> None:
    _, entry = make_plan([facts("other"), facts("layer", **changes)], "int8", remainder).entries
    assert entry.op == "layer"
    assert entry.precision == (remainder if reason else "int8")
    assert entry.reason.startswith(reason or "dense product")


@pytest.mark.parametrize(("form", "rows"), [({}, 0), ({"multi_class_token": True, "num_classes": 20}, 3)])
def test_placement_for_a_patchconvnet(make_net: MakeNet, form: dict[str, Any], rows: int) -> None:
    net, _ = to_deploy(make_net(width=64, depth=2, **form), torch.rand(1, 3, 64, 64))
    plan = make_plan(inspect_layers(net, torch.zeros(1, 3, 64, 64)), "int8")
    pointwise = {f"blocks.{block}.attn.qkv_pos.{layer}" for block in (0, 1) for layer in (0, 5)}
    tokens = {f"blocks_token_only.0.{layer}" for layer in ("attn.value", "mlp.fc1", "mlp.fc2")} if rows else set()
    # stem: 3 -> 8 (reads the image) -> 16 (8 channels in) -> 32 -> 64
    assert set(plan.quantized_entries) == {f"patch_embed.proj.{i}.0" for i in (0, 4, 6)} | pointwise | tokens
    reasons = {entry.op: entry.reason.split(":")[0] for entry in plan.entries if entry.precision == "fp16"}
    assert reasons["patch_embed.proj.2.0"] == "fewer than 16 channels"
    assert reasons["blocks.1.attn.qkv_pos.2"] == "depthwise"
    assert reasons["blocks.1.attn.qkv_pos.4.conv_expand"] == "matrix times vector"
    assert reasons["blocks.1.norm1"] == reasons["blocks.1.attn.qkv_pos.1"] == "not a Conv2d or Linear"
    if not rows:
        assert reasons["head"] == reasons["blocks_token_only.0.mlp.fc1"] == "matrix times vector"


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_other_precisions_hold_for_every_layer(precision: str) -> None:
    plan = make_plan([facts("a"), facts("b", groups=64)], precision, "fp32")
    assert [(entry.op, entry.precision, entry.reason) for entry in plan.entries] == [
        ("a", precision, "as asked for"),
        ("b", precision, "as asked for"),
    ]
    assert plan.remainder == precision
    assert plan.quantized_entries == {}
    assert plan.with_ranges({}) == plan


@pytest.mark.parametrize("remainder", ["fp16", "fp32"])
def test_ranges_are_filled_in_and_a_zero_range_falls_back(remainder: str) -> None:
    plan = make_plan([facts("a"), facts("b"), facts("c", groups=64)], "int8", remainder)
    ranged = plan.with_ranges({"a": 2.5, "b": 0.0})
    assert [(entry.op, entry.precision, entry.input_amax) for entry in ranged.entries] == [
        ("a", "int8", 2.5),
        ("b", remainder, None),
        ("c", remainder, None),
    ]
    assert "all zero" in ranged.entries[1].reason
    assert all(entry.input_amax is None for entry in plan.entries), "the plan given is left as it is"


def test_json_round_trip() -> None:
    plan = make_plan([facts("a"), facts("b", rows=1)], "int8", "fp32").with_ranges({"a": 0.1})
    assert PrecisionPlan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


def test_summary_counts_layers_that_share_a_reason() -> None:
    plan = make_plan([facts("a", groups=64), facts("b"), facts("c"), facts("d")], "int8")
    assert plan.summary() == [
        ("int8", "Conv2d", "dense product of enough rows and channels", 3),
        ("fp16", "Conv2d", "depthwise: little gain, and conversions on both sides", 1),
    ]


def test_unknown_precisions_are_refused() -> None:
    for precision, remainder in (("int4", "fp16"), ("int8", "bf16")):
        with pytest.raises(OptionError, match=f"'{precision}' with remainder '{remainder}'"):
            make_plan([facts()], precision, remainder)


def test_a_network_that_gains_nothing_is_refused() -> None:
    for remainder in REMAINDERS:
        words = f"No layer of this network gains from INT8 .* Build it with --precision {remainder}"
        with pytest.raises(ModelError, match=words):
            make_plan([facts(groups=64)], "int8", remainder)
