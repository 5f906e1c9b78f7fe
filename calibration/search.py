"""The fewest layers left unquantised such that the drop of accuracy stays within a budget, with 95 % confidence.

Layers are given up one by one, most harmful first, until the bound of `calibration.bound` is within the budget; then
each of them is tried in INT8 again, least harmful first, because some harmed only in company. So the plan found never
leaves more layers unquantised than giving up in that order alone would.

The images that chose a plan judge it too kindly. Where there are others, they are asked about a sequence of plans that
the first ones fixed, from a safe one to the one found, and the last of them that holds is taken: such a sequence, which
ends at the first failure, keeps the confidence of a single test. Source: Angelopoulos et al., "Learn then Test", 2021,
section 3 (fixed sequence testing). It is made of the plan found, the one at which the order alone would have stopped,
those one layer further each until one is safe, and some beyond: all but the first is what the order alone would ask
about, so it never ends with fewer layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from pcn_deploy.calibration.bound import PairedCounts, images_needed
from pcn_deploy.calibration.evaluation import Answers, Forward
from pcn_deploy.calibration.ledger import Ledger
from pcn_deploy.calibration.simulate import Simulation
from pcn_deploy.progress import Progress, silent

STEP = "Searching"
_LUCK = 3

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


def _with_slack(counts: PairedCounts) -> PairedCounts:
    """The engine rounds where the simulation does not, and may lose a few images more: half a standard deviation."""
    return replace(counts, lost=counts.lost + math.ceil(math.sqrt(counts.lost + counts.gained) / 2))


class Search:
    """Judges plans on images whose answers are known.

    Images that all-INT8 answers differently come first. A plan that is far from the budget on those is given up: the
    others would have to bring back `_LUCK` images more than they lose.

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
        self.evaluations = 0

    def run(self, rank: Callable[[], list[str]]) -> SearchResult:
        """Search.

        Args:
            rank: Asked for the units, most harmful first, only if they cannot all be INT8.
        """
        given_up: list[str] = []
        counts = self._judge_all()
        ranking = [] if self._within(counts) else rank()
        while not self._within(counts) and len(given_up) < len(ranking):
            self._progress(STEP, len(given_up), len(ranking), "layers")
            given_up.append(ranking[len(given_up)])
            counts = self._judge(given_up)
        reached = self._within(counts)
        for unit in reversed(given_up[:-1] if reached else []):
            fewer = [one for one in given_up if one != unit]
            without = self._judge(fewer)
            if self._within(without):
                given_up, counts = fewer, without
        if ranking:
            self._progress(STEP, len(ranking), len(ranking), "layers")
        return SearchResult(
            budget=self._budget,
            unquantized=tuple(given_up),
            counts=counts,
            reached=reached,
            evaluations=self.evaluations,
        )

    def confirm(self, found: SearchResult, others: Answers, rank: Callable[[], list[str]]) -> SearchResult:
        """Take the last plan that holds on other images, of a sequence from a safe one to the one found.

        Args:
            found: What `run` found.
            others: Images that took no part in it.
            rank: Asked for the units, most harmful first.

        Returns:
            The plan that holds; if none does, the safest, with `reached` false.
        """
        ranking, own = rank(), list(found.unquantized)
        most = len(ranking) - 1  # one layer stays
        sizes = [min(most, 1 + max((ranking.index(unit) for unit in own), default=-1))]
        while sizes[-1] < most and not self._safe(self._judge(ranking[: sizes[-1]])):
            sizes.append(sizes[-1] + 1)
        safe, further = sizes[-1], 1
        while sizes[-1] < most:
            sizes.append(min(most, safe + further))
            further *= 2
        sequence = [*([own] if len(own) < sizes[0] else []), *(ranking[:size] for size in sizes)]
        holds: SearchResult | None = None
        for given_up in reversed(sequence):
            counts = self._judge_on(others, given_up)
            judged = replace(found, unquantized=tuple(given_up), counts=self._judge(given_up), confirmed=counts)
            if not self._within(_with_slack(counts)):
                return replace(holds or replace(judged, reached=False), evaluations=self.evaluations)
            holds = judged
        return replace(holds or found, evaluations=self.evaluations)

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

    def _judge_on(self, others: Answers, given_up: list[str]) -> PairedCounts:
        def judge() -> PairedCounts:
            forward = self._forward(frozenset(self._units) - frozenset(given_up))
            return others.count(others.predict(forward, self._progress, "Confirming"))

        return self._kept("confirm", given_up, judge, len(others))

    def _judge_all(self) -> PairedCounts:
        """Judge the plan with every unit in INT8, and put the images that it moves first."""
        if "moved" not in self._ledger:
            forward = self._forward(frozenset(self._units))
            found = self._answers.predict(forward, self._progress, "Judging INT8")
            self._ledger["moved"] = np.flatnonzero(found != self._answers.reference).tolist()
            counts = self._answers.count(found)
            self._ledger["plan:"] = [counts.lost, counts.gained]
        moved = np.array(self._ledger["moved"], np.intp)
        self._moved = len(moved)
        rest = np.setdiff1d(np.arange(len(self._answers)), moved)
        lost, gained = self._ledger["plan:"]
        counts = PairedCounts(len(self._answers), lost, gained)
        self._answers = self._answers.select(np.concatenate((moved, rest)))
        self.evaluations += 1
        return counts

    def _within(self, counts: PairedCounts) -> bool:
        return counts.drop_bound <= self._budget

    def _judge(self, given_up: list[str]) -> PairedCounts:
        def judge() -> PairedCounts:
            forward = self._forward(frozenset(self._units) - frozenset(given_up))
            return self._answers.compare(forward, self._is_hopeless)

        return self._kept("plan", given_up, judge, len(self._answers))

    def _kept(self, kind: str, given_up: list[str], judge: Callable[[], PairedCounts], images: int) -> PairedCounts:
        """A judgement of a plan: that of the ledger, else a new one, which is kept there."""
        key = f"{kind}:{','.join(sorted(given_up))}"
        if key not in self._ledger:
            counts = judge()
            self._ledger[key] = [counts.lost, counts.gained]
        self.evaluations += 1
        lost, gained = self._ledger[key]
        return PairedCounts(images, lost, gained)

    def _is_hopeless(self, seen: int, counts: PairedCounts) -> bool:
        luckier = PairedCounts(counts.images, counts.lost, counts.gained + _LUCK)
        return seen >= self._moved and not self._within(luckier)

    def _forward(self, units: frozenset[str]) -> Forward:
        layers = frozenset(layer for unit in units for layer in self._units[unit])
        return lambda images: self._simulation.logits(images, inputs=layers, weights=layers)
