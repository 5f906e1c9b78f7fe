"""A calibration kept in a file, and what must be equal before it is used again.

`FILE.json` is written when it is absent and read when it is there. It holds for the very weights, images and transform
it was made with, and is refused for others.
"""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import suppress
from pathlib import Path

import torch
from torch import nn

from pcn_deploy.calibration.record import Calibration, from_json
from pcn_deploy.data.images import ImageSource
from pcn_deploy.errors import DataError, OutputError


def digest_weights(model: nn.Module) -> str:
    """SHA-256 over the names, shapes, types and bytes of all parameters and buffers, as hexadecimal text."""
    tensors: dict[str, torch.Tensor] = dict(model.named_buffers(remove_duplicate=False))
    tensors.update(model.named_parameters(remove_duplicate=False))
    sha = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        sha.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        sha.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


def write_cache(path: Path, calibration: Calibration) -> None:
    """Write a `.json` at once or not at all.

    Raises:
        OutputError: If it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            json.dump(calibration.to_json(), file, indent=1, allow_nan=False)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        msg = f"The calibration cache {path} cannot be written: {error.strerror or error}. Give another path."
        raise OutputError(msg) from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def open_cache(text: bytes, where: str, layers: list[str], weights_sha256: str, source: ImageSource) -> Calibration:
    """Parse a kept calibration and check all that is known before the images are read.

    Raises:
        DataError: If it is malformed, or was made with other weights, another transform, another number of images or
            without some of the layers; everything that differs is named.
    """
    kept = from_json(text, where)
    missing = [path for path in layers if path not in kept.statistics]
    differences = []
    if kept.weights_sha256 != weights_sha256:
        differences.append(f"weights {weights_sha256[:12]}… instead of {kept.weights_sha256[:12]}…")
    mine, theirs = source.transform.to_json(), kept.transform.to_json()
    differences += [f"{key} {mine[key]} instead of {theirs[key]}" for key in mine if mine[key] != theirs[key]]
    if kept.images + kept.unreadable != len(source):
        differences.append(f"{len(source)} images instead of {kept.images + kept.unreadable}")
    if missing:
        differences.append(f"{len(missing)} layers that were not observed, such as {missing[0]}")
    if differences:
        raise _other(where, differences)
    return kept


def check_images(kept: Calibration, where: str, source: ImageSource) -> None:
    """Check the images that were read.

    Raises:
        DataError: If they are others, or in another order.
    """
    images = len(source) - len(source.unreadable)
    if (kept.dataset_sha256, kept.images) != (source.digest, images):
        difference = f"images {source.digest[:12]}… ({images} readable) instead of {kept.dataset_sha256[:12]}…"
        raise _other(where, [f"{difference} ({kept.images} readable, from {kept.source})"])


def _other(where: str, differences: list[str]) -> DataError:
    return DataError(
        f"{where} was made for something else: this run has {'; '.join(differences)}. "
        "Its ranges would be wrong here. Delete it, or name another cache, to calibrate again."
    )
