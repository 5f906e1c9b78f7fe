"""Scales of weights, one per output channel."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch

from pcn_deploy.calibration.scales import round_up_to_fp16
from pcn_deploy.calibration.weights import SHARES, squared_error, weight_scales

Floats = npt.NDArray[np.float32]


def identity(scales: Floats) -> Floats:
    return scales


def literal_error(row: Floats, scale: float) -> float:
    return float(((np.clip(np.rint(row / scale), -127, 127) * scale - row.astype(np.float64)) ** 2).sum())


def rows(kind: str) -> torch.Tensor:
    random = np.random.default_rng(1)
    made = {
        "normal": random.standard_normal((6, 300)),
        "laplace": random.laplace(size=(6, 40)),
        "outlier": np.append(random.standard_normal((6, 20_000)), np.full((6, 1), 9.0), axis=1),
        "tiny": random.standard_normal((6, 50)) * 1e-6,
    }[kind]
    return torch.from_numpy(made.astype(np.float32))


@pytest.mark.parametrize("stored", [identity, round_up_to_fp16])
@pytest.mark.parametrize("kind", ["normal", "laplace", "outlier", "tiny"])
def test_mse_takes_the_best_of_its_candidates_for_each_channel(kind: str, stored: type) -> None:
    weight = rows(kind)
    found = weight_scales(weight.reshape(6, -1, 1, 1), "mse", stored)
    largest = weight_scales(weight, "max", stored)
    assert found.dtype == largest.dtype == np.float32
    for row, scale, widest in zip(weight.numpy(), found, largest, strict=True):
        amax = np.abs(row).max()
        tried = [float(stored(np.array([amax * share / 127], np.float32))[0]) for share in SHARES]
        best = min(literal_error(row, each) for each in tried)
        assert literal_error(row, scale) <= best * (1 + 1e-4)
        assert literal_error(row, scale) <= literal_error(row, widest) * (1 + 1e-6)
        assert widest == tried[0]
    if kind == "outlier":
        assert (found < largest).all()


def test_an_outlier_is_clipped_as_far_as_it_pays() -> None:
    """Without rounding: s = 1 / (1 + K / (12 * 127^2)) for one outlier among K weights."""
    found = weight_scales(rows("outlier"), "mse", identity) * 127 / 9
    np.testing.assert_allclose(found, 1 / (1 + 20_001 / (12 * 127**2)), atol=0.012)


def test_errors_are_the_definition() -> None:
    weight = rows("normal")
    scales = np.linspace(0.01, 0.03, 6).astype(np.float32)
    expected = [literal_error(row, scale) for row, scale in zip(weight.numpy(), scales, strict=True)]
    np.testing.assert_allclose(squared_error(weight, scales), expected, rtol=1e-4)


@pytest.mark.parametrize("calibrator", ["max", "mse"])
def test_channels_of_zeros_and_of_the_least_numbers(calibrator: str) -> None:
    weight = torch.zeros(3, 8)
    weight[1] = 1e-44
    weight[2] = 1.0
    found = weight_scales(weight, calibrator, lambda scales: np.maximum(scales, np.finfo(np.float32).tiny))
    assert np.isfinite(found).all()
    assert (found > 0).all()
    assert found[0] == 1
    assert found[2] == np.float32(1 / 127)
