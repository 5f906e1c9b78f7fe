"""The golden set of a bundle: images with the outputs of the trained network, each with its name. numpy only.

Beside real images it holds edge images, which are made and not photographed: they reach the ends of what the transform
can give, and have flat areas, where sums that a network divides by become zero. An 8-bit graph was not calibrated on
such images and may clip there, as intended; so of 8-bit graphs the set also holds what their simulation answers, and
what an engine answers to edge images is compared with that. Of rounded graphs it holds what the network answers with
their weights and no other rounding. docs/parity.md has the measurements behind it.
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pcn_deploy.errors import BundleError
from pcn_deploy.members import GOLDEN
from pcn_deploy.specs import usual_role
from pcn_deploy.tasks.parity import ParityMeter
from pcn_deploy.tasks.role import Role
from pcn_deploy.tasks.roles import get_role

if TYPE_CHECKING:
    from pcn_deploy.artefact.bundle import Bundle
    from pcn_deploy.data.transform import Transform

Array = npt.NDArray[np.float32]

NOISE = "standard normal noise"
"""Where images come from that stand in for real ones."""
_SIMULATED, _WIDENED = "simulated_", "widened_"
_LIMITS = "least_widened_db"
_NOISE = "float32_noise"


@dataclass(frozen=True, kw_only=True)
class GoldenSet:
    """Images and what is expected of an engine that sees them.

    Attributes:
        images: `(N, C, H, W)`, transformed.
        names: Of each image.
        edge: Whether each image is an edge image, `(N,)`.
        outputs: Of the trained network, by name, `(N, ...)`.
        simulated: Of the simulation of an 8-bit graph in FP32; empty for other graphs and in bundles of 0.1.0.
        widened: Of the network with the weights of a rounded graph, for the real images, by name, `(M, ...)`; empty for
            FP32 and in bundles of 0.1.0.
        widened_db: Least SQNR in dB of a graph without its rounding for each of these images, `(M,)`.
        rounding: Whether the network answers an image with nothing but its own rounding, `(N,)`: of an engine it is
            only asked that its answer is finite. All false if not given.
        float32_noise: Mean power of the rounding in the logits of a real image, less the mean of their row, when the
            network runs in float32: against float64. NaN if unknown, as in bundles of 0.1.0.
        further_noise: As `float32_noise`, which is that of the first output, of the others by their names.
        roles: What each output means, by name; by default what its name says.
    """

    images: Array
    names: tuple[str, ...]
    edge: npt.NDArray[np.bool_]
    outputs: dict[str, Array]
    simulated: dict[str, Array] = field(default_factory=dict)
    widened: dict[str, Array] = field(default_factory=dict)
    widened_db: npt.NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    rounding: npt.NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, np.bool_))
    float32_noise: float = math.nan
    roles: dict[str, str] = field(default_factory=dict)
    further_noise: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not len(self.rounding):
            object.__setattr__(self, "rounding", np.zeros(len(self.images), np.bool_))
        if not self.roles:
            object.__setattr__(self, "roles", {name: usual_role(name) for name in self.outputs})

    @property
    def judged_edge(self) -> npt.NDArray[np.bool_]:
        """The edge images whose answers are compared, `(N,)`."""
        return self.edge & ~self.rounding

    @property
    def first(self) -> str:
        """Name of the output that the network is judged by."""
        return next(iter(self.outputs))

    def noise(self, output: str) -> float:
        """`float32_noise` of an output; NaN if unknown."""
        return self.float32_noise if output == self.first else self.further_noise.get(output, math.nan)

    def role(self, output: str) -> Role:
        """What an output means."""
        return get_role(self.roles[output])

    def live(self, output: str) -> npt.NDArray[np.bool_] | None:
        """Which entries of an output are compared, `(K,)`, as its role says of the real images; None for all."""
        return self.role(output).live(_rows(self.outputs[output][~self.edge]))

    def meter(self, output: str) -> ParityMeter:
        """What compares an output with the trained network's."""
        return self.role(output).meter(output, self.outputs[output][~self.edge])

    def to_npz(self) -> bytes:
        """As the bundle holds it: compressed, since edge images are nearly nothing then."""
        arrays: dict[str, npt.NDArray[Any]] = {"images": self.images, **self.outputs}
        arrays |= {"names": np.array(self.names), "edge": self.edge, "rounding": self.rounding}
        arrays[_NOISE] = np.array(self.float32_noise)
        arrays |= {f"{_NOISE}_{name}": np.array(value) for name, value in self.further_noise.items()}
        arrays |= {f"{_SIMULATED}{name}": values for name, values in self.simulated.items()}
        arrays |= {f"{_WIDENED}{name}": values for name, values in self.widened.items()}
        arrays |= {_LIMITS: self.widened_db} if self.widened else {}
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type] # numpy's stub takes allow_pickle for an array
        return buffer.getvalue()

    @classmethod
    def read(cls, bundle: Bundle) -> GoldenSet:
        """The golden set of a bundle.

        Raises:
            BundleError: If it lacks an output of the bundle's interface, or its arrays do not fit each other.
        """
        roles = {tensor.name: tensor.role for tensor in bundle.manifest.interface.outputs}
        outputs = tuple(roles)
        arrays = bundle.read_arrays(GOLDEN)
        expected = {"images", *outputs}
        if not expected <= arrays.keys():
            msg = f"The golden set holds {sorted(arrays)} instead of {sorted(expected)}. Build the bundle again."
            raise BundleError(msg)
        count = len(arrays["images"])
        names = arrays.get("names", np.array([f"golden image {index}" for index in range(count)]))
        golden = cls(
            images=arrays["images"],
            names=tuple(str(name) for name in names),
            edge=arrays.get("edge", np.zeros(count, np.bool_)),
            outputs={name: arrays[name] for name in outputs},
            simulated={name: arrays[_SIMULATED + name] for name in outputs if _SIMULATED + name in arrays},
            widened={name: arrays[_WIDENED + name] for name in outputs if _WIDENED + name in arrays},
            widened_db=arrays.get(_LIMITS, np.zeros(0)),
            rounding=arrays.get("rounding", np.zeros(count, np.bool_)),
            float32_noise=float(arrays.get(_NOISE, np.array(math.nan)).ravel()[0]),
            roles=roles,
            further_noise={name: float(arrays[f"{_NOISE}_{name}"]) for name in outputs if f"{_NOISE}_{name}" in arrays},
        )
        lengths = {len(golden.names), len(golden.edge), len(golden.rounding), *map(len, golden.outputs.values())}
        lengths |= set(map(len, golden.simulated.values()))
        widened = {*map(len, golden.widened.values()), *([len(golden.widened_db)] if golden.widened else ())}
        fits = lengths == {count} and widened <= {int((~golden.edge).sum())}
        if not fits or {golden.edge.dtype, golden.rounding.dtype} != {np.dtype(np.bool_)}:
            msg = f"The arrays of the golden set do not fit its {count} images. Build the bundle again."
            raise BundleError(msg)
        return golden


def _rows(values: Array) -> Array:
    return values.reshape(len(values), -1)


def edge_images(transform: Transform) -> dict[str, Array]:
    """Images `(C, H, W)` at the ends of what a transform can give, by name.

    Black is its smallest value in every channel, white its largest; the others mix them: one colour and its
    complement, which are the largest differences between channels, a checkerboard, the largest between neighbours, and
    random pixels, each channel of which is black or white.
    """
    channels, height, width = transform.shape
    row, column = np.indices((height, width))
    white = np.full((height, width, channels), 255, np.uint8)
    images: dict[str, npt.NDArray[Any]] = {"black": 0 * white, "white": white, "grey": white // 2}
    if channels > 1:
        first = white * (np.arange(channels) == 0)
        names = ("red", "cyan") if channels == 3 else ("first channel", "other channels")
        images |= dict(zip(names, (first, white - first), strict=True))
    images["checkerboard"] = white * ((row + column) % 2)[..., None]
    images["random pixels"] = white * np.random.default_rng(0).integers(0, 2, white.shape)
    return {name: transform.normalise(pixels.astype(np.uint8)) for name, pixels in images.items()}
