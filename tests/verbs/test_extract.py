"""An engine as a plain file, and what its user must know beside it."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image
from small_builds import images, needs_rtx, network, options

import pcn_deploy
from pcn_deploy import Bundle, Transform
from pcn_deploy.data.image_files import read_image
from pcn_deploy.errors import BundleError, OutputError
from pcn_deploy.verbs.extract import extract, preprocessing
from pcn_deploy.verbs.run import classify

pytest.importorskip("torch")

NODE = Path(__file__).parents[2] / "examples" / "nodes" / "plan_only.py"
NAMES = ("ant", "bee", "cat", "dog", "eel")


@pytest.fixture(scope="module")
def int8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An INT8 bundle whose classes have names, for images that are cut."""
    transform = Transform(resolution=(32, 32), crop_pct=0.875, mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3))
    bundle = pcn_deploy.compile(network(), options(precision="int8", transform=transform), calibration=images()).bundle
    bundle.manifest.class_names = list(NAMES)
    return bundle.save(tmp_path_factory.mktemp("bundle") / "int8.pcn")


@pytest.fixture(scope="module")
def node() -> ModuleType:
    """The example, imported as a module."""
    from importlib.util import module_from_spec, spec_from_file_location

    spec = spec_from_file_location("plan_only", NODE)
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def picture(folder: Path, width: int, height: int, mode: str = "RGB", suffix: str = "png") -> Path:
    """A smooth picture, so that what a resize does matters and is the same in every decoder."""
    row, column = np.indices((height, width))
    planes = [127 + 120 * np.sin(row / (3 + k) + column / (5 - k)) for k in range(4)]
    pixels = np.stack(planes, axis=-1).astype(np.uint8)
    path = folder / f"{width}x{height}{mode}.{suffix}"
    Image.fromarray(pixels[..., 0] if mode == "L" else pixels[..., : len(mode)], mode).save(path)
    return path


def test_the_file_is_the_engine_and_the_json_says_what_it_is(int8: Path, tmp_path: Path) -> None:
    written = extract(int8, "cpu", tmp_path / "model.onnx")
    bundle = Bundle.open(int8)
    data = written.plan.read_bytes()
    assert data == bundle.read("model.onnx")
    about = json.loads(written.description.read_text())
    assert written.description == tmp_path / "model.onnx.json"
    assert about == written.content
    assert about["file"] == "model.onnx"
    assert (about["sha256"], about["bytes"]) == (hashlib.sha256(data).hexdigest(), len(data))
    assert (about["precision"], about["remainder"], about["target"]) == ("int8", "fp16", "cpu")
    assert about["batch"] == {"min": 1, "opt": 2, "max": 4}
    (taken,), (given,) = about["inputs"], about["outputs"]
    assert (taken["name"], taken["dtype"], taken["shape"], taken["role"]) == (
        *("images", "float32"),
        *([-1, 3, 32, 32], "image"),
    )
    assert (given["name"], given["shape"], given["role"]) == ("logits", [-1, 5], "logits")
    assert about["class_names"] == list(NAMES)
    assert about["library"]["name"] == "onnxruntime"
    assert written.to_json()["written"] == [str(written.plan), str(written.description)]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["model.onnx", "model.onnx.json"]


def test_shapes_and_types_are_those_of_the_graph(int8: Path, tmp_path: Path) -> None:
    import onnxruntime

    written = extract(int8, "cpu", tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(written.plan, providers=["CPUExecutionProvider"])
    for key, tensors in (("inputs", session.get_inputs()), ("outputs", session.get_outputs())):
        seen = [(tensor.name, [-1 if isinstance(dim, str) else dim for dim in tensor.shape]) for tensor in tensors]
        assert seen == [(one["name"], one["shape"]) for one in written.content[key]]


@needs_rtx
def test_a_plan_of_tensorrt_rtx_says_what_it_was_built_for(tmp_path: Path) -> None:
    asked = options(precision="fp16", targets=("cpu", "tensorrt-rtx"))
    bundle = pcn_deploy.compile(network(), asked).bundle
    path = bundle.save(tmp_path / "rtx.pcn")
    written = extract(path, "tensorrt-rtx", tmp_path / "plan")
    assert written.plan.read_bytes() == bundle.read("engines/tensorrt-rtx.engine")
    about = json.loads((tmp_path / "plan.json").read_text())
    assert about["library"]["name"] == "TensorRT-RTX"
    assert about["library"]["version"].startswith("1.")
    assert about["compute_capabilities"] == ["SM80", "SM86", "SM89", "SM120"]
    assert "neither trtexec nor Triton" in about["runs_with"]


def test_what_exists_is_kept(int8: Path, tmp_path: Path) -> None:
    for name in ("model.onnx", "model.onnx.json"):
        (tmp_path / name).write_text("precious")
        with pytest.raises(OutputError, match=rf"{name} exists\. Give --overwrite"):
            extract(int8, "cpu", tmp_path / "model.onnx")
        assert (tmp_path / name).read_text() == "precious"
        assert len(list(tmp_path.iterdir())) == 1
        (tmp_path / name).unlink()
    (tmp_path / "model.onnx").write_text("precious")
    assert extract(int8, "cpu", tmp_path / "model.onnx", overwrite=True).plan.stat().st_size > 1000


def test_the_bundle_itself_is_never_replaced(int8: Path, tmp_path: Path) -> None:
    link = tmp_path / "link.pcn"
    link.symlink_to(int8)
    before = int8.read_bytes()
    for path in (int8, link):
        with pytest.raises(OutputError, match=r"is the bundle itself"):
            extract(int8, "cpu", path, overwrite=True)
    assert int8.read_bytes() == before


def test_a_target_that_is_not_there_is_told_with_those_that_are(int8: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"no engine for 'tensorrt'; it holds: cpu"):
        extract(int8, "tensorrt", tmp_path / "plan")
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_engine_is_not_written(int8: Path, tmp_path: Path) -> None:
    spoiled = tmp_path / "spoiled.pcn"
    data = bytearray(int8.read_bytes())
    at = data.index(Bundle.open(int8).read("model.onnx")) + 1000
    data[at] ^= 1
    spoiled.write_bytes(data)
    with pytest.raises(BundleError, match=r"cannot be read|not what was packed"):
        extract(spoiled, "cpu", tmp_path / "model.onnx")
    assert [entry.name for entry in tmp_path.iterdir()] == ["spoiled.pcn"]


TRANSFORMS = {
    "default": Transform(),
    "wide": Transform(resolution=(96, 160), crop_pct=0.9, interpolation="bilinear"),
    "high": Transform(resolution=(160, 96), crop_pct=0.95, interpolation="lanczos"),
    "squash": Transform(resolution=(64, 80), crop_pct=0.875, crop_mode="squash"),
    "border": Transform(resolution=(64, 81), crop_pct=0.9, crop_mode="border", channel_order="bgr"),
    "grey border": Transform(resolution=(64, 81), crop_pct=1.0, crop_mode="border", mean=(0.3,), std=(0.25,)),
    "bgr": Transform(resolution=(63, 65), crop_pct=1.0, channel_order="bgr", mean=(0.1, 0.2, 0.3), std=(1, 2, 3)),
    "alpha": Transform(resolution=(32, 32), alpha="white", interpolation="nearest"),
    "grey": Transform(resolution=(33, 31), mean=(0.5,), std=(0.25,)),
    "upright": Transform(resolution=(32, 48), exif="apply"),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_program_that_has_the_json_alone_makes_the_same_input(name: str, node: ModuleType, tmp_path: Path) -> None:
    transform = TRANSFORMS[name]
    how = json.loads(json.dumps(preprocessing(transform)))
    sizes = ((640, 480), (480, 641), (97, 96), (32, 32), (41, 300))
    paths = [picture(tmp_path, *size) for size in sizes] + [picture(tmp_path, 70, 50, mode) for mode in ("RGBA", "L")]
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = tmp_path / "turned.jpg"
    with Image.open(paths[0]) as image:
        image.save(turned, exif=exif)
    for path in (*paths, turned):
        np.testing.assert_array_equal(node.preprocess(str(path), how), read_image(path, transform)[None])


def test_the_program_reads_images_of_16_bits(node: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "deep.png"
    values = np.arange(40 * 50, dtype=np.uint16).reshape(40, 50) * 2
    Image.fromarray(values).save(path)
    transform = Transform(resolution=(32, 32), white=4095)
    np.testing.assert_array_equal(
        node.preprocess(str(path), preprocessing(transform)), read_image(path, transform)[None]
    )


def words(steps: list[str]) -> str:
    return " ".join(steps)


def test_the_steps_tell_what_differs() -> None:
    steps = {name: words(preprocessing(transform)["steps"]) for name, transform in TRANSFORMS.items()}
    assert "256 w / h)) x 256" in steps["default"]
    assert "bicubic" in steps["default"] and "bilinear" in steps["wide"]
    assert "without regard to its proportions" in steps["squash"]
    assert "BGR" in steps["bgr"] and "BGR" not in steps["default"]
    assert "over white" in steps["alpha"] and "Drop an alpha channel" in steps["default"]
    assert "EXIF orientation says" in steps["upright"] and "Do not apply" in steps["default"]
    assert "grey" in steps["grey"] and "(N, 1, 33, 31)" in steps["grey"]
    many = preprocessing(Transform(resolution=(8, 8), mean=(0.5,) * 5, std=(0.5,) * 5))["steps"]
    assert many[0] == "Take pixels of 8 bits as an array (height, width, 5)."


def run_node(*arguments: Any) -> subprocess.CompletedProcess[str]:
    """The example as its user starts it, where this library cannot be imported."""
    hidden = "import sys, runpy; sys.modules['pcn_deploy'] = None; sys.argv = sys.argv[1:]; "
    code = hidden + "runpy.run_path(sys.argv[0], run_name='__main__')"
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return subprocess.run(
        [sys.executable, "-c", code, str(NODE), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env=environment,
    )


def test_the_program_answers_as_this_library_does(int8: Path, node: ModuleType, tmp_path: Path) -> None:
    written = extract(int8, "cpu", tmp_path / "model.onnx")
    paths = [picture(tmp_path, *size) for size in ((320, 240), (50, 90), (32, 32))]
    with pcn_deploy.load(int8) as engine:
        predictions = classify(engine, paths, top=5)
    run = node.open_engine(written.plan.read_bytes(), written.content)
    for path, prediction in zip(paths, predictions, strict=True):
        logits = run(node.preprocess(str(path), written.content["preprocessing"]))["logits"][0].astype(np.float64)
        weights = np.exp(logits - logits.max())
        best = np.argsort(-logits, kind="stable")
        assert tuple(NAMES[index] for index in best) == prediction.names
        np.testing.assert_allclose((weights / weights.sum())[best], prediction.probabilities, atol=1e-5)
    done = run_node(written.description, *paths)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 3 * 6
    for at, (path, prediction) in enumerate(zip(paths, predictions, strict=True)):
        assert lines[6 * at] == str(path)
        assert [line.split(" %  ")[1] for line in lines[6 * at + 1 : 6 * at + 6]] == list(prediction.names)


def test_the_program_refuses_another_file(int8: Path, tmp_path: Path) -> None:
    written = extract(int8, "cpu", tmp_path / "model.onnx")
    image = picture(tmp_path, 32, 32)
    written.plan.write_bytes(written.plan.read_bytes() + b"x")
    done = run_node(written.description, image)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"model.onnx is not the engine that {written.description} describes. Do not use it.\n"


def test_a_batch_that_begins_above_one(path_with_map: Path, node: ModuleType, tmp_path: Path) -> None:
    written = extract(path_with_map, "cpu", tmp_path / "model.onnx")
    done = run_node(written.description, picture(tmp_path, 48, 32))
    assert done.returncode == 0, done.stderr
    assert "attention_map (3, 8, 12): " in done.stdout


@needs_rtx
def test_what_the_program_asks_of_tensorrt_is_there(node: ModuleType) -> None:
    """It cannot run here without a GPU; the names that it uses can be looked up."""
    import ast

    import tensorrt_rtx as trt

    homes = {"trt": trt, "runtime": trt.Runtime, "engine": trt.ICudaEngine, "context": trt.IExecutionContext}
    tree = ast.parse(NODE.read_text(encoding="utf-8"))
    asked = [
        (each.value.id, each.attr)
        for each in ast.walk(tree)
        if isinstance(each, ast.Attribute) and isinstance(each.value, ast.Name) and each.value.id in homes
    ]
    assert {name for name, _ in asked} == set(homes)
    for home, name in asked:
        assert hasattr(homes[home], name), f"{home}.{name}"
    assert hasattr(trt.Logger, "WARNING")


def test_every_backend_says_what_else_runs_its_engines() -> None:
    from pcn_deploy.engines.registry import TARGETS, get_backend

    for target in TARGETS:
        assert get_backend(target).runs_with.endswith("."), target


def test_a_fixed_batch_is_told_as_it_is(tmp_path: Path) -> None:
    from pcn_deploy import BatchRange

    bundle = pcn_deploy.compile(network(), replace(options(precision="fp32"), batch=BatchRange.parse("2"))).bundle
    about = extract(bundle.save(tmp_path / "two.pcn"), "cpu", tmp_path / "model.onnx").content
    assert about["inputs"][0]["shape"] == [2, 3, 32, 32]
    assert about["batch"] == {"min": 2, "opt": 2, "max": 2}
