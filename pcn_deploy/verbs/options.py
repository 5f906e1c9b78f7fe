"""Options of the verbs: frozen, keyword-only, checked when made. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from pcn_deploy.calibration.calibrators import (
    AUTO,
    PERCENTILE,
    calibrators_of,
    check_weight_calibrator,
    get_calibrator,
)
from pcn_deploy.calibration.plan.recipe import Recipe
from pcn_deploy.calibration.plan.rules import CODES, PRECISIONS, REMAINDERS
from pcn_deploy.calibration.recovery import check_recovery
from pcn_deploy.data.classes import Classes, ClassesLike
from pcn_deploy.data.images import MAX_UNREADABLE_SHARE
from pcn_deploy.data.transform import Transform
from pcn_deploy.engines.base import BackendOptions
from pcn_deploy.engines.registry import check_options, get_backend
from pcn_deploy.errors import OptionError
from pcn_deploy.members import SCRIPT
from pcn_deploy.specs import BatchRange, OutputSpec
from pcn_deploy.tasks.limits import ParityBudget, budget_for
from pcn_deploy.tasks.roles import get_role


@dataclass(frozen=True, kw_only=True)
class CompileOptions:
    """What to build.

    Attributes:
        precision: One of `PRECISIONS`.
        remainder: Type of what INT8 and FP8 leave unquantised, `fp16` or `fp32`; used with `int8` and `fp8` only.
        targets: Names from `engines.registry.TARGETS`, each once.
        calibrator: One of `calibrators.CALIBRATORS`, or `auto`: the default one, or one that clearly gains SQNR over
            it on calibration images. With `fp8`, `max` or `percentile`. By default `mse`, with `fp8` `max`.
        percentile: For the percentile calibrator, in percent, above 50 and at most 100.
        weight_calibrator: One of `calibrators.WEIGHT_CALIBRATORS`.
        calibration_cache: File that keeps what calibration saw, `.json`, or a bundle to take it from; see
            `calibration/cache.py`.
        recovery: Names from `recovery.RECOVERIES` to apply; with `int8` only.
        calibration_images: Use at most so many images, taken from all over the source at no fixed
            distance, where all have labels of each class in proportion.
        max_unreadable: Share of unreadable image files above which the build stops, 0 to 1.
        golden_images: Images kept in the bundle with the eager outputs, to prove parity anywhere, 1 or more.
        transform: Evaluation transform; its resolution is the resolution of the engine.
        batch: Batch sizes the engines take.
        max_drop: Largest loss of top-1, in percentage points; the default of the precision if None.
        output_names: The outputs to build, in this order, each `NAME` or `NAME:ROLE` with a role of
            `tasks.roles.ROLES`; by default all that the network returns. The first one judges the network.
        with_attention_map: Add the attention map to the outputs.
        seed: Seed of synthetic images.
        backend: How engines are built, where their target leaves a choice.
        recipe: Decides the precision of the layers it names; its precision and remainder must be those above.
        classes: Which output each class folder of labelled images is: a file (`data/classes.py`), the names in
            the order of the outputs, or the output of each name. By default the folders' own order, as in ImageFolder.

    Raises:
        DataError: If the file of the classes cannot be read.
        OptionError: If a value is unknown or out of its range.
    """

    precision: str = "fp16"
    remainder: str = "fp16"
    targets: tuple[str, ...] = ("cpu",)
    calibrator: str = ""
    percentile: float = PERCENTILE
    weight_calibrator: str = "max"
    calibration_cache: str | Path | None = None
    recovery: tuple[str, ...] = ()
    calibration_images: int = 512
    max_unreadable: float = MAX_UNREADABLE_SHARE
    golden_images: int = 8
    transform: Transform = field(default_factory=Transform)
    batch: BatchRange = field(default_factory=BatchRange)
    max_drop: float | None = None
    output_names: tuple[str, ...] = ()
    with_attention_map: bool = False
    seed: int = 0
    backend: BackendOptions = field(default_factory=BackendOptions)
    recipe: Recipe | None = None
    classes: ClassesLike | Classes | None = None

    def __post_init__(self) -> None:
        if self.classes is not None:
            object.__setattr__(self, "classes", Classes.of(self.classes))
        if not self.calibrator:
            object.__setattr__(self, "calibrator", calibrators_of(self.precision)[0])
        if self.precision not in PRECISIONS or self.remainder not in REMAINDERS:
            msg = (
                f"Precision {self.precision!r} with remainder {self.remainder!r}: "
                f"known are {', '.join(PRECISIONS)} with {' or '.join(REMAINDERS)}."
            )
            raise OptionError(msg)
        for target in self.targets:
            get_backend(target).check_type(self.precision)
        check_options(self.targets, self.backend)
        if not self.targets or len(set(self.targets)) != len(self.targets):
            msg = f"Targets {self.targets}: name at least one, and each only once."
            raise OptionError(msg)
        get_calibrator("percentile" if self.calibrator == AUTO else self.calibrator, self.percentile)
        check_weight_calibrator(self.weight_calibrator)
        known = calibrators_of("fp8")
        if self.precision == "fp8" and (self.calibrator not in known or self.weight_calibrator != "max"):
            msg = (
                f"Calibrator {self.calibrator!r} with weight calibrator {self.weight_calibrator!r} weighs clipping "
                "against the equal steps of INT8; those of FP8 grow with the value. Take "
                f"{' or '.join(known)}, with weight calibrator max."
            )
            raise OptionError(msg)
        for output in self.asked_outputs:
            if output.role:
                get_role(output.role)
        check_recovery(self.recovery)
        if self.recovery and self.precision != "int8":
            msg = (
                f"Recovery {', '.join(self.recovery)} makes up for INT8; the precision is {self.precision}. "
                "Build with --precision int8, or leave --recover out."
            )
            raise OptionError(msg)
        if min(self.calibration_images, self.golden_images) < 1 or not 0 <= self.max_unreadable <= 1:
            msg = (
                f"{self.calibration_images} calibration images, {self.golden_images} golden images, unreadable share "
                f"{self.max_unreadable}: expected at least 1, at least 1, and 0 to 1."
            )
            raise OptionError(msg)
        budget_for(self.precision, self.max_drop)
        if self.recipe and (self.recipe.precision, self.recipe.remainder) != (self.precision, self.graph_type):
            msg = (
                f"{self.recipe.source} is for {self.recipe.precision} with remainder {self.recipe.remainder}; "
                f"asked for is {self.precision} with {self.graph_type}. Leave the options out, or edit the recipe."
            )
            raise OptionError(msg)

    @property
    def budget(self) -> ParityBudget:
        """What is still parity."""
        return budget_for(self.precision, self.max_drop)

    @property
    def asked_outputs(self) -> tuple[OutputSpec, ...]:
        """The outputs that were asked for, each with its role or none."""
        split = (text.partition(":") for text in self.output_names)
        return tuple(OutputSpec(name, role) for name, _, role in split)

    @property
    def graph_type(self) -> str:
        """Type of the graph outside Q/DQ: fp32, fp16 or bf16."""
        return self.remainder if self.quantizes else self.precision

    @property
    def searches(self) -> bool:
        """Whether a plan of 8-bit layers is searched that keeps a budget."""
        return self.quantizes and self.max_drop is not None

    @property
    def scripts(self) -> bool:
        """Whether the bundle holds a TorchScript module: only where a target runs it."""
        return any(get_backend(target).graph == SCRIPT for target in self.targets)

    @property
    def quantizes(self) -> bool:
        """Whether the precision is of 8 bits."""
        return self.precision in CODES

    @property
    def rounds(self) -> bool:
        """Whether the ONNX graph rounds: it has codes, or a type smaller than float32."""
        return self.quantizes or self.graph_type != "fp32"
