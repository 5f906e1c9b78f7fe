"""The layouts of weights that each family accepts: keys renamed or stacked, and the shape of the network read off them.

A reader takes a state dict and returns it in our layout, with the arguments of the network that it tells.
"""

from __future__ import annotations

import re
from typing import Any

import torch

from pcn_deploy.errors import CheckpointError
from pcn_deploy.models.checkpoint import listed
from pcn_deploy.models.containers import StateDict

Read = tuple[StateDict, dict[str, Any]]


def read_patchconvnet(state: StateDict) -> Read:
    """The official layout of PatchConvNet, one head per class or one for all."""
    per_class = {"multi_class_token": True} if has_class_heads(state) else {}
    state = stack_class_heads(state)
    return state, {**infer_patchconvnet(state), **per_class}


def read_resnet(state: StateDict) -> Read:
    """Torchvision's layout of ResNet, and ours, which has it too."""
    return state, {**_ends(state, "conv1.weight", "fc.weight"), **_image_size(state, r"layer3\.\d+\.", 16)}


def read_legacy_aa_resnet(state: StateDict) -> Read:
    """The layout of the public AA-ResNet-50 (d-li14/dot-product-attention): `conv2.conv_kqv` and its neighbours."""
    names = {"conv_kqv": "attention.conv_qkv", "attn_out": "attention.attn_out"}
    names |= {table: f"attention.{table}" for table in ("key_rel_h", "key_rel_w")}
    pattern = re.compile(rf"(\.conv2)\.({'|'.join(names)})\b")
    return read_resnet({pattern.sub(lambda m: f"{m[1]}.{names[m[2]]}", key): value for key, value in state.items()})


def read_wide_resnet(state: StateDict) -> Read:
    """Our layout of wide ResNets."""
    return state, {**_ends(state, "conv1.weight", "fc.weight"), **_image_size(state, r"layer1\.\d+\.", 1)}


def read_mnasnet(state: StateDict) -> Read:
    """Timm's layout of MnasNet-A1, and ours, which extends it."""
    return state, {**_ends(state, "conv_stem.weight", "classifier.weight"), **_image_size(state, r"blocks\.2\.0\.", 8)}


def _ends(state: StateDict, first: str, last: str) -> dict[str, Any]:
    """Channels of the image and number of logits; nothing for a file that is not of this family (loading says so)."""
    if first not in state or last not in state or state[first].ndim < 2 or not state[last].ndim:
        return {}
    return {"in_channels": state[first].shape[1], "num_classes": state[last].shape[0]}


def _image_size(state: StateDict, block: str, reduction: int) -> dict[str, Any]:
    """Side of the images that the tables of relative positions were made for, if there are any.

    `block` is one with the largest tables, `reduction` the side of an image over the side of its attended map: the
    sides of smaller maps then follow also for images that are no multiple of 32 pixels.
    """
    for key, table in state.items():
        if re.match(block, key) and key.endswith("attention.key_rel_h") and table.ndim:
            return {"image_size": reduction * (table.shape[0] + 1) // 2}
    return {}


def has_class_heads(state: StateDict) -> bool:
    """Whether the weights are those of the official multi-class-token form, with one head per class."""
    return any(re.fullmatch(r"head\.\d+\.(weight|bias)", key) for key in state)


def stack_class_heads(state: StateDict) -> StateDict:
    """Stack the official multi-class-token heads `head.<i>.weight (1, C)` into one `head.weight (classes, C)`.

    Raises:
        CheckpointError: If the head of a class is missing.
    """
    if not has_class_heads(state):
        return state
    heads = range(1 + max(int(key.split(".")[1]) for key in state if re.fullmatch(r"head\.\d+\.(weight|bias)", key)))
    wanted = [f"head.{index}.{kind}" for index in heads for kind in ("weight", "bias")]
    missing = [name for name in wanted if name not in state]
    if missing:
        msg = f"The weights hold one head per class, but {len(missing)} tensors are missing: {listed(missing)}."
        raise CheckpointError(msg)
    stacked = {key: value for key, value in state.items() if not re.fullmatch(r"head\.\d+\.(weight|bias)", key)}
    stacked["head.weight"] = torch.cat([state[f"head.{index}.weight"] for index in heads])
    stacked["head.bias"] = torch.cat([state[f"head.{index}.bias"] for index in heads])
    return stacked


def infer_patchconvnet(state: StateDict) -> dict[str, Any]:
    """Read the arguments of `PatchConvNet` off the keys and shapes of its state dict (heads stacked).

    Raises:
        CheckpointError: If a key that decides the shape is absent: this is not a PatchConvNet.
    """
    try:
        width = state["cls_token"].shape[-1]
        stem = [key for key in state if re.fullmatch(r"patch_embed\.proj\.\d+\.0\.weight", key)]
        blocks = {int(match.group(1)) for key in state if (match := re.match(r"blocks\.(\d+)\.", key))}
        depth = 1 + max(blocks)
        if len(blocks) != depth:
            msg = f"The weights hold {len(blocks)} trunk blocks, numbered up to {max(blocks)}: some are missing."
            raise CheckpointError(msg)
        return {
            "width": width,
            "depth": depth,
            "patch": 2 ** len(stem),
            "num_classes": state["head.weight"].shape[0],
            "in_channels": state["patch_embed.proj.0.0.weight"].shape[1],
            "mlp_ratio": state["blocks_token_only.0.mlp.fc1.weight"].shape[0] / width,
            "multi_class_token": state["cls_token"].shape[1] > 1,
        }
    except (KeyError, ValueError, IndexError) as error:
        msg = (
            f"The weights are not a PatchConvNet ({type(error).__name__}: {error}). Found {listed(sorted(state))}. "
            "Check the model name and the file."
        )
        raise CheckpointError(msg) from error
