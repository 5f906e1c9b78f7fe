"""The budget search: its cost against one full sensitivity pass, and its layers against the plain order.

Usage: python benchmarks/search.py [--images N]

On the networks of the examples, simulated, with ranges that clip hard (percentile 99) so that there is something to
give up. Cost is counted in images that went through a network, one at a time.
"""

from __future__ import annotations

import argparse
from collections.abc import Collection
from functools import partial

import numpy as np
import numpy.typing as npt
from measure import Row, print_rows, verdict
from trained import Task, tasks

from pcn_deploy import CompileOptions, ImageSource
from pcn_deploy.budget import RANKING_IMAGES
from pcn_deploy.calibration.evaluation import Answers
from pcn_deploy.calibration.ledger import Ledger
from pcn_deploy.calibration.quantized import apply_scales
from pcn_deploy.calibration.search import Search
from pcn_deploy.calibration.sensitivity import measure_sensitivity, rank
from pcn_deploy.calibration.simulate import Simulation
from pcn_deploy.preparation import Prepared, prepare
from pcn_deploy.progress import silent

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
    simulation.images = 0
    measure_sensitivity(simulation, kinds, answers, Ledger(None, {}))
    sensitivity = simulation.images
    ranked = answers.spread(RANKING_IMAGES)
    ranking = rank(simulation, network.units(), ranked, Ledger(None, {}))
    rows: list[Row] = [(f"{task.name}: images of a full sensitivity pass", f"{sensitivity:,}", "", "")]
    for budget in BUDGETS:
        simulation.images = 0
        search = Search(simulation, network.units(), answers, budget, Ledger(None, {}))
        found = search.run(partial(rank, simulation, network.units(), ranked, Ledger(None, {})))
        cost = simulation.images / sensitivity
        plain = plain_order(simulation, network, answers, ranking, budget)
        ours = len(found.unquantized)
        name = f"{task.name}, budget {budget}"
        rows.append(
            (f"{name}: cost over a sensitivity pass", f"{cost:.2f}", f"< {COST_LIMIT}", verdict(cost < COST_LIMIT))
        )
        what = f"{ours} of {len(ranking)}, {found.evaluations} plans"
        rows.append((f"{name}: layers given up, plain order {plain}", what, f"<= {plain}", verdict(ours <= plain)))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=int, default=2000, help="test images of each task")
    for task in tasks(parser.parse_args().images):
        print_rows(f"{task.name}, {len(task.images)} images", run(task))


if __name__ == "__main__":
    main()
