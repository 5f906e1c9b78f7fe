"""Reading weights: containers, safety, strictness.

Pickles are read with `weights_only=True` only. Which of the weights in a file are taken is decided in `containers.py`.
"""

from __future__ import annotations

import argparse
import logging
import pickle
import re
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pcn_deploy.data.classes import names_in_checkpoint
from pcn_deploy.errors import CheckpointError
from pcn_deploy.models.containers import AUTO, CONTAINERS, StateDict, Taken, choose_weights
from pcn_deploy.models.wrappers import unwrapped

log = logging.getLogger(__name__)

COUNTER = ".num_batches_tracked"
"""Of batches that a BatchNorm saw in training: nothing reads it in evaluation, and a file halved as a whole has it in
float16, where it may have become infinite."""

_SHOWN = 20


def read_checkpoint(path: Path, which: str = AUTO) -> Taken:
    """Read a `.safetensors` file or a PyTorch checkpoint without executing anything in it.

    Args:
        path: The file.
        which: Which weights to take where there are several, one of `containers.CHOICES`.

    Returns:
        Tensors by name, on the CPU, the container removed, and which they are.

    Raises:
        CheckpointError: If the file is missing, corrupt, holds other objects than tensors and plain values,
            holds no tensors or none of the kind asked for, or holds NaN or infinite values.
    """
    _check_exists(path)
    taken = _unwrap(_read_safetensors(path) if _is_safetensors(path) else _read_pickle(path), path, which)
    check_finite(taken.state, str(path))
    return taken


def _check_exists(path: Path) -> None:
    if not path.is_file():
        msg = f"Weights file {str(path)!r} does not exist. Check the path given to --weights."
        raise CheckpointError(msg)


def read_state_dict(path: Path) -> StateDict:
    """The weights that `read_checkpoint` takes by default."""
    return read_checkpoint(path).state


def check_finite(state: StateDict, origin: str) -> None:
    """Refuse weights that are not numbers.

    Raises:
        CheckpointError: If a tensor holds NaN or infinity, or is sparse, quantised or complex; the names are in the
            message.
    """
    state = {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}  # not what a module adds
    odd = [f"{name} ({tensor.dtype}, {tensor.layout})" for name, tensor in state.items() if not _is_plain(tensor)]
    if odd:
        msg = f"{origin} holds tensors that are not plain numbers: {listed(odd)}. Export dense, unquantised weights."
        raise CheckpointError(msg)
    floats = {name: value for name, value in state.items() if value.is_floating_point() and not name.endswith(COUNTER)}
    broken = [name for name, tensor in floats.items() if not _is_finite(tensor.float())]
    if broken:
        msg = f"{origin} holds NaN or infinite values in {len(broken)} tensors: {listed(broken)}. Export it again."
        raise CheckpointError(msg)


def _is_finite(tensor: Tensor) -> bool:
    """Whether a tensor holds numbers; a mask of attention, which is 0 or infinite everywhere, does."""
    finite = tensor.isfinite()
    return bool(finite.all() or (not tensor.isnan().any() and (tensor[finite] == 0).all() and finite.any()))


def _is_plain(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided and not tensor.is_quantized and not tensor.is_complex()


def _is_safetensors(path: Path) -> bool:
    """By its name, or by how it begins: the length of a header in JSON, and the header."""
    with path.open("rb") as file:
        length, opening = file.read(8), file.read(1)
    return path.suffix == ".safetensors" or (opening == b"{" and int.from_bytes(length, "little") < path.stat().st_size)


def _read_safetensors(path: Path) -> dict[str, Any]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return dict(load_file(path))
    except (SafetensorError, OSError, ValueError) as error:
        msg = f"{path} is not a readable safetensors file ({error}). Download or export it again."
        raise CheckpointError(msg) from error


def read_training_arguments(path: Path) -> dict[str, Any]:
    """The arguments of the training script, which timm, DeiT and torchvision's references keep under `args`.

    Args:
        path: A checkpoint; its tensors are not read.

    Returns:
        Plain values by name; empty where the file holds none.

    Raises:
        CheckpointError: If the file is missing, corrupt, or holds other objects than tensors and plain values.
    """
    _check_exists(path)
    if _is_safetensors(path):
        return {}
    content = _unpickle(path, mapped=zipfile.is_zipfile(path))
    arguments = content.get("args") if isinstance(content, dict) else None
    if isinstance(arguments, argparse.Namespace):
        arguments = vars(arguments)
    return dict(arguments) if isinstance(arguments, dict) else {}


def _read_pickle(path: Path) -> Any:
    _check_archive(path)
    return _unpickle(path)


def _unpickle(path: Path, *, mapped: bool = False) -> Any:
    try:
        # Training scripts of the DeiT family store their argparse.Namespace beside the weights; it is plain data.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        match = re.search(r"GLOBAL (\S+)", str(error))
        named = f" (it refers to {match.group(1)})" if match else ""
        msg = (
            f"{path} is corrupt, or holds objects other than tensors{named}. Loading it could run foreign code, "
            "so it is refused. Save the plain state dict instead: torch.save(model.state_dict(), path), "
            "or convert it to .safetensors where you trust it."
        )
        raise CheckpointError(msg) from error
    except Exception as error:  # a corrupt pickle fails with whatever its random instructions run into
        msg = f"{path} is not a readable PyTorch checkpoint ({type(error).__name__}). Download or save it again."
        raise CheckpointError(msg) from error


def _check_archive(path: Path) -> None:
    """PyTorch does not compare the checksums that its ZIP files carry; a flipped bit would become a weight."""
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, OSError, RuntimeError, NotImplementedError, EOFError) as error:
        msg = f"{path} is not a readable PyTorch checkpoint ({error}). Download or save it again."
        raise CheckpointError(msg) from error
    if damaged is not None:
        msg = f"{path} is corrupt: the checksum of {damaged} is wrong. Download or save it again."
        raise CheckpointError(msg)


def _unwrap(content: Any, path: Path, which: str) -> Taken:
    taken = choose_weights(content, str(path), which) if isinstance(content, dict) else None
    if taken is None:
        there = f" It has the keys {listed(map(repr, content))}." if isinstance(content, dict) and content else ""
        msg = (
            f"{path} holds no tensors by name. Expected a state dict, flat or under one of {', '.join(CONTAINERS)}."
            f"{there} Save it as torch.save(model.state_dict(), path)."
        )
        raise CheckpointError(msg)
    return replace(taken, class_names=names_in_checkpoint(content))


def without_prefix(state: StateDict, expected: Iterable[str] = ()) -> StateDict:
    """Take off what all keys begin with and what is expected does not.

    Such are `module.` (DataParallel), `_orig_mod.` (torch.compile), `model.` and `backbone.` (a network in another).
    The counter of an `AveragedModel` goes too.

    Args:
        state: Tensors by name.
        expected: Names that the network has.

    Returns:
        The same tensors; strict loading then judges whether they fit.
    """
    expected = tuple(expected)
    if "n_averaged" not in expected:
        state = {name: value for name, value in state.items() if name != "n_averaged" or value.numel() > 1}
    while len(state) > 1 and len(heads := {name.partition(".")[0] for name in state}) == 1:
        prefix = f"{heads.pop()}."
        if not all(name.startswith(prefix) for name in state) or any(name.startswith(prefix) for name in expected):
            break
        log.info("All tensors of the checkpoint are under %r: taken off.", prefix)
        state = {name.removeprefix(prefix): value for name, value in state.items()}
    return state


def inner_states(state: StateDict) -> Iterator[tuple[str, StateDict]]:
    """The part of a checkpoint under the first word that most of its names have, with that word; if there is one."""
    heads = Counter(key.partition(".")[0] for key in state)
    for head, count in heads.most_common(1):
        if 2 * count > len(state):
            prefix = f"{head}."
            yield head, {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def load_strict(model: nn.Module, state: StateDict, origin: str) -> None:
    """Load a state dict whose keys and shapes must match exactly; weights become float32.

    Args:
        model: Network to fill; it may be on the meta device.
        state: Tensors by name.
        origin: Where the weights come from, for the message.

    Raises:
        CheckpointError: If a key is missing, extra or misshapen; all three lists are in the message.
    """
    model = unwrapped(model)
    state = _with_counters(model, named_as(model, state))
    full = {key: value.float() if value.is_floating_point() else value for key, value in state.items()}
    mismatches = differences(model, state)
    if mismatches and not any("misshapen" in line for line in mismatches):
        with suppress(RuntimeError):  # the network may have hooks that take other names
            _load(model, full)
            return
    if mismatches:
        lines = [f"{origin} does not fit this network:", *(f"  {line}" for line in mismatches)]
        lines.append("Check the model name, --num-classes and that the file belongs to this architecture.")
        raise CheckpointError("\n".join(lines))
    _load(model, full)


def _load(model: nn.Module, state: StateDict) -> None:
    """Copy into the tensors that are there, which a network may know by other names too; assign where they are none."""
    model.load_state_dict(state, strict=True, assign=any(parameter.is_meta for parameter in model.parameters()))


def named_as(model: nn.Module, state: StateDict) -> StateDict:
    """A state dict under the names that a network has, where they differ by what all of them begin with.

    A weight that the network has under several names may be in the file under one of them, as safetensors saves it.
    """
    expected = list(model.state_dict())
    state = without_prefix(state, expected)
    prefix = ""
    while expected and all("." in name.removeprefix(prefix) for name in expected):
        heads = {name.removeprefix(prefix).partition(".")[0] for name in expected}
        if len(heads) > 1:
            break
        prefix += f"{heads.pop()}."
        if {prefix + name for name in state} == set(expected):
            state = {prefix + name: value for name, value in state.items()}
    twins: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        twins.setdefault(id(parameter), []).append(name)
    for names in twins.values():
        there = next((state[name] for name in names if name in state), None)
        if there is not None:
            state = {**dict.fromkeys(names, there), **state} if any(name not in state for name in names) else state
    return state


def differences(model: nn.Module, state: StateDict) -> list[str]:
    """In what a state dict differs from that of a network: nothing, or a line for each of missing, extra, misshapen."""
    state = _with_counters(model, state)
    expected = model.state_dict()
    missing = sorted(expected.keys() - state.keys())
    extra = sorted(state.keys() - expected.keys())
    both = [(name, state[name], tensor) for name, tensor in expected.items() if name in state]
    misshapen = [
        f"{name} {tuple(value.shape)} instead of {tuple(tensor.shape)}"
        for name, value, tensor in both
        if value.shape != tensor.shape
    ]
    misshapen += [
        f"{name} is {value.dtype} instead of {tensor.dtype}"
        for name, value, tensor in both
        if value.is_floating_point() != tensor.is_floating_point()
    ]
    kinds = (("missing", missing), ("extra", extra), ("misshapen", misshapen))
    return [f"{len(names)} {kind}: {listed(names)}" for kind, names in kinds if names]


def _with_counters(model: nn.Module, state: StateDict) -> StateDict:
    """Whole numbers for the counters of batches: files older than PyTorch 0.4.1 lack them."""
    counters = {name for name in model.state_dict() if name.endswith(COUNTER)}
    lacking = {name: torch.zeros((), dtype=torch.long) for name in counters}
    return lacking | {
        name: value.nan_to_num(0.0, 0.0, 0.0).long() if name in counters and value.is_floating_point() else value
        for name, value in state.items()
    }


def listed(names: Iterable[str]) -> str:
    """The first names, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
