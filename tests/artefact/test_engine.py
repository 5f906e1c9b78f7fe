"""Opening a bundle's engine and running it."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import pcn_deploy
from pcn_deploy import BatchRange, Bundle, CompileOptions, Engine, Transform
from pcn_deploy.artefact.engine import check_finite, executor
from pcn_deploy.engines.base import Availability, Session
from pcn_deploy.engines.onnxruntime import OnnxRuntimeBackend, _OnnxRuntimeSession
from pcn_deploy.engines.registry import TARGETS, fastest_first, get_backend
from pcn_deploy.engines.torchscript import TorchScriptBackend
from pcn_deploy.errors import BundleError, DataError, DependencyError, OptionError, ParityError

torch = pytest.importorskip("torch")

NOTHING = Availability(can_build=False, can_run=False, detail="nothing found", remedy="pip install it")


def network() -> Any:
    return pcn_deploy.create_model(
        "patchconvnet", random_weights=True, width=32, depth=2, patch=4, num_classes=5, layer_scale=0.5
    )


def images(count: int) -> Any:
    return np.random.default_rng(2).standard_normal((count, 3, 32, 32), dtype=np.float32)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Targets torchscript and cpu, in this order; batches of 2 to 4."""
    options = CompileOptions(
        precision="fp32",
        targets=("torchscript", "cpu"),
        transform=Transform(resolution=(32, 32)),
        batch=BatchRange(min=2, opt=2, max=4),
    )
    bundle = pcn_deploy.compile(network(), options).bundle
    return bundle.save(tmp_path_factory.mktemp("bundle") / "tiny.pcn")


@pytest.fixture(scope="module")
def expected() -> Any:
    with torch.inference_mode():
        return network()(torch.from_numpy(images(11))).numpy()


@pytest.mark.parametrize("target", ["cpu", "torchscript"])
@pytest.mark.parametrize("count", [1, 2, 4, 5, 11])
def test_any_number_of_images(path: Path, expected: Any, target: str, count: int) -> None:
    with pcn_deploy.load(path, target) as engine:
        logits = engine.predict(images(11)[:count])
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits, expected[:count], atol=1e-5)


@pytest.mark.parametrize("target", ["cpu", "torchscript"])
@pytest.mark.parametrize("count", [1, 5, 9])
def test_everything_the_engine_gives(original_with_map: Path, target: str, count: int) -> None:
    given = np.random.default_rng(2).standard_normal((9, 3, 32, 48), dtype=np.float32)
    with pcn_deploy.load(original_with_map, target) as engine:
        outputs = engine.outputs(given[:count])
        alone = [engine.outputs(image[None]) for image in given[:count]]
        logits = engine.predict(given[:count])
    assert list(outputs) == ["logits", "attention_map"]
    assert outputs["attention_map"].shape == (count, 3, 8, 12)
    assert outputs["attention_map"].dtype == outputs["logits"].dtype == np.float32
    np.testing.assert_array_equal(logits, outputs["logits"])
    for name, values in outputs.items():
        np.testing.assert_allclose(values, np.concatenate([each[name] for each in alone]), atol=1e-5)
    np.testing.assert_allclose(outputs["attention_map"].sum((2, 3)), 1, atol=1e-5)


def test_both_engines_give_the_same_map(original_with_map: Path) -> None:
    given = np.random.default_rng(2).standard_normal((3, 3, 32, 48), dtype=np.float32)
    maps = []
    for target in ("cpu", "torchscript"):
        with pcn_deploy.load(original_with_map, target) as engine:
            maps.append(engine.outputs(given)["attention_map"])
    assert np.ptp(maps[0]) > 0.01
    np.testing.assert_allclose(maps[0], maps[1], atol=1e-5)


def test_an_engine_without_map_gives_logits_only(path: Path, expected: Any) -> None:
    with pcn_deploy.load(path) as engine:
        outputs = engine.outputs(images(11))
    assert list(outputs) == ["logits"]
    np.testing.assert_allclose(outputs["logits"], expected, atol=1e-5)


def test_the_device_that_is_asked_for(path: Path) -> None:
    with pcn_deploy.load(path, device="cpu") as engine:
        assert engine.target == "cpu"
    with pytest.raises(OptionError, match=r"Engines of target 'cpu' run on cpu, not on 'cuda:7'"):
        pcn_deploy.load(path, "cpu", device="cuda:7")
    if not torch.cuda.is_available():
        with pytest.raises(OptionError, match=r"0 CUDA devices here, so there is no 'cuda:7'"):
            pcn_deploy.load(path, device="cuda:7")
    only = Bundle.open(path)
    names = [name for name in only.manifest.members if name != "model.ts"]
    only = Bundle(
        replace(only.manifest, members={}, engines=[only.engine("cpu")]), {name: only.read(name) for name in names}
    )
    only.save(path.with_name("only.pcn"))
    with pytest.raises(DependencyError, match=r"cpu: Engines of target 'cpu' run on cpu, not on 'cuda:7'"):
        pcn_deploy.load(path.with_name("only.pcn"), device="cuda:7")
    with pytest.raises(OptionError, match="has no CUDA stream on cpu"):
        pcn_deploy.load(path, "cpu", stream=3)


def test_batches_are_as_few_and_as_full_as_the_engine_allows(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    with pcn_deploy.load(path, "cpu") as engine:
        real = Session.run

        def run(self: Session, inputs: Any, out: Any = None) -> Any:
            sizes.append(len(inputs["images"]))
            return real(self, inputs, out)

        one_by_one = np.concatenate([engine.predict(images(9)[index : index + 2]) for index in range(0, 9, 2)])
        monkeypatch.setattr(Session, "run", run)
        np.testing.assert_allclose(engine.predict(images(9)), one_by_one, rtol=1e-5, atol=1e-6)
    assert sizes == [4, 4, 2], "the last image is repeated, for the engine takes 2 or more"


def test_the_same_kind_comes_back(path: Path, expected: Any) -> None:
    with pcn_deploy.load(path) as engine:
        array = engine(images(3))
        tensor = engine(torch.from_numpy(images(3)).requires_grad_())
    assert type(array) is np.ndarray
    assert type(tensor) is torch.Tensor
    assert (tensor.dtype, tensor.requires_grad) == (torch.float32, False)
    np.testing.assert_allclose(array, expected[:3], atol=1e-5)
    np.testing.assert_array_equal(tensor.numpy(), array)


@pytest.mark.parametrize(
    "bad",
    [
        np.zeros((0, 3, 32, 32), np.float32),
        np.float32(1),
        np.zeros((2, 3, 32, 32)),
        np.zeros((2, 3, 16, 16), np.float32),
        np.zeros((3, 32, 32), np.float32),
        np.zeros((2, 1, 32, 32), np.float32),
        np.zeros((2, 32, 32, 3), np.uint8),
    ],
    ids=lambda bad: f"{bad.dtype} {bad.shape}",
)
def test_images_that_do_not_fit(path: Path, bad: Any) -> None:
    with pcn_deploy.load(path) as engine, pytest.raises(DataError, match=r"engine takes|No images"):
        engine.predict(np.asarray(bad))


def test_load_takes_the_fastest_that_runs(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = ["tensorrt", "tensorrt-rtx", "cpu", "torchscript"]
    assert [target for target in fastest_first(TARGETS) if target in known] == known
    with pcn_deploy.load(path) as engine:
        assert (engine.target, engine.executed_by) == ("cpu", "cpu")
    monkeypatch.setattr(OnnxRuntimeBackend, "availability", lambda self: NOTHING)
    with pcn_deploy.load(path) as engine:
        assert (engine.target, engine.executed_by) == ("torchscript", "torchscript")
    monkeypatch.setattr(TorchScriptBackend, "availability", lambda self: NOTHING)
    with pytest.raises(DependencyError, match=r"(?s)cpu: nothing found\. pip install it.*torchscript: nothing found"):
        pcn_deploy.load(path)


def test_the_target_asked_for_is_taken_or_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pcn_deploy.load(path, "torchscript") as engine:
        assert engine.target == "torchscript"
    with pytest.raises(BundleError, match=r"no engine for 'tensorrt'; it holds: torchscript, cpu"):
        pcn_deploy.load(path, "tensorrt")
    monkeypatch.setattr(OnnxRuntimeBackend, "availability", lambda self: NOTHING)
    with pytest.raises(DependencyError, match=r"'cpu' cannot run here: nothing found\. pip install it"):
        pcn_deploy.load(path, "cpu")


def test_the_engine_knows_its_interface(path: Path) -> None:
    with pcn_deploy.load(path) as engine:
        assert engine.spec.inputs[0].shape == ("batch", 3, 32, 32)
        assert engine.spec.outputs[0].shape == ("batch", 5)
        assert engine.spec.batch == BatchRange(min=2, opt=2, max=4)
        assert engine.transform == Transform(resolution=(32, 32))


@pytest.mark.parametrize("target", ["cpu", "torchscript"])
def test_altered_engines_are_never_opened(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    """The hash is checked first: no byte of an altered engine reaches ONNX Runtime or PyTorch."""
    bundle = Bundle.open(path)
    data = bundle.read(bundle.engine(target).member)
    altered = tmp_path / "altered.pcn"
    whole = path.read_bytes()
    middle = whole.index(data) + len(data) // 2
    altered.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
    backend = type(get_backend(target))
    monkeypatch.setattr(backend, "_open_impl", lambda *_: pytest.fail("altered bytes were opened"))
    with pytest.raises(BundleError, match=r"altered"):
        pcn_deploy.load(altered, target)


def test_an_engine_closes_once_and_again(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[str] = []
    monkeypatch.setattr(_OnnxRuntimeSession, "close", lambda self: closed.append(type(self).__name__))
    with Engine.open(Bundle.open(path), "cpu") as engine:
        pass
    assert len(closed) == 1
    engine.close()


def test_who_executes(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = TorchScriptBackend()
    assert executor(backend) == "torchscript"
    monkeypatch.setattr(TorchScriptBackend, "availability", lambda self: NOTHING)
    assert executor(backend) == "cpu"


@pytest.mark.parametrize(
    ("precision", "remainder", "advice"),
    [
        ("fp32", "fp32", "It is FP32 already: if that passes, see whether the trained network answers"),
        ("fp16", "fp16", "build with --precision fp32"),
        ("int8", "fp16", "build with --remainder fp32"),
        ("int8", "fp32", "build with --precision fp32"),
    ],
)
def test_the_advice_where_there_is_no_answer_fits_what_was_built(
    path: Path, precision: str, remainder: str, advice: str
) -> None:
    with pcn_deploy.load(path, "cpu") as engine:
        engine.bundle.manifest = replace(engine.bundle.manifest, precision=precision, remainder=remainder)
        check_finite({"logits": np.ones(2, np.float32)}, engine, "one image")
        with pytest.raises(ParityError, match=f"NaN or infinite logits for one image, .*{advice}"):
            check_finite({"logits": np.array([0, np.nan], np.float32)}, engine, "one image")


class Inverts(torch.nn.Module):  # type: ignore[name-defined,misc]
    """Divides by the mean of the image: nothing where that is 0, and beyond FP16 where it is small."""

    def __init__(self) -> None:
        super().__init__()
        self.head = torch.nn.Linear(3, 4)

    def forward(self, x: Any) -> Any:
        return 30 * self.head(x.mean((2, 3))) / x.mean((1, 2, 3))[:, None].square()


@pytest.mark.parametrize(("mean", "words"), [(0.0, "has no answer in FP32 either"), (0.01, "In FP32 the graph has an")])
def test_what_fp32_would_answer_decides_the_advice(mean: float, words: str) -> None:
    """No precision helps where it is the network itself that has no answer."""
    torch.manual_seed(0)
    options = CompileOptions(precision="fp16", transform=Transform(resolution=(32, 32)))
    given = 1 + np.random.default_rng(0).random((8, 3, 32, 32), dtype=np.float32)
    bundle = pcn_deploy.compile(Inverts().eval(), options, calibration=given).bundle
    asked = np.full((1, 3, 32, 32), mean, np.float32)
    with Engine.open(bundle, "cpu") as engine, pytest.raises(ParityError, match=words):
        check_finite({"logits": np.array([[np.nan]], np.float32)}, engine, "one image", asked)


@pytest.mark.parametrize(
    ("precision", "remainder", "built_by", "warned"),
    [
        ("int8", "fp16", "1.99.0", True),
        ("int8", "fp16", "here", False),
        ("int8", "fp32", "1.99.0", False),
        ("fp16", "fp16", "1.99.0", False),
    ],
)
def test_a_runtime_that_cuts_codes_off_is_named(
    path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    precision: str,
    remainder: str,
    built_by: str,
    warned: bool,
) -> None:
    import onnxruntime

    monkeypatch.setattr("pcn_deploy.artefact.engine.truncates_half", lambda: True)
    bundle = Bundle.open(path)
    bundle.manifest = replace(bundle.manifest, precision=precision, remainder=remainder)
    bundle.manifest.provenance["built_by"]["onnxruntime"] = onnxruntime.__version__ if built_by == "here" else built_by
    Engine.open(bundle, "cpu").close()
    assert ("built with 1.99.0" in caplog.text) == warned


def pictures(*sizes: tuple[int, int]) -> list[Any]:
    random = np.random.default_rng(5)
    return [random.integers(0, 256, (height, width, 3), dtype=np.uint8) for height, width in sizes]


def test_frames_go_in_and_classes_come_out(path: Path) -> None:
    frames = pictures((48, 64), (40, 40), (70, 50))
    transform = Transform(resolution=(32, 32))
    transformed = np.stack([transform(Image.fromarray(frame)) for frame in frames])
    with pcn_deploy.load(path, "cpu") as engine:
        np.testing.assert_array_equal(engine.preprocess(frames), transformed)
        np.testing.assert_array_equal(engine.preprocess(frames[0][..., ::-1], color="bgr"), transformed[:1])
        answers = engine.classify(frames, k=2)
        (alone,) = engine.classify(frames[1], k=99)
    with torch.inference_mode():
        shares = network()(torch.from_numpy(transformed)).double().softmax(1).numpy()
    assert [[one.index for one in answer] for answer in answers] == np.argsort(-shares, axis=1)[:, :2].tolist()
    for answer, row in zip(answers, shares, strict=True):
        assert [one.probability for one in answer] == pytest.approx(np.sort(row)[::-1][:2], abs=1e-5)
        assert [one.name for one in answer] == [str(one.index) for one in answer], "nobody told the names"
    assert [one.index for one in alone[:2]] == [one.index for one in answers[1]]
    assert sum(one.probability for one in alone) == pytest.approx(1)
    assert len(alone) == shares.shape[1]


def test_classes_have_the_names_of_the_bundle(path: Path) -> None:
    bundle = Bundle.open(path)
    bundle.manifest.class_names = [f"kind {index}" for index in range(5)]
    with Engine.open(bundle, "cpu") as engine:
        ((best,),) = engine.classify(pictures((32, 32)), k=1)
    assert best.name == f"kind {best.index}"


def test_what_cannot_be_classified_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pcn_deploy.load(path, "cpu") as engine:
        with pytest.raises(OptionError, match="At least one class must be asked for, not 0"):
            engine.classify(pictures((32, 32)), k=0)
        with pytest.raises(DataError, match="Frame 0 is ndarray of float32"):
            engine.classify(np.zeros((32, 32, 3), np.float32))
        real = engine.run_batch
        spoil = np.array([[0.0], [np.nan]], np.float32)
        monkeypatch.setattr(engine, "run_batch", lambda images: {"logits": real(images)["logits"] + spoil})
        with pytest.raises(ParityError, match="NaN or infinite logits for frame 1"):
            engine.classify(pictures((32, 32), (40, 40)))
        monkeypatch.setattr(engine, "spec", replace(engine.spec, outputs=()))
        with pytest.raises(OptionError, match="no logits"):
            engine.classify(pictures((32, 32)))


@pytest.mark.parametrize("known", [True, False])
def test_images_that_nobody_normalised_are_warned_of_once(
    path: Path, known: bool, caplog: pytest.LogCaptureFixture
) -> None:
    bundle = Bundle.open(path)
    low, high = bundle.manifest.input_range or (0, 0)
    assert low < -2 and high > 2, "noise and edge images"
    if not known:
        bundle.manifest.input_range = None  # of an older version
    raw = np.stack(pictures((32, 32), (32, 32))).transpose(0, 3, 1, 2).astype(np.float32)
    with Engine.open(bundle, "cpu") as engine:
        engine.predict(images(11))
        engine.predict(engine.preprocess(pictures((32, 32))))
        assert not caplog.messages
        engine.predict(raw)
        engine.predict(raw)
    (message,) = caplog.messages
    assert re.search(r"up to 25\d; .* engine\.preprocess\(frames\)", message)
