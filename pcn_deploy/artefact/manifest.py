"""The manifest of a bundle: what it must say before anything in the bundle is used. No torch.

Hashes in the manifest guard the members; nothing guards the manifest itself, so its form is checked when it is read.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pcn_deploy.data.transform import Transform
from pcn_deploy.engines.registry import TARGETS
from pcn_deploy.errors import BundleError, OptionError
from pcn_deploy.specs import ATTENTION_MAP, LOGITS, EngineSpec
from pcn_deploy.tasks.limits import ParityBudget
from pcn_deploy.tasks.roles import get_role

SCHEMA = 2
OLDER = (1,)

_KINDS: dict[str, tuple[type, ...]] = {
    "model": (str,),
    "precision": (str,),
    "remainder": (str,),
    "transform": (dict,),
    "interface": (dict,),
    "calibration": (dict, type(None)),
    "engines": (list,),
    "parity_budget": (dict,),
    "provenance": (dict,),
}


@dataclass(frozen=True, kw_only=True)
class Member:
    """A file in the bundle.

    Attributes:
        sha256: Of its bytes, as hexadecimal text.
        bytes: Its size.
    """

    sha256: str
    bytes: int


@dataclass(frozen=True, kw_only=True)
class EngineEntry(Member):
    """An engine in the bundle.

    Attributes:
        target: What it is for.
        member: The file that holds it.
        built_with: Versions and settings that decide where it can run.
    """

    target: str
    member: str
    built_with: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Judged:
    """What the verdict of the build rests on.

    Attributes:
        golden_images: Real images in the golden set.
        edge_images: Edge images in it.
        golden_calibrated: Whether the real ones calibrated too.
        accuracy: Why nothing judged the accuracy; empty where labelled images did.
        widened_images: Images on which the graph was judged without its rounding.
    """

    golden_images: int = 0
    edge_images: int = 0
    golden_calibrated: bool = False
    accuracy: str = ""
    widened_images: int = 0


@dataclass(frozen=True, kw_only=True)
class Slimmed:
    """What `slim` left out of a bundle.

    Attributes:
        source_sha256: Of the bundle that it was made from, as hexadecimal text.
        left_out: Size in bytes of each member that is not here any more, by name.
        targets: Targets whose engines are among them.
    """

    source_sha256: str
    left_out: dict[str, int]
    targets: tuple[str, ...] = ()


@dataclass(kw_only=True)
class Manifest:
    """What a bundle says of itself; complete when it is saved.

    Attributes:
        model: Name of the network.
        precision: Of the layers that it lowers.
        remainder: Type of everything else.
        transform: From images to the input.
        interface: Inputs, outputs and batch range.
        parity_budget: What is still parity.
        provenance: Where the network and its weights came from, and what built the bundle.
        calibration: Summary of what calibrated, with the recoveries, plain values; None where nothing did.
        golden: Where the real images of the golden set come from.
        rewrites: How many places each rewrite changed.
        class_names: What the classes are called, in the order of the logits; empty if that is not known.
        input_range: Least and largest value of the golden images, transformed; None if an older version built it.
        notes: What the user should know of the network, the images and the verdict.
        judged: What the verdict rests on.
        choice: Why `--precision auto` chose this one, plain values; None where it was not asked.
        slimmed: What `slim` left out; None of a whole bundle.
        engines: The engines.
        members: Every file beside the manifest.
    """

    model: str
    precision: str
    remainder: str
    transform: Transform
    interface: EngineSpec
    parity_budget: ParityBudget
    provenance: dict[str, Any]
    calibration: Any = None
    golden: str = ""
    rewrites: dict[str, int] = field(default_factory=dict)
    class_names: list[str] = field(default_factory=list)
    input_range: tuple[float, float] | None = None
    notes: list[str] = field(default_factory=list)
    judged: Judged = field(default_factory=Judged)
    choice: Any = None
    slimmed: Slimmed | None = None
    engines: list[EngineEntry] = field(default_factory=list)
    members: dict[str, Member] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        plain = {"transform": self.transform.to_json(), "interface": self.interface.to_json()}
        return {"schema": SCHEMA, **asdict(self), **plain}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Manifest:
        """Inverse of `to_json`; what it does not know is left out.

        Raises:
            KeyError, TypeError, ValueError, AttributeError, IndexError, OptionError: If a value is missing or wrong.
        """
        return cls(
            model=data["model"],
            precision=data["precision"],
            remainder=data["remainder"],
            transform=Transform.from_json(data["transform"]),
            interface=_interface(data["interface"], data.get("schema", SCHEMA)),
            parity_budget=ParityBudget(**data["parity_budget"]),  # refuses limits that are no finite numbers
            provenance=data["provenance"],
            calibration=data["calibration"],
            golden=str(data.get("golden") or ""),
            rewrites=dict(data.get("rewrites", {})),
            class_names=[str(name) for name in data.get("class_names", ())],
            input_range=_range(data.get("input_range")),
            notes=list(data.get("notes", ())),
            judged=Judged(**data.get("judged", {})),
            choice=data.get("choice"),
            slimmed=_slimmed(data.get("slimmed")),
            engines=[_engine(entry) for entry in data.get("engines", ())],
            members={
                name: Member(sha256=str(entry["sha256"]), bytes=int(entry["bytes"]))
                for name, entry in data.get("members", {}).items()
            },
        )


def read_manifest(data: dict[str, Any], path: Path) -> Manifest:
    """Check that every entry a reader relies on is there and of its kind.

    Args:
        data: A manifest whose `schema` and `members` are known to be good.
        path: The bundle, for the message.

    Raises:
        BundleError: If an entry is missing or malformed, or an engine is not a member of the bundle.
    """
    wrong = [key for key, kinds in _KINDS.items() if key not in data or not isinstance(data[key], kinds)]
    if wrong:
        msg = f"The manifest of {path} lacks or garbles {', '.join(wrong)}: it was altered. Copy or build it again."
        raise BundleError(msg)
    try:
        manifest = Manifest.from_json(data)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OptionError) as error:
        msg = (
            f"The manifest of {path} is malformed ({error!r}): it was altered, or made by a version with more targets "
            "or roles. Copy or build it again, or upgrade pcn-deploy."
        )
        raise BundleError(msg) from error
    for entry in manifest.engines:
        member = manifest.members.get(entry.member)
        if member is None or member.sha256 != entry.sha256:
            msg = f"The manifest of {path} contradicts itself about the engine {entry.target!r}: it was altered."
            raise BundleError(msg)
    return manifest


def _range(data: Any) -> tuple[float, float] | None:
    if data is None:
        return None
    least, largest = map(float, data)
    return least, largest


def _interface(data: dict[str, Any], schema: int) -> EngineSpec:
    spec = EngineSpec.from_json(data)
    names = [tensor.name for tensor in (*spec.inputs, *spec.outputs)]
    if not spec.inputs or not spec.outputs or len(set(names)) < len(names):
        msg = f"inputs and outputs {names} instead of at least one of each, every one with a name of its own"
        raise ValueError(msg)
    if schema == 1 and tuple(tensor.name for tensor in spec.outputs) not in ((LOGITS,), (LOGITS, ATTENTION_MAP)):
        msg = f"inputs and outputs {names} instead of images to logits, perhaps an attention map"
        raise ValueError(msg)
    for tensor in spec.outputs:
        get_role(tensor.role)
    return spec


def _slimmed(data: dict[str, Any] | None) -> Slimmed | None:
    if data is None:
        return None
    left_out = {str(name): int(size) for name, size in data["left_out"].items()}
    targets = tuple(str(target) for target in data["targets"])
    return Slimmed(source_sha256=str(data["source_sha256"]), left_out=left_out, targets=targets)


def _engine(data: dict[str, Any]) -> EngineEntry:
    if data["target"] not in TARGETS:
        msg = f"it holds an engine for {data['target']!r}, of which this version knows nothing"
        raise ValueError(msg)
    return EngineEntry(
        target=data["target"],
        member=data["member"],
        sha256=data["sha256"],
        bytes=int(data["bytes"]),
        built_with=dict(data["built_with"]),
    )
