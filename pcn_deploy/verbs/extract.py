"""The verb `extract`: one engine of a bundle as a plain file, and what its user must know as JSON. No torch."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pcn_deploy.artefact.bundle import Bundle
from pcn_deploy.artefact.manifest import EngineEntry
from pcn_deploy.data.transform import Transform
from pcn_deploy.engines.registry import get_backend
from pcn_deploy.errors import OutputError
from pcn_deploy.output_file import check_output, replacing
from pcn_deploy.specs import TensorSpec

SCHEMA = 1
"""Version of the JSON; a reader refuses what it does not know."""

_COMMON_CHANNELS = (1, 3)
"""Of image files; other inputs come from arrays."""


@dataclass(frozen=True, kw_only=True)
class Extracted:
    """What was written.

    Attributes:
        plan: The engine, byte for byte as it lies in the bundle.
        description: The JSON beside it.
        content: What the JSON holds.
    """

    plan: Path
    description: Path
    content: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """What the JSON holds, and where the files are."""
        return {**self.content, "written": [str(self.plan), str(self.description)]}


def extract(path: str | Path, target: str, output: str | Path, *, overwrite: bool = False) -> Extracted:
    """Write an engine of a bundle to a file, and beside it `<output>.json`.

    Args:
        path: The bundle.
        target: Which of its engines.
        output: The file to write: a plan, an ONNX graph or a TorchScript module, as the target has it.
        overwrite: Replace files that exist.

    Returns:
        What was written.

    Raises:
        BundleError: If the bundle is corrupt, altered, of a newer schema, or holds no such engine.
        OptionError: If the target is unknown.
        OutputError: If a file exists and may not be replaced, is the bundle itself, or cannot be written.
    """
    bundle, plan = Bundle.open(path), Path(output)
    entry = bundle.engine(target)
    description = plan.with_name(f"{plan.name}.json")
    for written in (plan, description):
        check_output(written, overwrite=overwrite, example="model.plan")
        if written.exists() and written.samefile(path):
            msg = f"{written} is the bundle itself. Choose another path with -o."
            raise OutputError(msg)
    text = json.dumps(describe_plan(bundle, entry, plan.name), indent=2, allow_nan=False) + "\n"
    with replacing(plan) as file:
        file.write(bundle.read(entry.member))
    with replacing(description) as file:
        file.write(text.encode())
    return Extracted(plan=plan, description=description, content=json.loads(text))


def describe_plan(bundle: Bundle, entry: EngineEntry, name: str) -> dict[str, Any]:
    """What a program must know to use an engine without this library, as plain values.

    Args:
        bundle: Holds the engine.
        entry: The engine.
        name: What its file is called.
    """
    manifest = bundle.manifest
    built = entry.built_with
    library = (built["flavour"], built["version"]) if "flavour" in built else next(iter(built.items()), ("", ""))
    capabilities = built.get("compute_capabilities", "")
    return {
        "schema": SCHEMA,
        "file": name,
        "sha256": entry.sha256,
        "bytes": entry.bytes,
        "model": manifest.model,
        "target": entry.target,
        "runs_with": get_backend(entry.target).runs_with,
        "library": dict(zip(("name", "version"), library, strict=True)),
        "compute_capabilities": capabilities.split(", ") if capabilities else [],
        "precision": manifest.precision,
        "remainder": manifest.remainder,
        "batch": asdict(manifest.interface.batch),
        "inputs": [_tensor(tensor) for tensor in manifest.interface.inputs],
        "outputs": [_tensor(tensor) for tensor in manifest.interface.outputs],
        "preprocessing": preprocessing(manifest.transform),
        "class_names": list(manifest.class_names),
        "built_with": built,
    }


def _tensor(tensor: TensorSpec) -> dict[str, Any]:
    """Name, type, shape with -1 for the batch, role and names of the axes."""
    return {**asdict(tensor), "shape": [-1 if isinstance(dim, str) else dim for dim in tensor.shape]}


def preprocessing(transform: Transform) -> dict[str, Any]:
    """A transform written out: its values, and each step as a sentence that can be followed without this library."""
    values = transform.to_json()
    height, width = values.pop("resolution")
    wide, high = int(width / transform.crop_pct), int(height / transform.crop_pct)
    return {
        "layout": "NCHW",
        "dtype": "float32",
        "height": height,
        "width": width,
        "channels": len(transform.mean),
        "resize_to": {"height": high, "width": wide},
        **values,
        "steps": [*_to_pixels(transform), *_to_size(transform, wide, high), *_to_numbers(transform)],
    }


def _to_pixels(transform: Transform) -> list[str]:
    channels = len(transform.mean)
    if channels not in _COMMON_CHANNELS:
        return [f"Take pixels of 8 bits as an array (height, width, {channels})."]
    exif = "Turn and mirror the image as its EXIF orientation says."
    alpha = f"Lay transparent pixels over {transform.alpha}."
    return [
        *([exif] if transform.exif == "apply" else ["Do not apply an EXIF orientation."]),
        f"Scale values of more than 8 bits by 255 / {transform.white or 65535:g} and round them to the nearest.",
        *([alpha] if transform.alpha != "drop" else ["Drop an alpha channel; do not blend it."]),
        "Convert the image to RGB of 8 bits." if channels == 3 else "Convert the image to grey of 8 bits.",
    ]


def _to_size(transform: Transform, wide: int, high: int) -> list[str]:
    height, width = transform.resolution
    method = f"by {transform.interpolation} interpolation with antialiasing, as Pillow's Image.resize does"
    if transform.crop_mode == "squash":
        rule = f"Resize the image to {wide} x {high} (width x height) without regard to its proportions, {method}."
    elif transform.crop_mode == "border":
        rule = (
            f"Resize the image of w x h pixels (width x height), {method}, to max(1, round(w / r)) x "
            f"max(1, round(h / r)), where r = max(w / {wide}, h / {high}) and a half is rounded to the even number. "
            f"Where that is smaller than {width} x {height}, lay it on the mean colour, round(255 mean) of each "
            "channel: floor(missing columns / 2) of them to its left, floor(missing rows / 2) above."
        )
    else:
        rule = (
            f"Resize the image of w x h pixels (width x height), {method}: if {high} w >= {wide} h, to "
            f"max({width}, floor({high} w / h)) x {high}, else to {wide} x max({height}, floor({wide} h / w)). "
            "Leave an image that has this size as it is."
        )
    return [
        rule,
        f"Cut out {width} x {height} pixels, the first column being round((width - {width}) / 2) and the first row "
        f"round((height - {height}) / 2), where a half is rounded to the even number.",
    ]


def _to_numbers(transform: Transform) -> list[str]:
    order = ["Reverse the channels from RGB to BGR."] if transform.channel_order == "bgr" else []
    return [
        *order,
        "Divide by 255 in float32.",
        "Subtract mean and divide by std, channel by channel.",
        f"Order the axes as (N, C, H, W): (N, {', '.join(map(str, transform.shape))}).",
    ]
