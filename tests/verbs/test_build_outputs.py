"""Networks that return no logits, or more than those: from the build to `run`."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from helpers import invoke
from PIL import Image
from small_builds import images, options

import pcn_deploy
from pcn_deploy import Bundle
from pcn_deploy.errors import DataError, OptionError
from pcn_deploy.proof.executions import prove
from pcn_deploy.verbs.analyze import analyze

torch = pytest.importorskip("torch")

from torch import Tensor, nn  # noqa: E402


class Several(nn.Module):
    """A dict of logits, of a map, and of an embedding whose constant part is large."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Sequential(nn.Conv2d(3, 32, 3, 2, 1), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 32, 3, 2, 1))
        self.classes, self.mask, self.embedding = nn.Linear(32, 5), nn.Conv2d(32, 4, 1), nn.Linear(32, 8)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        feature = self.stem(x).relu()
        row = feature.mean((2, 3))
        return {"logits": self.classes(row), "mask": self.mask(feature), "embedding": self.embedding(row) + 10}


class Map(Several):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return self.mask(self.stem(x).relu())  # type: ignore[no-any-return]


def wanted(given: Any) -> dict[str, Any]:
    with torch.no_grad():
        return {name: tensor.numpy() for name, tensor in Several().eval()(torch.from_numpy(given)).items()}


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_a_dict_is_built_whole(precision: str, tmp_path: Path) -> None:
    chosen = options(precision=precision, targets=("cpu", "torchscript") if precision != "fp16" else ("cpu",))
    result = pcn_deploy.compile(Several(), chosen, calibration=images())
    assert result, [report.failures for report in result.reports]
    roles = {"logits": "logits", "mask": "tensor", "embedding": "tensor"}
    for report in result.reports:
        assert report.outputs == roles
        assert {"mask", "embedding"} <= report.parts.keys()
        assert report.metrics["mask_sqnr_db"] > {"fp32": 100, "fp16": 50, "int8": 20}[precision]
        assert "embedding_sqnr_changes_db" in report.metrics
    result.bundle.save(tmp_path / "net.pcn")
    engine = pcn_deploy.load(tmp_path / "net.pcn", "cpu")
    given = images(3)
    found = engine.outputs(given)
    for name, values in wanted(given).items():
        np.testing.assert_allclose(found[name], values, atol={"fp32": 1e-4, "fp16": 2e-2, "int8": 0.2}[precision])
    np.testing.assert_array_equal(engine(given), found["logits"])
    report = pcn_deploy.verify(engine, given, reference=Several())
    assert report, report.failures
    assert report.outputs == roles


def test_a_map_is_judged_as_it_stands(tmp_path: Path) -> None:
    result = pcn_deploy.compile(Map(), options(precision="int8"), calibration=images())
    (report,) = result.reports
    assert report.outputs == {"output": "tensor"}
    assert "top1_agreement" not in report.metrics
    assert {"sqnr_db", "sqnr_changes_db", "cosine_min", "max_abs_error"} <= report.metrics.keys()
    assert "has the role tensor" in result.bundle.manifest.judged.accuracy
    path = tmp_path / "map.pcn"
    result.bundle.save(path)
    Image.effect_noise((40, 40), 80).save(tmp_path / "noise.png")
    answer = json.loads(invoke("run", path, tmp_path / "noise.png", "--json").stdout)["predictions"][0]
    assert answer["classes"] == []
    assert answer["outputs"]["output"]["shape"] == [4, 8, 8]
    assert "4x8x8" in invoke("run", path, tmp_path / "noise.png").output
    shown = invoke("verify", path)
    assert shown.exit_code == 0, shown.output
    assert "top-1" not in shown.output
    assert invoke("bench", path, "--seconds", "0.01").exit_code == 0
    assert invoke("inspect", path).exit_code == 0


def test_an_output_that_is_wrong_in_what_images_change_fails() -> None:
    """The embedding has a constant part so large that cosine and SQNR tell nothing of the rest."""
    bundle = pcn_deploy.compile(Several(), options(precision="fp16"), calibration=images()).bundle
    golden = dict(bundle.read_arrays("golden.npz"))
    right, usual = golden["embedding"], golden["embedding"][~golden["edge"]].mean(0)
    golden["embedding"] = (right + 0.3 * (right[::-1] - usual)).astype(np.float32)
    report = prove(_with_golden(bundle, golden), "cpu")
    assert not report
    assert not report.parts["embedding"]
    assert report.metrics["embedding_sqnr_db"] > report.budget.sqnr_db
    (failure,) = [failure for failure in report.failures if failure.startswith("embedding: SQNR")]
    assert "what the image changes" in failure


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
@pytest.mark.parametrize("large", [0, 10_000])
def test_a_further_output_that_ignores_the_image_fails(precision: str, large: float) -> None:
    """Beside a constant so large that SQNR is that of right engines."""

    class Large(Several):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            logits, _, embedding = super().forward(x).values()
            return {"logits": logits, "embedding": embedding + large}

    result = pcn_deploy.compile(Large(), options(precision=precision), calibration=images())
    assert result, result.reports
    bundle = result.bundle
    golden = bundle.read_arrays("golden.npz")
    assert not golden["rounding"].all()
    model, constant = onnx.load_from_string(bundle.read("model.onnx")), golden["embedding"][~golden["edge"]].mean(0)
    for node in model.graph.node:
        node.output[:] = ["right" if name == "embedding" else name for name in node.output]
    values = {"zero": np.float32(0), "constant": constant[None].astype(np.float32)}
    model.graph.initializer.extend(onnx.numpy_helper.from_array(np.array(one), name) for name, one in values.items())
    model.graph.node.append(onnx.helper.make_node("Mul", ["right", "zero"], ["none"]))
    model.graph.node.append(onnx.helper.make_node("Add", ["none", "constant"], ["embedding"]))
    members = {name: bundle.read(name) for name in bundle.manifest.members if name != "model.onnx"}
    wrong = Bundle(replace(bundle.manifest, members={}), {**members, "model.onnx": model.SerializeToString()})
    report = prove(wrong, "cpu")
    assert not report, report.metrics
    assert not report.parts["embedding" if precision == "fp32" else "widened"]


def _with_golden(bundle: Bundle, arrays: dict[str, Any]) -> Bundle:
    import io

    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    members = {name: bundle.read(name) for name in bundle.manifest.members if name != "golden.npz"}
    return Bundle(replace(bundle.manifest, members={}), {**members, "golden.npz": buffer.getvalue()})


def test_outputs_are_chosen_and_given_a_role() -> None:
    names = ("embedding:logits", "mask")
    result = pcn_deploy.compile(Several(), options(precision="fp32", output_names=names), calibration=images())
    assert [(one.name, one.role) for one in result.bundle.manifest.interface.outputs] == [
        ("embedding", "logits"),
        ("mask", "tensor"),
    ]
    assert "top1_agreement" in result.reports[0].metrics


def test_what_needs_answers_is_refused_without_logits(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"--max-drop needs the answers of a classifier.*--output-name output:logits"):
        pcn_deploy.compile(Map(), options(precision="int8", max_drop=1.0), calibration=images(400))
    with pytest.raises(OptionError, match="analyze needs the answers"):
        analyze(Map(), options(precision="int8"), images())
    with pytest.raises(OptionError, match="Unknown role 'boxes'"):
        options(output_names=("mask:boxes",))


def test_the_attention_map_beside_other_outputs() -> None:
    from pcn_deploy.models.aggregation import AttentionPool2d

    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.stem, self.pool, self.head = nn.Conv2d(3, 32, 4, 4), AttentionPool2d(32), nn.Linear(32, 5)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            feature = self.stem(x).relu()
            return {"logits": self.head(self.pool(feature).flatten(1)), "feature": feature}

    result = pcn_deploy.compile(Pooled(), options(precision="fp32", with_attention_map=True), calibration=images())
    assert result, result.reports[0].failures
    assert result.reports[0].outputs == {"logits": "logits", "feature": "tensor", "attention_map": "attention_map"}


def without(batch: Any) -> Any:
    return {"other": torch.zeros(len(batch), 5)}


def test_a_reference_without_the_first_output(tmp_path: Path) -> None:
    bundle = pcn_deploy.compile(Several(), options(precision="fp32"), calibration=images()).bundle
    bundle.save(tmp_path / "net.pcn")
    engine = pcn_deploy.load(tmp_path / "net.pcn", "cpu")
    with engine, pytest.raises(DataError, match="The reference returned"):
        pcn_deploy.verify(engine, images(3), reference=without)


def test_outputs_with_names_that_bundles_use_themselves(tmp_path: Path) -> None:
    class Named(Several):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            logits, mask, embedding = super().forward(x).values()
            return {"logits": logits, "images": mask, "names": embedding, "simulated_logits": embedding + 1}

    result = pcn_deploy.compile(Named(), options(precision="int8"), calibration=images())
    assert result, result.reports[0].failures
    result.bundle.save(tmp_path / "net.pcn")
    with pcn_deploy.load(tmp_path / "net.pcn", "cpu") as engine:
        found = engine.outputs(images(2))
        assert pcn_deploy.verify(engine)
    assert list(found) == ["logits", "_images", "_names", "_simulated_logits"]
    np.testing.assert_allclose(found["_images"], wanted(images(2))["mask"], atol=0.2)


def test_a_backbone_that_ends_with_equal_blocks() -> None:
    class Backbone(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            block = (nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.ReLU()) for _ in range(3))
            self.stem, self.blocks = nn.Conv2d(3, 16, 4, 4), nn.Sequential(*block)

        def forward(self, x: Tensor) -> Tensor:
            return self.blocks(self.stem(x))  # type: ignore[no-any-return]

    for precision in ("fp16", "int8"):
        result = pcn_deploy.compile(Backbone(), options(precision=precision), calibration=images())
        assert result, result.reports[0].failures
        assert [one.name for one in result.bundle.manifest.interface.outputs] == ["output"]


def test_two_outputs_that_are_equal_are_both_built() -> None:
    class Equal(Several):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            row = self.stem(x).relu().mean((2, 3))
            return {"a": self.classes(row), "b": self.classes(row)}

    result = pcn_deploy.compile(Equal(), options(precision="fp32", targets=("cpu", "torchscript")))
    assert result, [report.failures for report in result.reports]
    assert [one.name for one in result.bundle.manifest.interface.outputs] == ["a", "b"]
