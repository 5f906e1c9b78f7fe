"""Builds whose second output is the attention map."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from helpers import copied
from small_builds import RTX_IS_HERE, images, needs_rtx, network, options

import pcn_deploy
from pcn_deploy import CompileResult, Transform
from pcn_deploy.artefact.golden import GoldenSet
from pcn_deploy.engines.base import GraphSource
from pcn_deploy.engines.onnxruntime import _OnnxRuntimeSession
from pcn_deploy.engines.registry import get_backend
from pcn_deploy.errors import ModelError
from pcn_deploy.network.attention_map import output_attention_map
from pcn_deploy.network.deploy import to_deploy
from pcn_deploy.progress import silent
from pcn_deploy.proof.agreement import Forms, check_agreement
from pcn_deploy.tasks.limits import BUDGETS
from pcn_deploy.verbs import build as compiler
from pcn_deploy.verbs.steps.engine_builds import engine_builds
from pcn_deploy.verbs.steps.judging import JudgedBy

torch = pytest.importorskip("torch")
nn = torch.nn


@pytest.fixture(scope="module")
def mapped() -> dict[str, CompileResult]:
    """One build per precision with the attention map, of images that are not square."""
    wide = Transform(resolution=(32, 48))
    pixels = np.random.default_rng(1).standard_normal((12, 3, 32, 48), dtype=np.float32)
    rtx = ("tensorrt-rtx",) if RTX_IS_HERE else ()
    targets = {"fp32": ("cpu", "torchscript"), "fp16": ("cpu",), "int8": ("cpu", "torchscript", *rtx)}
    return {
        precision: pcn_deploy.compile(
            network(),
            options(precision=precision, targets=chosen, transform=wide, with_attention_map=True),
            calibration=pixels if precision == "int8" else None,
        )
        for precision, chosen in targets.items()
    }


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_the_attention_map_is_proven_too(mapped: dict[str, CompileResult], precision: str) -> None:
    result = mapped[precision]
    assert result
    assert list(result.bundle.manifest.to_json()["interface"]["outputs"]) == [
        {"name": "logits", "dtype": "float32", "shape": ("batch", 5), "role": "logits", "axes": ("batch", "class")},
        {
            "name": "attention_map",
            "dtype": "float32",
            "shape": ("batch", 1, 8, 12),
            "role": "attention_map",
            "axes": ("batch", "token", "height", "width"),
        },
    ]
    budget = BUDGETS[precision]
    for report in result.reports:
        assert report.executed_by == report.target or report.target == "tensorrt-rtx"
        assert report.metrics["attention_map_sqnr_db"] > budget.sqnr_db
        assert report.metrics["attention_map_cosine_min"] > budget.cosine_min
        assert 0 < report.metrics["attention_map_max_abs_error"] < 0.01
        assert result.bundle.read_json(f"parity/{report.target}.json")["metrics"] == report.metrics


def test_the_golden_set_holds_the_map_of_the_eager_network(mapped: dict[str, CompileResult]) -> None:
    golden = mapped["int8"].bundle.read_arrays("golden.npz")
    assert set(golden) == {
        *(
            "images",
            "names",
            "edge",
            "rounding",
            "float32_noise",
            "float32_noise_attention_map",
            "logits",
            "attention_map",
        ),
        *("simulated_logits", "simulated_attention_map", "widened_logits", "widened_attention_map"),
        "least_widened_db",
    }
    model, seen = network(), []
    model.blocks_token_only[0].register_forward_hook(lambda _module, _inputs, output: seen.append(output[1]))
    with torch.inference_mode():
        model(torch.from_numpy(golden["images"]))
    np.testing.assert_allclose(golden["attention_map"], seen[0].numpy(), atol=1e-6)
    assert golden["attention_map"].shape == (15, 1, 8, 12)


def test_a_spoiled_map_fails(mapped: dict[str, CompileResult], monkeypatch: pytest.MonkeyPatch) -> None:
    """The logits are right and the map is not: a fake answer of the session, for our own judgement."""
    built, real = mapped["fp32"].bundle, _OnnxRuntimeSession._run_impl

    def spoiled(self: Any, inputs: Any, out: Any) -> Any:
        found = real(self, inputs, out)
        return {**found, "attention_map": np.ascontiguousarray(found["attention_map"][:, :, ::-1])}

    bundle = copied(built)
    monkeypatch.setattr(_OnnxRuntimeSession, "_run_impl", spoiled)
    backends = [get_backend(name) for name in ("cpu", "torchscript")]
    spec = built.manifest.interface
    graphs = GraphSource(onnx=b"", torchscript=b"", spec=spec)
    with engine_builds(bundle, backends, graphs, silent) as builds:
        reports, *_ = compiler._prove(bundle, backends, builds, BUDGETS["fp32"], JudgedBy(), {}, silent)
    assert [bool(report) for report in reports] == [False, True]
    assert reports[0].failures
    assert all(failure.startswith("attention map: ") for failure in reports[0].failures)
    assert bundle.read_json("parity/cpu.json")["failures"] == list(reports[0].failures)


def test_graphs_whose_maps_differ_are_refused(
    mapped: dict[str, CompileResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle, real = mapped["fp32"].bundle, _OnnxRuntimeSession._run_impl
    spec = bundle.manifest.interface
    golden = GoldenSet.read(bundle)
    deployed = output_attention_map(to_deploy(network(), torch.from_numpy(golden.images[:1]))[0], (3, 32, 48))
    forms = Forms(eager=deployed, unrounded=deployed, simulated=deployed, stored=deployed, floating=deployed)
    check_agreement(bundle, golden, spec, forms, scripted=False, rounded=False)
    monkeypatch.setattr(
        _OnnxRuntimeSession,
        "_run_impl",
        lambda self, inputs, out: {**(found := real(self, inputs, out)), "attention_map": 1.1 * found["attention_map"]},
    )
    with pytest.raises(ModelError, match=r"The ONNX graph departs: it is -?\d+\.\d dB away"):
        check_agreement(bundle, golden, spec, forms, scripted=False, rounded=False)


def test_a_network_of_the_user_with_its_pooling_replaced() -> None:
    from pcn_deploy.models.aggregation import AttentionPool2d

    class Net(nn.Module):  # type: ignore[name-defined,misc]
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Sequential(nn.Conv2d(3, 32, 8, 4), nn.BatchNorm2d(32), nn.ReLU())
            self.avgpool: nn.Module = nn.AdaptiveAvgPool2d(1)  # type: ignore[name-defined]
            self.fc = nn.Linear(32, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[name-defined]
            return self.fc(torch.flatten(self.avgpool(self.stem(x)), 1))

    net = Net()
    with pytest.raises(ModelError, match=r"no attention-based aggregation.*--with-attention-map"):
        pcn_deploy.compile(net, options(with_attention_map=True))
    net.avgpool = AttentionPool2d(32, layer_scale=0.5)  # as trained: with 1e-4 the image changes next to nothing
    assert isinstance(net.avgpool, nn.Module)
    result = pcn_deploy.compile(net, options(precision="int8", with_attention_map=True), calibration=images())
    assert result
    assert result.bundle.manifest.interface.outputs[1].shape == ("batch", 1, 7, 7)
    assert result.bundle.manifest.rewrites["absorb_key_value"] == 1


@needs_rtx
def test_an_engine_for_another_device_gives_the_map_too(mapped: dict[str, CompileResult]) -> None:
    report = mapped["int8"].reports[2]
    assert report.target == "tensorrt-rtx"
    assert report.metrics["attention_map_sqnr_db"] > BUDGETS["int8"].sqnr_db
