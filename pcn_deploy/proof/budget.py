"""The proof of an accuracy budget, on the engines that were built."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np

from pcn_deploy.aliases import Forward
from pcn_deploy.calibration.search.evaluation import Answers
from pcn_deploy.data.images import ImageSource
from pcn_deploy.errors import DataError, OptionError, ParityError
from pcn_deploy.progress import Progress
from pcn_deploy.tasks.bound import CONFIDENCE, PairedCounts, drop_failures, images_needed, judge_drop
from pcn_deploy.tasks.changed import ChangedAnswer
from pcn_deploy.tasks.report import listed

if TYPE_CHECKING:
    from pcn_deploy.artefact.engine import Engine
    from pcn_deploy.data.images import ImageSource

NOT_LABELLED = "no labelled images were at hand that did not calibrate: give --data DIR with a folder for each class"
"""Why a build did not judge the accuracy."""


@dataclass(frozen=True, kw_only=True)
class BudgetProof:
    """Whether a built engine keeps the budget; true if it does.

    Attributes:
        target: The engine judged.
        executed_by: What answered: the target, or `cpu` where the engine cannot run here.
        data: Where the images came from.
        held_out: Whether no image took part in the search.
        labelled: Whether the images have labels; if not, the answers of the trained network count as right.
        counts: Images judged, lost and gained.
        top1: Of the trained network, in percent.
        budget: Largest drop of top-1, in percentage points.
        given: Images given in all, those that chose the plan included.
        asked: Whether the budget was asked for, so that it must be proven; else it must not be shown broken.
        unanswered: Images for which the engine returned NaN or infinite logits; with any there is no pass.
    """

    target: str
    executed_by: str
    data: str
    held_out: bool
    labelled: bool
    counts: PairedCounts
    top1: float
    budget: float
    given: int
    asked: bool = True
    unanswered: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return not self.failures

    @property
    def verdict(self) -> str:
        """`proven` or `broken`, each with 95 % confidence, or `open`; an engine that does not answer has broken it."""
        return "broken" if self.unanswered else judge_drop(self.counts, self.budget)

    @property
    def failures(self) -> list[str]:
        """What speaks against a pass, in words."""
        if self.unanswered:
            return [f"NaN or infinite logits for {listed(self.unanswered)}"]
        return drop_failures(self.counts, self.budget, to_prove=self.asked, total_images=self.given)

    @property
    def images_needed(self) -> int | None:
        """Images to give, at the rates seen, such that those that judge prove the budget; None if no number would."""
        needed = images_needed(self.counts, self.budget)
        return None if needed is None else math.ceil(needed * self.given / self.counts.images)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        counts = self.counts
        return {
            "passed": bool(self),
            **asdict(self),
            "verdict": self.verdict,
            "drop": counts.drop,
            "drop_bound": counts.drop_bound,
            "confidence": CONFIDENCE,
            "images_needed": self.images_needed if self.verdict == "open" else None,
        }


def proof_from_json(data: dict[str, Any]) -> BudgetProof:
    """Inverse of `BudgetProof.to_json`.

    Raises:
        KeyError: If an entry is missing.
        TypeError: If an entry is of another kind.
    """
    kept = {field.name: data[field.name] for field in fields(BudgetProof)}
    kept |= {"counts": PairedCounts(**data["counts"]), "unanswered": tuple(data["unanswered"])}
    return BudgetProof(**kept)


@dataclass(frozen=True, kw_only=True)
class Judges:
    """The images of an evaluation, shared out.

    Attributes:
        search: Those that choose the plan.
        proof: Those that judge the engine: others if there are enough, the same ones otherwise.
        held_out: Whether they are others.
        budget: Largest drop of top-1, in percentage points.
        asked: Whether it was asked for.
    """

    search: Answers
    proof: Answers
    held_out: bool
    budget: float
    asked: bool = True

    @property
    def total_images(self) -> int:
        """Images in all."""
        return len(self.proof) if self.search is self.proof else len(self.search) + len(self.proof)

    @classmethod
    def share_out(cls, answers: Answers, budget: float, *, searching: bool, asked: bool = True) -> Judges:
        """Halve the images if half of them can prove the budget; every other one of each class, so that both see all.

        Args:
            answers: All images.
            budget: Largest drop of top-1, in percentage points.
            searching: Whether a plan will be chosen by them at all.
            asked: Whether the budget was asked for.

        Raises:
            OptionError: If a budget asked for is 0: no number of images proves that nothing is lost.
            ParityError: If there are too few to prove one that was asked for even for an engine that loses none.
        """
        needed = check_count(len(answers), budget) if asked else 0
        if not searching or len(answers) < 2 * needed:
            return cls(search=answers, proof=answers, held_out=not searching, budget=budget, asked=asked)
        indices = np.argsort(answers.expected, kind="stable")
        halves = answers.select(np.sort(indices[::2])), answers.select(np.sort(indices[1::2]))
        return cls(search=halves[0], proof=halves[1], held_out=True, budget=budget, asked=asked)


def judge_held_out(
    forward: Forward, images: ImageSource, budget: float, progress: Progress
) -> tuple[Judges | None, str]:
    """Let labelled images judge that were held out of the calibration, where their labels are the network's classes.

    Args:
        forward: The trained network.
        images: The images.
        budget: Largest drop of top-1, in percentage points; nobody asked for it.
        progress: Told the number of images done.

    Returns:
        The judges; or None and why not.
    """
    try:
        answers = Answers.of(forward, images, progress)
    except DataError as error:  # nobody said that these labels are the network's classes
        return None, str(error)
    return Judges.share_out(answers, budget, searching=False, asked=False), ""


def check_count(images: int, budget: float) -> int:
    """Refuse a budget that so many images cannot prove.

    Args:
        images: Number of images.
        budget: Largest drop of top-1, in percentage points.

    Returns:
        The least number that could.

    Raises:
        OptionError: If the budget is 0: no number of images proves that nothing is lost.
        ParityError: If there are too few even for an engine that loses none of them.
    """
    needed = images_needed(PairedCounts(images), budget)
    if needed is None:
        msg = f"--max-drop {budget}: no number of images proves that nothing at all is lost; allow 0.1, say."
        raise OptionError(msg)
    if images < needed:
        best = PairedCounts(images).drop_bound
        msg = (
            f"{images} images cannot prove a drop within {budget} points: even if none is lost, the drop may be "
            f"{best:.2f} with {CONFIDENCE:.0%} confidence. Give {needed} images or more with --data ({2 * needed} to "
            "judge the engine on images that did not choose its plan), or allow a larger drop."
        )
        raise ParityError(msg)
    return needed


def prove_budget(engine: Engine, judges: Judges, progress: Progress) -> tuple[BudgetProof, list[ChangedAnswer]]:
    """Judge a built engine; and tell which images it answers otherwise than the trained network.

    Args:
        engine: What answers: the engine, or its graph where it cannot run here.
        judges: The images.
        progress: Told the number of images done.
    """
    answered = judges.proof.ask(engine.predict, progress, f"Judging {engine.target}")
    proof = BudgetProof(
        target=engine.target,
        executed_by=engine.executed_by,
        data=judges.proof.source.name,
        held_out=judges.held_out,
        labelled=judges.proof.labelled,
        counts=judges.proof.count(answered.classes),
        unanswered=judges.proof.unanswered(answered.classes),
        asked=judges.asked,
        top1=judges.proof.top1,
        budget=judges.budget,
        given=judges.total_images,
    )
    return proof, judges.proof.changed(engine.target, answered)
