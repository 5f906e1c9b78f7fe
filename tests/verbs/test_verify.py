"""The verb `verify`: against the golden set, images and any reference."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import copied
from PIL import Image

import pcn_deploy
from pcn_deploy import BatchRange, Bundle, CompileOptions, ImageSource, ParityBudget, Transform
from pcn_deploy.errors import BundleError, DataError

torch = pytest.importorskip("torch")

CLASSES = 3


def network(seed: int = 0) -> Any:
    return pcn_deploy.create_model(
        "patchconvnet", random_weights=True, width=32, depth=1, patch=4, num_classes=CLASSES, layer_scale=0.5, seed=seed
    )


def eager(images: Any) -> Any:
    with torch.inference_mode():
        return network()(torch.from_numpy(images)).numpy()


def images(count: int) -> Any:
    return np.random.default_rng(3).standard_normal((count, 3, 32, 32), dtype=np.float32)


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    options = CompileOptions(
        precision="fp32",
        targets=("cpu", "torchscript"),
        transform=Transform(resolution=(32, 32)),
        batch=BatchRange(min=1, opt=2, max=4),
    )
    return pcn_deploy.compile(network(), options).bundle


@pytest.fixture
def path(bundle: Bundle, tmp_path: Path) -> Path:
    return copied(bundle).save(tmp_path / "tiny.pcn")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five images of random pixels in the folders of three classes, one of them without images of its own."""
    root, random = tmp_path / "images", np.random.default_rng(4)
    for index, label in enumerate([0, 0, 1, 2, 2]):
        place = root / str(label)
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(place / f"{index}.png")
    return root


@pytest.mark.parametrize("target", ["cpu", "torchscript"])
def test_the_golden_set_needs_nothing_else(path: Path, target: str) -> None:
    with pcn_deploy.load(path, target) as engine:
        report = pcn_deploy.verify(engine)
    assert report
    assert (report.target, report.executed_by, report.data, report.images) == (target, target, "golden", 8)
    assert "top1_drop" not in report.metrics
    assert report.budget == engine.bundle.manifest.parity_budget


def test_a_labelled_folder(path: Path, folder: Path) -> None:
    with pcn_deploy.load(path, "cpu") as engine:
        report = pcn_deploy.verify(engine, folder, reference=network())
        labels = [0, 0, 1, 2, 2]
        source = ImageSource(folder, engine.transform)
        logits = eager(np.stack([sample.image for sample in source]))
    assert report
    assert (report.images, report.data) == (5, str(folder))
    accuracy = 100 * np.mean(logits.argmax(1) == labels)
    assert report.metrics["top1_reference"] == pytest.approx(accuracy)
    assert report.metrics["top1_engine"] == pytest.approx(accuracy)
    assert report.metrics["top1_drop"] == 0


def test_a_function_is_a_reference_too(path: Path) -> None:
    batches: list[int] = []

    def reference(batch: Any) -> Any:
        batches.append(len(batch))
        return eager(batch)

    with pcn_deploy.load(path, "cpu") as engine:
        report = pcn_deploy.verify(engine, [images(6)], reference=reference)
    assert report
    assert report.images == 6
    assert batches == [4, 2]


def test_the_network_and_its_function_give_the_same_numbers(path: Path) -> None:
    with pcn_deploy.load(path, "cpu") as engine:
        one = pcn_deploy.verify(engine, [images(4)], reference=network())
        other = pcn_deploy.verify(engine, [images(4)], reference=eager)
    measured = one.metrics.pop("changes_kept_db")
    assert measured > 100
    assert one.metrics == other.metrics, "of a function, nobody knows how it rounds"


@pytest.mark.parametrize("data", ["golden", "images"])
def test_another_network_is_no_parity(path: Path, bundle: Bundle, data: str) -> None:
    """A golden set, or a reference, of other weights."""
    with torch.inference_mode():
        logits = network(seed=1)(torch.from_numpy(images(4))).numpy()
    altered = Bundle.open(path)
    buffer = io.BytesIO()
    np.savez(buffer, images=images(4), logits=logits)  # as a bundle of 0.1.0 has them: no names, no edge images
    altered.add("golden.npz", buffer.getvalue())
    altered.save(path, overwrite=True)
    with pcn_deploy.load(path, "cpu") as engine:
        given: dict[str, Any] = {} if data == "golden" else {"data": [images(4)], "reference": network(seed=1)}
        report = pcn_deploy.verify(engine, **given)
    assert not report
    assert any("SQNR" in failure for failure in report.failures)


def test_the_budget_given_decides(path: Path) -> None:
    wide = ParityBudget(cosine_min=0.9, sqnr_db=40.0, top1_drop=0.0)
    narrow = ParityBudget(cosine_min=0.9, sqnr_db=80.0, top1_drop=0.0)

    def nearly(batch: Any) -> Any:
        return eager(batch) * np.float32(1.001)  # 60 dB

    with pcn_deploy.load(path, "cpu") as engine:
        reports = [pcn_deploy.verify(engine, [images(4)], reference=nearly, budget=each) for each in (wide, narrow)]
    assert [bool(report) for report in reports] == [True, False]
    assert [report.budget for report in reports] == [wide, narrow]


def test_pictures_that_hardly_differ_are_noted(path: Path) -> None:
    """One scene with noise, whose changes are below the last digits of the reference."""
    rng = np.random.default_rng(0)

    def reference(batch: Any) -> Any:
        logits = eager(batch)
        return (logits + 7e-5 * rng.standard_normal(logits.shape)).astype(np.float32)

    with pcn_deploy.load(path, "cpu") as engine:
        report = pcn_deploy.verify(engine, [images(1) + np.float32(3e-4) * images(16)], reference=reference)
    assert report.metrics["sqnr_changes_db"] < 6
    assert report, report.failures
    assert len(report.notes) == 1


def test_the_limit_spreads_over_the_images(path: Path, folder: Path) -> None:
    with pcn_deploy.load(path, "cpu") as engine:
        report = pcn_deploy.verify(engine, folder, reference=network(), limit=2)
    assert report.images == 2
    assert "top1_reference" in report.metrics


def test_images_without_a_reference_are_refused(path: Path) -> None:
    with pcn_deploy.load(path, "cpu") as engine, pytest.raises(DataError, match=r"nothing to compare with.*--weights"):
        pcn_deploy.verify(engine, [images(2)])


def test_labels_outside_the_classes(path: Path, tmp_path: Path) -> None:
    npz = tmp_path / "set.npz"
    np.savez(npz, images=images(4), labels=np.array([0, 1, 2, CLASSES]))
    with pcn_deploy.load(path, "cpu") as engine, pytest.raises(DataError, match=r"Labels run from 0 to 3.*3 classes"):
        pcn_deploy.verify(engine, npz, reference=network())


def test_a_reference_of_another_shape(path: Path) -> None:
    with pcn_deploy.load(path, "cpu") as engine, pytest.raises(DataError, match=r"\(2, 7\) and engine logits \(2, 3\)"):
        pcn_deploy.verify(engine, [images(2)], reference=lambda batch: np.zeros((len(batch), 7), np.float32))


def test_a_golden_set_without_logits(path: Path) -> None:
    bundle, buffer = Bundle.open(path), io.BytesIO()
    np.savez(buffer, images=images(2))
    bundle.add("golden.npz", buffer.getvalue())
    bundle.save(path, overwrite=True)
    with pcn_deploy.load(path, "cpu") as engine, pytest.raises(BundleError, match=r"holds \['images'\] instead of"):
        pcn_deploy.verify(engine)


def with_golden(path: Path, **changed: Any) -> Path:
    """The bundle with other arrays in its golden set; None takes one out."""
    bundle, buffer = Bundle.open(path), io.BytesIO()
    golden = {**bundle.read_arrays("golden.npz"), **changed}
    np.savez(buffer, **{name: values for name, values in golden.items() if values is not None})
    bundle.add("golden.npz", buffer.getvalue())
    return bundle.save(path, overwrite=True)


@pytest.mark.parametrize("target", ["cpu", "torchscript"])
def test_the_attention_map_is_compared(path_with_map: Path, target: str) -> None:
    with pcn_deploy.load(path_with_map, target) as engine:
        report = pcn_deploy.verify(engine)
    assert report
    assert report.metrics["attention_map_sqnr_db"] > 100
    assert report.metrics["attention_map_cosine_min"] > 0.99999
    assert report.metrics["attention_map_max_abs_error"] < 1e-5


def test_a_map_of_another_network_is_no_parity(path_with_map: Path) -> None:
    golden = Bundle.open(path_with_map).read_arrays("golden.npz")["attention_map"]
    turned = with_golden(path_with_map, attention_map=golden[:, :, ::-1])
    with pcn_deploy.load(turned, "cpu") as engine:
        report = pcn_deploy.verify(engine)
    assert not report
    assert report.failures
    assert all(failure.startswith("attention map: ") for failure in report.failures), "the logits are right"
    assert report.metrics["sqnr_db"] > 100 > report.metrics["attention_map_sqnr_db"]


def test_the_map_of_a_later_image_counts(path_with_map: Path) -> None:
    """The last of eight images, which comes in the second batch."""
    golden = Bundle.open(path_with_map).read_arrays("golden.npz")["attention_map"]
    golden[7] = golden[7, :, ::-1]
    with pcn_deploy.load(with_golden(path_with_map, attention_map=golden), "cpu") as engine:
        assert not pcn_deploy.verify(engine)


def test_right_maps_do_not_make_up_for_wrong_logits(path_with_map: Path) -> None:
    golden = Bundle.open(path_with_map).read_arrays("golden.npz")["logits"]
    with pcn_deploy.load(with_golden(path_with_map, logits=golden[:, ::-1]), "cpu") as engine:
        report = pcn_deploy.verify(engine)
    assert report.failures
    assert not any("attention map" in failure for failure in report.failures)


def test_golden_maps_that_are_none(path_with_map: Path) -> None:
    golden = Bundle.open(path_with_map).read_arrays("golden.npz")["attention_map"]
    words = r"holds \['edge', .*'images', .*'rounding'\] instead of \['attention_map', 'images', 'logits'\]"
    with (
        pcn_deploy.load(with_golden(path_with_map, attention_map=None), "cpu") as engine,
        pytest.raises(BundleError, match=words),
    ):
        pcn_deploy.verify(engine)
    with (
        pcn_deploy.load(with_golden(path_with_map, attention_map=golden[:, :1]), "cpu") as engine,
        pytest.raises(DataError, match=r"attention_map \(8, 1, 8, 12\).*\(8, 3, 8, 12\)"),
    ):
        pcn_deploy.verify(engine)


def test_images_are_compared_by_their_logits(path_with_map: Path) -> None:
    """A reference has no map."""
    given = np.random.default_rng(3).standard_normal((5, 3, 32, 48), dtype=np.float32)
    with pcn_deploy.load(path_with_map, "torchscript") as other, pcn_deploy.load(path_with_map, "cpu") as engine:
        report = pcn_deploy.verify(engine, [given], reference=other.predict)
    assert report
    assert not any("attention_map" in name for name in report.metrics)


def test_a_reference_in_training_mode_is_judged_in_evaluation_mode_and_left_as_it_is(path: Path) -> None:
    class Trained(torch.nn.Module):  # type: ignore[name-defined,misc]
        def __init__(self) -> None:
            super().__init__()
            self.norm = torch.nn.BatchNorm2d(3)
            self.inner = network()
            self.dropout = torch.nn.Dropout(0.5)

        def forward(self, x: Any) -> Any:
            return self.dropout(self.inner(self.norm(x)))

    reference = Trained().train()
    reference.inner.eval()
    before = {name: values.clone() for name, values in reference.state_dict().items()}
    modes = [module.training for module in reference.modules()]
    with pcn_deploy.load(path, "cpu") as engine:
        report = pcn_deploy.verify(engine, [images(4)], reference=reference)
    assert report, "a new BatchNorm changes nothing but the last digits in evaluation mode"
    assert [module.training for module in reference.modules()] == modes
    assert all(torch.equal(values, before[name]) for name, values in reference.state_dict().items())


def test_a_broken_image_is_named(path: Path, folder: Path) -> None:
    """The third of five files has no answer."""

    def spoil(engine: Any) -> None:
        real, seen = engine.outputs, []

        def outputs(batch: Any) -> Any:
            found = real(batch)
            for row in found["logits"]:
                seen.append(row)
                row[0] = np.nan if len(seen) == 3 else row[0]
            return found

        engine.outputs = outputs

    with pcn_deploy.load(path, "cpu") as engine:
        spoil(engine)
        report = pcn_deploy.verify(engine, folder, reference=network())
    (failure,) = [failure for failure in report.failures if "NaN" in failure]
    assert failure == f"NaN or infinite logits for {folder / '1' / '2.png'}"


@pytest.mark.parametrize(
    ("reference", "words"),
    [
        (lambda images: (np.zeros((len(images), 3)),), r"returned a tuple; expected logits \(N, K\)"),
        (lambda images: np.zeros(len(images)), r"returned shape \(4,\)"),
        (torch.nn.Sequential(torch.nn.Conv2d(3, 3, 3)).half(), "cannot run on float32 images"),
    ],
)
def test_a_reference_that_gives_no_logits_is_refused_in_words(path: Path, reference: Any, words: str) -> None:
    with pcn_deploy.load(path, "cpu") as engine:
        given = np.random.default_rng(3).standard_normal((4, *engine.transform.shape)).astype(np.float32)
        with pytest.raises(DataError, match=words):
            pcn_deploy.verify(engine, [given], reference=reference)


def test_a_reference_may_return_a_tensor(path: Path) -> None:
    with pcn_deploy.load(path, "cpu") as engine:
        given = np.random.default_rng(3).standard_normal((4, *engine.transform.shape)).astype(np.float32)
        assert pcn_deploy.verify(engine, [given], reference=lambda images: torch.from_numpy(engine.predict(images)))
