"""The fewest layers left unquantised such that the drop of accuracy stays within a budget, with 95 % confidence.

Layers are given up one by one, most harmful first, until the bound of `tasks.bound` is within the budget; then
each of them is tried in INT8 again, least harmful first, because some harmed only in company. So the plan found never
leaves more layers unquantised than giving up in that order alone would.

The images that chose a plan judge it too kindly. Where there are others, they are asked about the plan found; if it
does not hold, about a sequence of plans that the first ones fixed, from a safe one on, and the last of them that holds
is taken: such a sequence, which ends at the first failure, keeps the confidence of a single test. Source: Angelopoulos
et al., "Learn then Test", 2021, section 3 (fixed sequence testing). It is made of the plan at which the order alone
would have stopped, those one layer further each until one is safe, and some beyond: what the order alone would ask
about, so it never ends with fewer. `_with_slack` makes each of the two tests err in 1.6 of 100 cases, so both together
err less often than the bound allows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from pcn_deploy.aliases import Forward
from pcn_deploy.calibration.search.evaluation import Answers
from pcn_deploy.calibration.search.ledger import Ledger
from pcn_deploy.calibration.search.simulate import Simulation
from pcn_deploy.progress import Progress, silent
from pcn_deploy.tasks.bound import PairedCounts, images_needed

STEP = "Searching"
_CHANCE_GAIN = 3

LOOKS = (1 / 8, 1 / 4, 1 / 2)
"""Shares of the images after which a plan may be taken without asking the others."""
EARLY = 3.09
"""Standard deviations by which the plan must then be within the budget, 99.9 %: three such looks add 0.3 % to the error
of the test on all images. Source: Haybittle, 1971; Peto et al., 1976."""

SAFE = 1.88 * math.sqrt(2)
"""Standard deviations of the drop that a bound on some images must be below a budget for the bound on as many others to
be within it with a probability of 97 %: 1.88, times the root of 2 for the difference of two samples."""


@dataclass(frozen=True, kw_only=True)
class SearchResult:
    """What a search found.

    Attributes:
        budget: Largest drop of top-1, in percentage points.
        unquantized: Units left out of INT8, most harmful first.
        counts: Images lost and gained by the plan found, simulated.
        reached: Whether its bound is within the budget.
        evaluations: Plans that were judged, those an earlier run had judged included.
        confirmed: Images lost and gained on others than those that chose it, simulated; None if there are none.
    """

    budget: float
    unquantized: tuple[str, ...]
    counts: PairedCounts
    reached: bool
    evaluations: int
    confirmed: PairedCounts | None = None

    @property
    def images_needed(self) -> int | None:
        """Images that would prove the budget for the plan found, at the rates seen; None if no number would."""
        return images_needed(self.counts, self.budget)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "drop": self.counts.drop, "drop_bound": self.counts.drop_bound}


def _mixed(answers: Answers) -> Answers:
    """The same images in an order that means nothing, and is always the same: folders come class by class."""
    return answers.select(np.random.default_rng(0).permutation(len(answers)))


def _with_slack(counts: PairedCounts) -> PairedCounts:
    """The engine rounds where the simulation does not, and may lose a few images more: half a standard deviation."""
    return replace(counts, lost=counts.lost + math.ceil(math.sqrt(counts.lost + counts.gained) / 2))


class Search:
    """Judges plans on images whose answers are known.

    Images that all-INT8 answers differently come first. A plan that is far from the budget on those is given up: the
    others would have to bring back `_CHANCE_GAIN` images more than they lose.

    Args:
        simulation: The network.
        units: Layers that are quantised together, by the name of the unit.
        answers: Images with the answers of the trained network.
        budget: Largest drop of top-1, in percentage points.
        ledger: Where judgements are kept; those it has are not repeated.
        progress: Told the number of plans judged.
    """

    def __init__(
        self,
        simulation: Simulation,
        units: dict[str, tuple[str, ...]],
        answers: Answers,
        budget: float,
        ledger: Ledger,
        progress: Progress = silent,
    ) -> None:
        self._simulation, self._units, self._budget = simulation, units, budget
        self._ledger, self._progress = ledger, progress
        self._answers = answers
        self._moved = 0
        self._all: PairedCounts | None = None
        self.evaluations = 0

    def holds_all(self) -> bool:
        """Whether every unit can be INT8: then nothing is left to be searched."""
        self._all = self._judge_all()
        return self._within(self._all)

    def run(self, rank: Callable[[], list[str]]) -> SearchResult:
        """Search.

        Args:
            rank: Asked for the units, most harmful first, only if they cannot all be INT8.
        """
        unquantized: list[str] = []
        counts = self._all or self._judge_all()
        ranking = [] if self._within(counts) else rank()
        while not self._within(counts) and len(unquantized) < len(ranking):
            self._progress(STEP, len(unquantized), len(ranking), "layers")
            unquantized.append(ranking[len(unquantized)])
            counts = self._judge(unquantized)
        reached = self._within(counts)
        for unit in reversed(unquantized[:-1] if reached else []):
            fewer = [one for one in unquantized if one != unit]
            without = self._judge(fewer)
            if self._within(without):
                unquantized, counts = fewer, without
        if ranking:
            self._progress(STEP, len(ranking), len(ranking), "layers")
        return SearchResult(
            budget=self._budget,
            unquantized=tuple(unquantized),
            counts=counts,
            reached=reached,
            evaluations=self.evaluations,
        )

    def confirm(self, result: SearchResult, others: Answers, rank: Callable[[], list[str]]) -> SearchResult:
        """Take the plan found if it holds on other images, else the last that does of a sequence from a safe one on.

        Args:
            result: What `run` found.
            others: Images that took no part in it.
            rank: Asked for the units, most harmful first.

        Returns:
            The plan that holds; if none does, the safest, with `reached` false.
        """
        own = list(result.unquantized)
        counts = self._judge_on(others, own)
        if self._holds(counts, len(others)):
            return replace(result, confirmed=counts, evaluations=self.evaluations)
        ranking = rank()
        most = len(ranking) - 1  # one layer stays
        sizes = [min(most, 1 + max((ranking.index(unit) for unit in own), default=-1))]
        while sizes[-1] < most and not self._safe(self._judge(ranking[: sizes[-1]])):
            sizes.append(sizes[-1] + 1)
        safe, further = sizes[-1], 1
        while sizes[-1] < most:
            sizes.append(min(most, safe + further))
            further *= 2
        taken: tuple[list[str], PairedCounts] | None = None
        for unquantized in (ranking[:size] for size in reversed(sizes)):
            counts = self._judge_on(others, unquantized)
            holds = self._holds(counts, len(others))
            if holds or taken is None:
                taken = unquantized, counts
            if not holds:
                break
        unquantized, counts = taken or (own, counts)
        return replace(
            result,
            unquantized=tuple(unquantized),
            counts=self._judge(unquantized),
            confirmed=counts,
            reached=self._holds(counts, len(others)),
            evaluations=self.evaluations,
        )

    def _holds(self, counts: PairedCounts, images: int) -> bool:
        """Whether a plan is taken, by what it lost of all the images, or of those up to the look that took it."""
        return self._within(_with_slack(counts)) if counts.images == images else self._surely_within(counts)

    def _surely_within(self, counts: PairedCounts) -> bool:
        return counts.drop_bound_at(EARLY) <= self._budget

    def judge_last(self, rank: Callable[[], list[str]]) -> tuple[str, PairedCounts]:
        """The unit that harms least, and the plan with that alone in INT8.

        Args:
            rank: Asked for the units, most harmful first.
        """
        *others, last = rank()
        return last, self._judge(others)

    def _safe(self, counts: PairedCounts) -> bool:
        deviation = 100 * math.sqrt(counts.lost + counts.gained + 1) / counts.images
        return counts.drop_bound + SAFE * deviation <= self._budget

    def _judge_on(self, others: Answers, unquantized: list[str]) -> PairedCounts:
        def judge() -> PairedCounts:
            def is_hopeless(counts: PairedCounts) -> bool:
                return not self._within(_with_slack(replace(counts, gained=counts.gained + _CHANCE_GAIN)))

            forward = self._forward(frozenset(self._units) - frozenset(unquantized))
            return self._look(_mixed(others), forward, "Confirming", is_hopeless)[0]

        return self._kept("confirm", unquantized, judge, len(others))

    def _judge_all(self) -> PairedCounts:
        """Judge the plan with every unit in INT8; unless that ended early, put the images that it moves first."""
        self._answers = _mixed(self._answers)

        def judge() -> PairedCounts:
            forward = self._forward(frozenset(self._units))
            counts, predictions = self._look(self._answers, forward, "Judging INT8", lambda _: False)
            if len(predictions) == len(self._answers):
                self._ledger["moved"] = np.flatnonzero(predictions != self._answers.reference).tolist()
            return counts

        counts = self._kept("plan", [], judge, len(self._answers))
        if "moved" in self._ledger:
            moved = np.array(self._ledger["moved"], np.intp)
            self._moved = len(moved)
            rest = np.setdiff1d(np.arange(len(self._answers)), moved)
            self._answers = self._answers.select(np.concatenate((moved, rest)))
        return counts

    def _look(
        self, answers: Answers, forward: Forward, step: str, is_hopeless: Callable[[PairedCounts], bool]
    ) -> tuple[PairedCounts, npt.NDArray[np.int64]]:
        """Judge a plan until the answer is known.

        Args:
            answers: Images in an order that means nothing.
            forward: The plan.
            step: For the progress.
            is_hopeless: Whether the counts over all images, those not seen taken as unchanged, cannot do any more.

        Returns:
            The counts, of the images up to the look that took the plan or of all, and the answers that were asked for.
        """
        looks = [math.ceil(share * len(answers)) for share in LOOKS]
        taken: list[PairedCounts] = []

        def stop(seen: int, counts: PairedCounts) -> bool:
            self._progress(step, seen, len(answers), "images")
            if looks and seen >= looks[0]:
                looks[:] = [look for look in looks if look > seen]
                so_far = replace(counts, images=seen)
                taken[:] = [so_far] if self._surely_within(so_far) else []
            return bool(taken) or is_hopeless(counts)

        self._progress(step, 0, len(answers), "images")
        counts, predictions = answers.compare(forward, stop)
        self._progress(step, len(answers), len(answers), "images")
        return (taken or [counts])[0], predictions

    def _within(self, counts: PairedCounts) -> bool:
        return counts.drop_bound <= self._budget

    def _judge(self, unquantized: list[str]) -> PairedCounts:
        def judge() -> PairedCounts:
            forward = self._forward(frozenset(self._units) - frozenset(unquantized))
            return self._answers.compare(forward, self._is_hopeless)[0]

        return self._kept("plan", unquantized, judge, len(self._answers))

    def _kept(self, kind: str, unquantized: list[str], judge: Callable[[], PairedCounts], images: int) -> PairedCounts:
        """A judgement of a plan: that of the ledger, else a new one, which is kept there."""
        key = f"{kind}:{','.join(sorted(unquantized))}"
        if key not in self._ledger:
            counts = judge()
            self._ledger[key] = [counts.lost, counts.gained, *([] if counts.images == images else [counts.images])]
        self.evaluations += 1
        lost, gained, *seen = self._ledger[key]
        return PairedCounts(seen[0] if seen else images, lost, gained)

    def _is_hopeless(self, seen: int, counts: PairedCounts) -> bool:
        with_gain = PairedCounts(counts.images, counts.lost, counts.gained + _CHANCE_GAIN)
        return seen >= self._moved and not self._within(with_gain)

    def _forward(self, units: frozenset[str]) -> Forward:
        layers = frozenset(layer for unit in units for layer in self._units[unit])
        return lambda images: self._simulation.logits(images, inputs=layers, weights=layers)
