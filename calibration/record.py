"""What a calibration saw, and its JSON form: `calibration.json` and the calibration cache. No torch.

Histograms are kept, so that another calibrator needs no new pass. Everything that is read is checked: a file that was
cut off, edited or made by something else is refused in words.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from pcn_deploy.calibration.calibrators import get_calibrator
from pcn_deploy.calibration.statistics import BINS, Statistics, bin_width
from pcn_deploy.data.transform import Transform
from pcn_deploy.errors import DataError, OptionError

FORMAT = "pcn-deploy calibration 1"
_MOST = 2**50
"""Largest count that is believed: sums over all bins stay within 63 bits."""

_KINDS: dict[str, tuple[type, ...]] = {
    "calibrator": (str,),
    "percentile": (float, int, type(None)),
    "images": (int,),
    "unreadable": (int,),
    "source": (str,),
    "weights_sha256": (str,),
    "dataset_sha256": (str,),
    "transform": (dict,),
    "notes": (list,),
    "ranges": (dict,),
    "amax": (dict,),
    "histograms": (dict,),
}


class Scales(Protocol):
    """Scales of a layer, as `quantized.Quantization` holds them."""

    @property
    def input(self) -> float:
        """Scale of its input."""

    @property
    def weight(self) -> npt.NDArray[np.float32]:
        """Scale per output channel."""


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What was seen on the calibration images, the ranges that follow from it, and what it is bound to.

    Attributes:
        calibrator: Name of the calibrator.
        percentile: Its percentile in percent; None for the other calibrators.
        images: Number of images seen.
        unreadable: Number of image files that could not be read.
        source: Where the images came from.
        weights_sha256: Digest over names, shapes, types and bytes of the tensors of the deploy form.
        dataset_sha256: Digest over the transformed images, in order; see `ImageSource.digest`.
        transform: What the images went through.
        statistics: What was seen of the input of each observed layer.
        ranges: Calibrated amax of it; 0 where it was always zero.
        notes: What the user should know of the images, one sentence each.
    """

    calibrator: str
    percentile: float | None
    images: int
    unreadable: int
    source: str
    weights_sha256: str
    dataset_sha256: str
    transform: Transform
    statistics: dict[str, Statistics]
    ranges: dict[str, float]
    notes: tuple[str, ...] = ()

    @property
    def amax(self) -> dict[str, float]:
        """Largest magnitude of the input of each observed layer."""
        return {path: seen.amax for path, seen in self.statistics.items()}

    def summary(self) -> dict[str, Any]:
        """What the manifest holds of it: all but what goes by layer, as plain values."""
        entries = {
            "calibrator": self.calibrator,
            "percentile": self.percentile,
            "images": self.images,
            "unreadable": self.unreadable,
            "source": self.source,
            "weights_sha256": self.weights_sha256,
            "dataset_sha256": self.dataset_sha256,
            "notes": list(self.notes),
        }
        return {key: value for key, value in entries.items() if value not in (None, [])}

    def to_json(self, scales: Mapping[str, Scales] | None = None) -> dict[str, Any]:
        """Plain values, with a SHA-256 of them all.

        Args:
            scales: What the ranges became in a build, by layer; weight scales are packed as float32.
        """
        data = {
            "format": FORMAT,
            **self.summary(),
            "percentile": self.percentile,
            "notes": list(self.notes),
            "transform": json.loads(json.dumps(self.transform.to_json())),
            "ranges": self.ranges,
            "amax": self.amax,
            "histograms": {
                path: {"bin_width": seen.width, "counts": pack(seen.counts)}
                for path, seen in self.statistics.items()
                if seen.counts.size
            },
            "scales": {
                path: {"input": each.input, "weight": pack(each.weight)} for path, each in (scales or {}).items()
            },
        }
        return {**data, "sha256": _digest(data)}


def find_ranges(statistics: dict[str, Statistics], calibrator: str, percentile: float) -> dict[str, float]:
    """Calibrated amax of each tensor; 0 where it was always zero.

    Raises:
        DataError: If the calibrator needs histograms and only largest magnitudes are known.
        OptionError: If there is no such calibrator.
    """
    to_range = get_calibrator(calibrator, percentile)
    if calibrator != "max" and not all(seen.counts.size for seen in statistics.values()):
        msg = f"Only largest magnitudes were kept, no histograms; calibrator {calibrator} needs them. Calibrate anew."
        raise DataError(msg)
    return {path: to_range(seen) if seen.amax > 0 else 0.0 for path, seen in statistics.items()}


def from_json(text: bytes, where: str) -> Calibration:
    """Inverse of `Calibration.to_json`, from its text.

    Args:
        text: The JSON.
        where: Its place, for messages.

    Raises:
        DataError: If it is no such JSON, was altered, or contradicts itself.
    """
    try:
        data = json.loads(text, parse_constant=_refuse_constant)
        return _from_values(data)
    except (ValueError, LookupError, TypeError, ArithmeticError, RecursionError, OptionError, zlib.error) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        msg = (
            f"{where} is not a calibration, or was altered or cut off ({reason}). "
            "Name another file, or delete that one to calibrate again."
        )
        raise DataError(msg) from error


def _from_values(data: Any) -> Calibration:
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        msg = f"expected format {FORMAT!r}"
        raise ValueError(msg)
    stated = data.pop("sha256")
    wrong = [key for key, kinds in _KINDS.items() if type(data[key]) not in kinds]
    if wrong:
        msg = f"{', '.join(wrong)} of the wrong type"
        raise ValueError(msg)
    statistics = {path: _statistics(amax, data["histograms"].get(path)) for path, amax in data["amax"].items()}
    percentile = data["percentile"]
    ranges = {path: data["ranges"][path] for path in statistics}
    impossible = [path for path in ranges if not 0 <= ranges[path] <= statistics[path].amax]
    if impossible or data["images"] < 1 or data["unreadable"] < 0:
        msg = f"ranges beyond what was seen ({', '.join(impossible) or 'none'}), or {data['images']} images"
        raise ValueError(msg)
    if stated != _digest(data):
        msg = "its contents do not have the SHA-256 it states"
        raise ValueError(msg)
    return Calibration(
        calibrator=data["calibrator"],
        percentile=percentile,
        images=data["images"],
        unreadable=data["unreadable"],
        source=data["source"],
        weights_sha256=data["weights_sha256"],
        dataset_sha256=data["dataset_sha256"],
        transform=Transform.from_json(data["transform"]),
        statistics=statistics,
        ranges=ranges,
        notes=tuple(map(str, data["notes"])),
    )


def _statistics(amax: Any, histogram: Any) -> Statistics:
    """Statistics of one tensor, if they are possible."""
    if type(amax) not in (float, int) or not 0 <= amax < math.inf:
        msg = f"largest magnitude {amax!r}"
        raise ValueError(msg)
    if histogram is None:
        return Statistics(float(amax), np.zeros(0, np.int64), 0.0)
    counts, width = unpack(histogram["counts"]), histogram["bin_width"]
    used = np.flatnonzero(counts)
    possible = width == bin_width(amax) and 0 <= counts.min() <= counts.max() <= _MOST and used.size
    if not possible or used[-1] != (int(amax / width) if width else 0):
        msg = f"a histogram that does not fit its largest magnitude {amax!r}, or has negative counts"
        raise ValueError(msg)
    return Statistics(float(amax), counts, float(width))


def pack(counts: npt.NDArray[Any]) -> str:
    """Numbers as text: little-endian bytes, deflated, in base64."""
    plain = counts.astype(counts.dtype.newbyteorder("<")).tobytes()
    return base64.b64encode(zlib.compress(plain, 6)).decode("ascii")


def unpack(text: Any) -> npt.NDArray[np.int64]:
    """Inverse of `pack` for the counts of one histogram; never more than those are inflated."""
    if not isinstance(text, str):
        msg = "counts that are not text"
        raise TypeError(msg)
    data = zlib.decompressobj().decompress(base64.b64decode(text, validate=True), 8 * BINS + 1)
    if len(data) != 8 * BINS:
        msg = f"a histogram of {len(data)} bytes instead of {8 * BINS}"
        raise ValueError(msg)
    return np.frombuffer(data, "<i8").astype(np.int64)


def _digest(data: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()).hexdigest()


def _refuse_constant(name: str) -> float:
    msg = f"it holds {name}"
    raise ValueError(msg)
