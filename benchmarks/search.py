"""The budget search: its cost against one full sensitivity pass, and its layers against the plain order.

Usage: python benchmarks/search.py [--images N]

On the networks of the examples, simulated, with ranges that clip hard (percentile 99) so that there is something to
give up. Cost is counted in images that went through a network, one at a time, over a full sensitivity pass on the
images that choose the plan. "confirmed" adds what the other half of the images costs and asks for, of both orders.
"""

from __future__ import annotations

import argparse
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import numpy.typing as npt
from measure import Row, print_rows, verdict
from trained import Task, tasks

from pcn_deploy import CompileOptions, ImageSource
from pcn_deploy.calibration.quantized import apply_scales
from pcn_deploy.calibration.search.evaluation import Answers
from pcn_deploy.calibration.search.ledger import Ledger
from pcn_deploy.calibration.search.search import Search
from pcn_deploy.calibration.search.sensitivity import measure_sensitivity, rank
from pcn_deploy.calibration.search.simulate import Simulation
from pcn_deploy.progress import silent
from pcn_deploy.proof.budget import Judges
from pcn_deploy.tasks.bound import PairedCounts, images_needed
from pcn_deploy.verbs.steps.preparation import prepare
from pcn_deploy.verbs.steps.prepared import Prepared
from pcn_deploy.verbs.steps.search_plan import RANKING_IMAGES

BUDGETS = (0.4, 0.8, 1.5)
COST_LIMIT = 3


class Counted(Simulation):
    """A simulation that counts images."""

    def __init__(self, network: Prepared) -> None:
        super().__init__(network.deployed, apply_scales(network.deployed, network.scales), network.scales)
        self.images = 0

    def logits(
        self, images: npt.NDArray[np.float32], *, inputs: Collection[str] = (), weights: Collection[str] = ()
    ) -> npt.NDArray[np.float32]:
        """As the simulation."""
        self.images += len(images)
        return super().logits(images, inputs=inputs, weights=weights)


def plain_order(simulation: Simulation, network: Prepared, answers: Answers, ranking: list[str], budget: float) -> int:
    """Layers given up one after the other, each plan judged on every image, until the first that keeps the budget."""
    units = network.units()
    for count in range(len(ranking) + 1):
        left = {layer for unit in ranking[count:] for layer in units[unit]}
        found = answers.predict(partial(simulation.logits, inputs=left, weights=left))
        if answers.count(found).drop_bound <= budget:
            return count
    return len(ranking)


def run(task: Task) -> list[Row]:
    """The rows of a task."""
    source = ImageSource([task.calibration], task.transform)
    options = CompileOptions(
        precision="int8", remainder="fp32", calibrator="percentile", percentile=99.0, transform=task.transform
    )
    network = prepare(task.network, options, source, silent)
    simulation, kinds = Counted(network), {entry.op: entry.kind for entry in network.plan.entries}
    reference = simulation.logits(task.images).argmax(1)
    answers = Answers(ImageSource([task.images], task.transform), task.labels, reference, labelled=True)
    rows: list[Row] = []
    for budget in BUDGETS:
        if len(answers) < images_needed(PairedCounts(len(answers)), budget):
            rows.append((f"{task.name}, budget {budget}", "too few images to prove it: refused", "", ""))
            continue
        judges = Judges.share_out(answers, budget, searching=True)
        rows += [
            (f"{task.name}, budget {budget}: {what}", *rest)
            for what, *rest in compare(simulation, network, kinds, judges)
        ]
    return rows


def compare(simulation: Counted, network: Prepared, kinds: dict[str, str], judges: Judges) -> Iterator[Row]:
    """The cost and the layers of one search, whose plan the other half of the images confirms if they are enough."""
    units, budget = network.units(), judges.budget
    simulation.images = 0
    measure_sensitivity(simulation, kinds, judges.search, Ledger(None, {}))
    sensitivity, simulation.images = simulation.images, 0
    ledger = Ledger(None, {})
    ranked = partial(rank, simulation, units, judges.search.spread(RANKING_IMAGES), ledger)
    search = Search(simulation, units, judges.search, budget, ledger)
    found = search.run(ranked)
    cost = simulation.images / sensitivity
    ranking = ranked()
    plain = plain_order(simulation, network, judges.search, ranking, budget)
    yield row("search", cost, found.unquantized, ranking[:plain])
    if not judges.held_out or len(found.unquantized) == len(units):
        return
    simulation.images = 0
    confirmed = search.confirm(found, judges.proof, ranked)
    cost += simulation.images / sensitivity
    as_plain = search.confirm(replace(found, unquantized=tuple(ranking[:plain])), judges.proof, ranked)
    yield row("confirmed", cost, confirmed.unquantized, as_plain.unquantized)


def row(what: str, cost: float, ours: Sequence[str], plain: Sequence[str]) -> Row:
    """One line: layers given up by the search and by the plain order, and the cost over a sensitivity pass."""
    layers = f"{len(ours)} layers given up, plain order {len(plain)}; cost {cost:.2f}"
    return what, layers, f"<= {len(plain)}; < {COST_LIMIT}", verdict(len(ours) <= len(plain) and cost < COST_LIMIT)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=int, default=2000, help="test images of each task")
    for task in tasks(parser.parse_args().images):
        print_rows(f"{task.name}, {len(task.images)} images", run(task))


if __name__ == "__main__":
    main()
