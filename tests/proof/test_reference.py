"""What the golden set holds of a network and its simulation, however many images are run together."""

from __future__ import annotations

import numpy as np
import pytest
from torch import Tensor, nn

from pcn_deploy.artefact.golden import GoldenSet
from pcn_deploy.progress import silent
from pcn_deploy.proof.reference import _rows_in_double, with_simulation
from pcn_deploy.specs import BatchRange, EngineSpec, TensorSpec

BATCHES = [BatchRange(max=1), BatchRange(), BatchRange(min=2, opt=2, max=3), BatchRange(min=5, opt=5, max=5)]
IMAGES = np.random.default_rng(0).standard_normal((11, 1, 2, 2)).astype(np.float32)
SUMS = IMAGES.sum((2, 3))


class FakeSimulation(nn.Module):
    """A fake: the sum of each image, of batches that are in range."""

    def __init__(self, batch: BatchRange) -> None:
        super().__init__()
        self.batch = batch
        self.seen: list[int] = []

    def forward(self, images: Tensor) -> Tensor:
        """Sum up `(N, C, H, W)` to `(N, 1)`."""
        assert self.batch.min <= len(images) <= self.batch.max
        self.seen.append(len(images))
        return images.sum((2, 3))


def spec(batch: BatchRange) -> EngineSpec:
    inputs, outputs = (
        TensorSpec(name=name, dtype="float32", shape=("batch", *shape))
        for name, shape in (("images", (1, 2, 2)), ("logits", (1,)))
    )
    return EngineSpec(inputs=(inputs,), outputs=(outputs,), batch=batch)


@pytest.mark.parametrize("batch", BATCHES, ids=str)
def test_every_image_has_its_own_simulation(batch: BatchRange) -> None:
    golden = GoldenSet(
        images=IMAGES,
        names=tuple(map(str, range(len(IMAGES)))),
        edge=np.zeros(len(IMAGES), np.bool_),
        outputs={"logits": SUMS},
    )
    simulation = FakeSimulation(batch)
    np.testing.assert_array_equal(with_simulation(golden, simulation, spec(batch), silent).simulated["logits"], SUMS)
    assert len(simulation.seen) < len(IMAGES) or batch.max == 1


@pytest.mark.parametrize("batch", BATCHES, ids=str)
def test_every_image_has_its_own_answer_in_double(batch: BatchRange) -> None:
    rows = list(_rows_in_double(nn.Flatten(), IMAGES, batch))
    assert [row[0].dtype for row in rows] == [np.float64] * len(IMAGES)
    np.testing.assert_array_equal(np.concatenate([row[0] for row in rows]), IMAGES.reshape(len(IMAGES), -1))
