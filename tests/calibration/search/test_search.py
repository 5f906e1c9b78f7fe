"""The search, on a network in which some layers hurt; and its counts, on answers that are known."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_builds import images, network
from spoiled_network import HARMFUL, TRANSFORM, spoiled_network, units

from pcn_deploy.calibration.search import search as search_module
from pcn_deploy.calibration.search.evaluation import Answers
from pcn_deploy.calibration.search.ledger import Ledger
from pcn_deploy.calibration.search.search import Search, SearchResult
from pcn_deploy.calibration.search.sensitivity import measure_sensitivity, rank
from pcn_deploy.calibration.search.simulate import Simulation
from pcn_deploy.data.images import ImageSource
from pcn_deploy.data.transform import Transform
from pcn_deploy.errors import DataError
from pcn_deploy.network.deploy import to_deploy
from pcn_deploy.tasks.bound import PairedCounts
from pcn_deploy.tasks.changed import ChangedAnswer
from pcn_deploy.tasks.metrics import Answered


@pytest.fixture(scope="module")
def spoiled() -> tuple[Simulation, dict[str, str], ImageSource]:
    return spoiled_network()


def run(spoiled: tuple[Simulation, dict[str, str], ImageSource], budget: float, record: Path | None) -> SearchResult:
    simulation, _, source = spoiled
    answers = Answers.of(simulation.logits, source)
    ledger = Ledger(record, {"budget": budget})
    search = Search(simulation, units(simulation), answers, budget, ledger)
    return search.run(lambda: rank(simulation, units(simulation), answers.spread(32), ledger))


def greedy(simulation: Simulation, answers: Answers, ranking: list[str], budget: float) -> int:
    """The plain way: give up layers in order, judge each plan on all images, stop at the first that will do."""
    for count in range(len(ranking) + 1):
        left = set(ranking[count:])
        found = answers.predict(partial(simulation.logits, inputs=left, weights=left))
        if answers.count(found).drop_bound <= budget:
            return count
    raise AssertionError


def test_it_finds_the_layers_that_hurt(spoiled: tuple[Simulation, dict[str, str], ImageSource]) -> None:
    found = run(spoiled, 5.0, None)
    assert found.reached
    assert found.unquantized
    assert set(found.unquantized) <= HARMFUL
    assert found.counts.drop_bound <= 5.0


@pytest.mark.parametrize("budget", [1.0, 2.0, 8.0, 30.0])
def test_it_never_gives_up_more_layers_than_the_plain_way(
    spoiled: tuple[Simulation, dict[str, str], ImageSource], budget: float
) -> None:
    simulation, _, source = spoiled
    answers = Answers.of(simulation.logits, source)
    ranking = rank(simulation, units(simulation), answers.spread(32), Ledger(None, {}))
    found = run(spoiled, budget, None)
    assert len(found.unquantized) <= greedy(simulation, answers, ranking, budget)
    left = set(simulation.layers) - set(found.unquantized)
    assert found.counts == answers.count(answers.predict(partial(simulation.logits, inputs=left, weights=left)))


def test_a_killed_search_goes_on_where_it_stopped(
    spoiled: tuple[Simulation, dict[str, str], ImageSource], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record, simulation = tmp_path / "search", spoiled[0]
    whole = run(spoiled, 5.0, None)
    real, left = simulation.logits, [70]

    def dying(*given: Any, **named: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return real(*given, **named)

    monkeypatch.setattr(simulation, "logits", dying)
    with pytest.raises(KeyboardInterrupt):
        run(spoiled, 5.0, record)
    measured = len(record.read_text().splitlines())
    assert measured > 3
    left[0] = 10_000
    assert run(spoiled, 5.0, record) == whole
    left[0] = 0 + len(images(300)) // 16 + 1  # the answers of the network are asked for again; nothing else is
    assert run(spoiled, 5.0, record) == whole


def test_no_budget_is_kept_by_no_layer(spoiled: tuple[Simulation, dict[str, str], ImageSource]) -> None:
    """300 images cannot prove 0.1 points: all layers are given up, and still it is not reached."""
    found = run(spoiled, 0.1, None)
    assert not found.reached
    assert len(found.unquantized) == len(spoiled[0].layers)
    assert found.images_needed == 2703


def test_without_harm_no_layer_is_given_up_and_none_is_ranked(
    spoiled: tuple[Simulation, dict[str, str], ImageSource],
) -> None:
    simulation, _, source = spoiled
    harmless: dict[str, tuple[str, ...]] = {layer: (layer,) for layer in simulation.layers if layer not in HARMFUL}
    answers = Answers.of(simulation.logits, source)
    search = Search(simulation, harmless, answers, 5.0, Ledger(None, {}))
    found = search.run(lambda: pytest.fail("ranked"))
    assert found.unquantized == ()
    assert found.evaluations == 1


def test_sensitivity_tells_the_harmful_layers(spoiled: tuple[Simulation, dict[str, str], ImageSource]) -> None:
    simulation, kinds, source = spoiled
    found = measure_sensitivity(simulation, kinds, Answers.of(simulation.logits, source.subset(32)), Ledger(None, {}))
    assert {one.op for one in found.layers[:2]} == HARMFUL
    worst = found.layers[0]
    assert worst.weight_only is not None
    assert worst.input_only.sqnr_db < worst.weight_only.sqnr_db - 20
    kept = {one.op: one.only_kept.sqnr_db for one in found.layers}
    assert all(kept[harmful] > found.all_quantized.sqnr_db for harmful in HARMFUL)
    assert min(one.only_quantized.sqnr_db for one in found.layers) >= found.all_quantized.sqnr_db - 1
    assert worst.only_quantized.top1_drop is None


def test_quantised_in_full_it_is_the_quantised_network(
    spoiled: tuple[Simulation, dict[str, str], ImageSource],
) -> None:
    simulation, _, _ = spoiled
    batch = images(4)
    plain, every = simulation.logits(batch), set(simulation.layers)
    quantized = simulation.logits(batch, inputs=every, weights=every)
    deployed, _ = to_deploy(network(), torch.rand(1, 3, 32, 32))
    with torch.inference_mode():
        np.testing.assert_array_equal(plain, deployed(torch.from_numpy(batch)).numpy())
    one = simulation.layers[0]
    both = simulation.logits(batch, inputs={one}, weights={one})
    only_weight, only_input = simulation.logits(batch, weights={one}), simulation.logits(batch, inputs={one})
    for first, second in [(plain, quantized), (plain, only_weight), (plain, only_input), (both, only_input)]:
        assert not np.array_equal(first, second)
    np.testing.assert_array_equal(simulation.logits(batch), plain)


def test_answers_count_against_labels() -> None:
    """Logits that are known, for our own counting."""
    pixels = images(6)
    source = ImageSource([pixels], TRANSFORM)
    expected, reference = np.array([0, 1, 2, 0, 1, 2]), np.array([0, 1, 0, 0, 2, 2])
    answers = Answers(source, expected, reference, labelled=True, margins=np.arange(6.0))
    assert answers.count(np.array([0, 2, 2, 1, 1, 2])) == PairedCounts(6, lost=2, gained=2)
    chosen = answers.select(np.array([4, 1]))
    assert (chosen.expected.tolist(), chosen.reference.tolist()) == ([1, 1], [2, 1])
    (changed,) = chosen.changed("cpu", Answered(np.array([2, 0]), np.array([0.5, 0.25])))
    assert changed == ChangedAnswer("cpu", "array[1]", 1, 1, 1.0, 0, 0.25)
    np.testing.assert_array_equal(next(chosen.source.batches(2))[0], pixels[[4, 1]])
    assert sorted(answers.spread(3).expected.tolist()) == [0, 1, 2], "each class has its share"


def test_unreadable_images_are_left_out_of_the_answers(tmp_path: Path) -> None:
    from PIL import Image

    for index in range(30):
        Image.fromarray(np.full((32, 32, 3), 8 * index, np.uint8)).save(tmp_path / f"{index:02d}.png")
    (tmp_path / "03.png").write_bytes(b"no image")
    source = ImageSource(tmp_path, TRANSFORM)
    answers = Answers.of(lambda batch: batch.mean((2, 3)), source)
    assert len(answers) == len(answers.source) == 29
    assert sum(len(batch) for batch, _ in answers.source.batches(8)) == 29


def test_labels_outside_the_head_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "set.npz", images=np.zeros((2, 32, 32, 3), np.uint8), labels=np.array([0, 7]))
    with pytest.raises(DataError, match="Labels run from 0 to 7; the network has 3 classes"):
        Answers.of(lambda batch: batch.mean((2, 3)), ImageSource(tmp_path / "set.npz", TRANSFORM))


def test_logits_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(DataError, match="NaN or infinite logits"):
        Answers.of(lambda batch: batch.mean((2, 3)) * np.nan, ImageSource([images(2)], TRANSFORM))


def test_a_plan_is_not_given_up_before_the_moved_images_are_seen() -> None:
    """Ten images lost first and ten gained later: on the whole nothing is lost."""
    stop = search_module.Search.__new__(search_module.Search)
    stop._budget, stop._moved = 1.0, 200
    assert not stop._is_hopeless(100, PairedCounts(1000, 30, 0))
    assert stop._is_hopeless(200, PairedCounts(1000, 30, 0))
    assert not stop._is_hopeless(200, PairedCounts(1000, 4, 0))


class KnownCounts(Search):
    """A fake: images lost by the number of layers given up, on those that chose the plan and on the others."""

    def __init__(self, first: list[int], others: list[int]) -> None:
        self._units = {name: (name,) for name in "abcdefgh"}
        self._budget, self.evaluations = 0.5, 0
        self._first, self._others = first, others
        self.asked: list[int] = []

    def _judge(self, given_up: Any) -> PairedCounts:
        return PairedCounts(3000, lost=self._first[len(list(given_up))])

    def _judge_on(self, others: Answers, given_up: list[str]) -> PairedCounts:
        self.asked.append(len(given_up))
        return PairedCounts(3000, lost=self._others[len(given_up)])


FOUND = SearchResult(budget=0.5, unquantized=("a",), counts=PairedCounts(3000, 7), reached=True, evaluations=3)


@pytest.mark.parametrize(
    ("others", "asked", "left", "reached"),
    [
        ([99, 3, 2, 1, 1, 1, 1, 30], [1], "a", True),
        ([99, 30, 30, 1, 1, 1, 1, 1], [1, 7, 6, 5, 4, 3, 2], "bac", True),
        ([99, 30, 1, 1, 1, 1, 30, 1], [1, 7, 6], "bacdefg", True),
        ([99, 30, 1, 1, 1, 1, 1, 30], [1, 7], "bacdefg", False),
        ([99, 8, 1, 1, 1, 1, 1, 1], [1, 7, 6, 5, 4, 3, 2], "ba", True),  # 8 are within the budget, not with the slack
    ],
)
def test_the_last_plan_that_holds_on_other_images_is_taken(
    others: list[int], asked: list[int], left: str, reached: bool
) -> None:
    search = KnownCounts([30, 7, 6, 5, 5, 5, 0, 0], others)
    found = search.confirm(FOUND, range(3000), lambda: list("bacdefgh"))  # type: ignore[arg-type]
    assert search.asked == asked, "the plan found, else from the safe one to the first that does not hold"
    assert found.unquantized == tuple(left)
    assert found.reached is reached
    assert found.confirmed == PairedCounts(3000, lost=others[len(left)])


def test_beyond_the_safe_plan_steps_grow() -> None:
    search = KnownCounts([0] * 8, [0, 99, 0, 0, 0, 0, 0, 0])
    found = search.confirm(FOUND, range(3000), lambda: list("bacdefgh"))  # type: ignore[arg-type]
    assert found.unquantized == ("b", "a")
    assert search.asked == [1, 7, 6, 4, 3, 2], "2 is safe, then 1, 2, 4 and at most all but one"


class Painted:
    """A fake: the answer is the first pixel; all-INT8 answers those wrongly whose second pixel says so."""

    def __init__(self) -> None:
        self.images = 0

    def logits(self, images: Any, *, inputs: Any = (), weights: Any = ()) -> Any:
        self.images += len(images)
        wrong = images[:, 0, 0, 1] if inputs else np.zeros(len(images))
        return np.eye(10, dtype=np.float32)[((images[:, 0, 0, 0] + wrong) % 10).astype(int)]


@pytest.mark.parametrize(("lost", "asked", "within"), [(0, 1008, True), (8, 2000, True), (400, 4000, False)])
def test_a_plan_is_judged_on_no_more_images_than_it_needs(lost: int, asked: int, within: bool) -> None:
    """The images come class by class, and those that are lost are all of the last: the first say nothing of them."""
    pictures = np.zeros((4000, 1, 1, 2), np.float32)
    pictures[:, 0, 0, 0] = np.arange(4000) // 400
    pictures[4000 - lost :, 0, 0, 1] = 1
    painted = Painted()
    answers = Answers.of(painted.logits, ImageSource([pictures], Transform(resolution=(1, 2), mean=(0.5,), std=(0.5,))))
    search = Search(painted, {"a": ("a",)}, answers, 1.0, Ledger(None, {}))  # type: ignore[arg-type]
    painted.images = 0
    found = search.run(lambda: ["a"])
    assert found.reached
    assert (found.unquantized == ()) == within
    assert painted.images == (asked if within else 2 * asked)
    assert found.counts.drop_bound <= 1.0
    if within:
        assert found.counts.images == asked
        painted.images = 0
        assert search.confirm(found, answers, lambda: ["a"]).confirmed == found.counts
        assert painted.images == asked


def test_labels_that_are_right_by_chance_only_are_refused(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    logits, labels = rng.random((90, 3), np.float32), rng.integers(0, 3, 90)
    np.savez(tmp_path / "set.npz", images=np.zeros((90, 32, 32, 3), np.uint8), labels=labels)
    source = ImageSource(tmp_path / "set.npz", TRANSFORM)
    answers = iter(np.array_split(logits, range(16, 90, 16)))
    with pytest.raises(DataError, match=r"right on \d+\.\d % of the 90 labelled images .* no more than by chance"):
        Answers.of(lambda _: next(answers), source)
    answers = iter(np.array_split(logits + 2 * np.eye(3, dtype=np.float32)[labels], range(16, 90, 16)))
    assert Answers.of(lambda _: next(answers), source).top1 == 100
