"""The search for the plan that keeps an accuracy budget, on the network that was prepared."""

from __future__ import annotations

from pathlib import Path

from pcn_deploy.calibration.auto import take_best
from pcn_deploy.calibration.calibrators import PERCENTILE, calibrators_of
from pcn_deploy.calibration.quantized import apply_scales
from pcn_deploy.calibration.search.digests import run_digests
from pcn_deploy.calibration.search.ledger import Ledger
from pcn_deploy.calibration.search.search import Search, SearchResult
from pcn_deploy.calibration.search.sensitivity import rank
from pcn_deploy.calibration.search.simulate import Simulation
from pcn_deploy.data.images import ImageSource
from pcn_deploy.errors import ParityError
from pcn_deploy.progress import Progress
from pcn_deploy.proof.budget import Judges
from pcn_deploy.tasks.bound import CONFIDENCE
from pcn_deploy.verbs.steps.prepared import Prepared

RANKING_IMAGES = 64
"""Images on which the layers are ranked; an order needs fewer than a proof."""


def search_plan(
    network: Prepared, judges: Judges, record: Path | None, progress: Progress
) -> tuple[Prepared, SearchResult]:
    """Find the fewest layers to leave unquantised; before any is given up, the ranges of other calibrators are tried.

    Args:
        network: The network with every layer quantised that may be.
        judges: The images.
        record: Where judgements are kept, so that a killed search goes on; None for nowhere. It is left there.
        progress: Told how far the steps are.

    Returns:
        The network with the plan found, perhaps with other ranges, and what the search found.

    Raises:
        DataError: If `record` belongs to another run.
        ParityError: If no layer at all can be quantised within the budget.
    """
    ledger = Ledger.of_all(
        record,
        {**run_digests(network.deployed, network.scales, [judges.search, judges.proof]), "budget": judges.budget},
    )
    simulation, search = _search(network, judges, ledger, progress)
    if not search.holds_all():
        better = _with_better_ranges(network, judges.search.source, progress)
        if better is not network:
            network, ledger = better, ledger.part("other ranges")
            simulation, search = _search(network, judges, ledger, progress)
    units, chosen = network.units(), judges.search.spread(RANKING_IMAGES)

    def ranked() -> list[str]:
        return rank(simulation, units, chosen, ledger, progress)

    result = search.run(ranked)
    if judges.held_out and len(result.unquantized) < len(units):
        result = search.confirm(result, judges.proof, ranked)
    codes = network.plan.precision.upper()
    if len(result.unquantized) == len(units):
        last, counts = search.judge_last(ranked)
        msg = (
            f"No {codes} layer is left within the budget of {judges.budget} points of top-1. The best found is {last} "
            f"alone in {codes}: {counts.lost} of {counts.images} images lost, {counts.gained} gained, a drop of up to "
            f"{counts.drop_bound:.2f} with {CONFIDENCE:.0%} confidence. Build with --precision "
            f"{network.plan.remainder}, give more images with --data, or allow a larger drop."
        )
        raise ParityError(msg)
    left = frozenset(layer for unit in result.unquantized for layer in units[unit])
    reason = f"{codes} here would break the budget of {judges.budget} points of top-1"
    return network.leave_out(left, reason), result


def _search(network: Prepared, judges: Judges, ledger: Ledger, progress: Progress) -> tuple[Simulation, Search]:
    simulation = Simulation(network.unrounded, apply_scales(network.deployed, network.scales), network.scales)
    return simulation, Search(simulation, network.units(), judges.search, judges.budget, ledger, progress)


def _with_better_ranges(network: Prepared, source: ImageSource, progress: Progress) -> Prepared:
    """The network with the ranges of the calibrator that costs its logits least, where histograms were kept."""
    seen = network.calibration
    if seen is None or not all(each.counts.size for each in seen.statistics.values()):
        return network
    calibration = take_best(
        network.unrounded,
        lambda candidate: apply_scales(network.deployed, network.with_calibration(candidate).scales),
        seen,
        source,
        percentile=seen.percentile or PERCENTILE,
        names=calibrators_of(network.plan.precision),
        progress=progress,
    )
    return network if calibration.ranges == seen.ranges else network.with_calibration(calibration)
