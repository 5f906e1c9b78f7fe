"""FP16 builds of networks that normalise by hand: proven, and not proven where a node is left in FP16."""

from __future__ import annotations

from typing import Any

import pytest
from small_builds import images, options

import pcn_deploy
from pcn_deploy.specs import BatchRange

torch = pytest.importorskip("torch")
nn = torch.nn


class Standardised(nn.Module):  # type: ignore[misc, name-defined]
    """Divides by a standard deviation of 100s: the squares below it, which PyTorch does not show, are beyond FP16."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 16, 3, 2, 1, bias=False)
        self.mix, self.head = nn.Conv2d(16, 16, 1), nn.Linear(16, 5)

    def forward(self, x: Any) -> Any:
        y = torch.relu(self.stem(x)) * 300
        y = y / (y.std(1, keepdim=True) + 1e-8)
        return self.head(self.mix(y).mean((2, 3)))


def test_statistics_by_hand_are_proven_with_every_tensor_rounded() -> None:
    result = pcn_deploy.compile(Standardised(), options(precision="fp16"), calibration=images())
    assert result
    (report,) = result.reports
    assert report.executions["rounded"]["sqnr_db"] > 55
    (entry,) = (entry for entry in result.plan.entries if entry.precision == "fp32")
    assert entry.kind == "Standardised"
    assert {name.partition(".")[0] for name in entry.nodes} == {"ReduceMean", "Sub", "Mul", "Div", "Sqrt", "Add"}
    assert "Mul.0" not in entry.nodes, "the one before the standardisation"
    assert tuple(result.bundle.read_json("plan.json")["entries"][-1]["nodes"]) == entry.nodes


def test_the_proof_sees_what_onnx_runtime_hides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pcn_deploy.graph.keep.keep_nodes", lambda plan, *_: plan)
    result = pcn_deploy.compile(Standardised(), options(precision="fp16"), calibration=images())
    assert not result
    assert any(failure.startswith("rounded: ") for failure in result.reports[0].failures)


@pytest.mark.parametrize("batch", [1, 4])
def test_a_fixed_batch_builds_in_fp16(batch: int) -> None:
    fixed = BatchRange(min=batch, opt=batch, max=batch)
    result = pcn_deploy.compile(Standardised(), options(precision="fp16", batch=fixed), calibration=images())
    assert result
    assert result.bundle.manifest.interface.batch.max == batch


def test_a_group_norm_that_squares_beyond_fp16_is_fp32() -> None:
    network = nn.Sequential(nn.Conv2d(3, 16, 3, 2), nn.GroupNorm(4, 16), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    nn.init.constant_(network[0].weight, 30.0)
    result = pcn_deploy.compile(network, options(precision="fp16"), calibration=images())
    (entry,) = (entry for entry in result.plan.entries if entry.nodes)
    assert entry.nodes == ("InstanceNormalization.0",)
    assert "inside, above 8188" in entry.reason
    calm = nn.Sequential(nn.Conv2d(3, 16, 3, 2), nn.GroupNorm(4, 16), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    assert not any(entry.nodes for entry in pcn_deploy.compile(calm, options(precision="fp16")).plan.entries)
