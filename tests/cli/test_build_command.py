"""`pcn-compile build`: what it prints and writes, and how it refuses."""

from __future__ import annotations

import json
import os
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

import pcn_deploy
from pcn_deploy import Bundle
from pcn_deploy.cli.main import main
from pcn_deploy.engines.onnxruntime import OnnxRuntimeBackend
from pcn_deploy.errors import BuildError
from pcn_deploy.remedies import install

torch = pytest.importorskip("torch")

SMALL = ["--resolution", "32", "--batch", "1:1:2", "--precision", "fp32"]
FACTORY = """
from torch import nn
import torch

class Net(nn.Module):
    def __init__(self, num_classes=3):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 9, stride=4)
        self.head = nn.Linear(16, num_classes)
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.stem(x).mean((2, 3)))

def number():
    return 3
"""


@pytest.fixture(scope="module")
def state() -> dict[str, Any]:
    network = pcn_deploy.create_model(
        "patchconvnet", random_weights=True, width=32, depth=1, patch=4, num_classes=5, layer_scale=0.5
    )
    found: dict[str, Any] = network.state_dict()
    return found


@pytest.fixture
def weights(state: dict[str, Any], tmp_path: Path) -> Path:
    path = tmp_path / "tiny.pth"
    torch.save({"model": state}, path)
    return path


@pytest.fixture
def factory(tmp_path: Path) -> str:
    path = tmp_path / "own_network.py"
    path.write_text(FACTORY)
    return f"{path}:Net"


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """In a folder of its own, so that whatever is left beside it shows."""
    folder = tmp_path / "out"
    folder.mkdir()
    return folder / "tiny.pcn"


def invoke(*words: Any) -> Result:
    return CliRunner().invoke(main, ["build", *map(str, words)])


def refused(result: Result, code: int, *words: str, out: Path | None = None) -> None:
    """One clear error on stderr, the right code, no traceback, nothing written."""
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == code, result.output
    assert "Error: " in result.stderr
    assert "Traceback" not in result.output
    for word in words:
        assert word in " ".join(result.stderr.split()), result.stderr
    assert result.stdout == ""
    if out is not None:
        assert list(out.parent.iterdir()) == []


def test_a_checkpoint_becomes_a_bundle(weights: Path, out: Path) -> None:
    result = invoke(
        "patchconvnet", "--weights", weights, *SMALL, "--target", "cpu", "--target", "torchscript", "-o", out
    )
    assert result.exit_code == 0, result.output
    for words in ("Parity with the eager network", "passed", "torchscript", "model.ts", str(out)):
        assert words in result.stdout
    assert [entry.name for entry in out.parent.iterdir()] == [out.name]
    bundle = Bundle.open(out)
    assert [entry.target for entry in bundle.engines] == ["cpu", "torchscript"]
    kept = bundle.manifest.provenance
    assert (kept["model"], kept["weights"], len(kept["weights_sha256"])) == ("patchconvnet", str(weights), 64)


def test_the_attention_map_is_asked_for(weights: Path, out: Path) -> None:
    result = invoke("patchconvnet", "--weights", weights, *SMALL, "--with-attention-map", "-o", out)
    assert result.exit_code == 0, result.output
    rows = [line.split("│") for line in result.stdout.splitlines() if "attention map" in line]
    assert [[cell.strip() for cell in row[1:4]] for row in rows] == [["attention map", "passed", "8"]]
    bundle = Bundle.open(out)
    assert [each.name for each in bundle.manifest.interface.outputs] == ["logits", "attention_map"]
    assert "attention_map_sqnr_db" in bundle.read_json("parity/cpu.json")["metrics"]


def test_an_attention_map_of_a_network_that_has_none(factory: str, out: Path) -> None:
    words = ["Leave --with-attention-map out", "pcn_deploy.models.aggregation.AttentionPool2d"]
    result = invoke(factory, "--random-weights", *SMALL, "--with-attention-map", "-q", "-o", out)
    refused(result, 1, "holds no attention-based aggregation", *words, out=out)


def test_json_is_all_there_is_on_stdout(weights: Path, out: Path) -> None:
    result = invoke("patchconvnet", "--weights", weights, *SMALL, "-o", out, "--json", "--explain")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert (found["passed"], found["bundle"], found["bytes"]) == (True, str(out), out.stat().st_size)
    assert [entry["target"] for entry in found["engines"]] == ["cpu"]
    assert found["parity"][0]["passed"] is True
    assert found["parity"][0]["metrics"]["sqnr_db"] > 60
    assert {"op", "kind", "precision", "reason"} <= set(found["layers"][0])
    assert "Note" not in result.output


def test_int8_with_images_from_a_file(weights: Path, out: Path, tmp_path: Path) -> None:
    npz = tmp_path / "images.npz"
    np.savez(npz, images=np.random.default_rng(0).standard_normal((8, 3, 32, 32), dtype=np.float32))
    words = ["--precision", "int8", "--calibration", npz, "--calibrator", "max", "--images", 4, "--explain"]
    result = invoke("patchconvnet", "--weights", weights, *SMALL[:4], *words, "-o", out, "-q")
    assert result.exit_code == 0, result.output
    assert "dense product of enough rows" in result.stdout
    assert result.stderr == ""
    kept = Bundle.open(out).manifest.calibration
    assert (kept["calibrator"], kept["images"], kept["source"]) == ("max", 4, str(npz))


def test_recovery_is_applied_recorded_and_printed(weights: Path, out: Path, tmp_path: Path) -> None:
    npz = tmp_path / "images.npz"
    np.savez(npz, images=np.random.default_rng(0).standard_normal((8, 3, 32, 32), dtype=np.float32))
    words = ["patchconvnet", "--weights", weights, *SMALL[:4], "--calibration", npz, "-o", out, "-q"]
    result = invoke(*words, "--precision", "int8", "--recover", "all")
    assert result.exit_code == 0, result.output
    recorded = Bundle.open(out).manifest.calibration
    kept, trials = recorded["recovery"], recorded["recovery_trials"]
    assert list(kept) == ["equalisation", "smoothquant", "weight-rounding", "bias-correction"]
    assert trials["bias-correction"]["layers"] == 4
    assert kept == {name: trials[name]["layers"] if name in trials and trials[name]["kept"] else 0 for name in kept}
    assert "Recovery: equalisation (0 layers), smoothquant (" in result.stdout
    one = invoke(*words, "--precision", "int8", "--recover", "bias-correction", "--overwrite")
    assert list(Bundle.open(out).manifest.calibration["recovery_trials"]) == ["bias-correction"], one.output
    result = invoke(*words, "--precision", "fp16", "--recover", "smoothquant", "--overwrite")
    assert result.exit_code == 2
    assert "Recovery smoothquant makes up for INT8" in " ".join(result.stderr.split())


def test_int8_without_images_is_refused(weights: Path, out: Path) -> None:
    result = invoke("patchconvnet", "--weights", weights, "--precision", "int8", "--resolution", "32", "-o", out)
    refused(result, 1, "INT8 and FP8 need calibration images", "--calibration DIR", out=out)


def test_a_printed_recipe_builds_the_same_graph(weights: Path, out: Path, tmp_path: Path) -> None:
    npz, recipe = tmp_path / "images.npz", tmp_path / "plan.toml"
    np.savez(npz, images=np.random.default_rng(0).standard_normal((4, 3, 32, 32), dtype=np.float32))
    first, common = tmp_path / "first.pcn", ["patchconvnet", "--weights", weights, *SMALL[:4]]
    assert invoke(*common, "--precision", "int8", "--calibration", npz, "-o", first).exit_code == 0
    printed = CliRunner().invoke(main, ["inspect", str(first), "--recipe"])
    assert (printed.exit_code, printed.stderr) == (0, "")
    recipe.write_text(printed.stdout)
    result = invoke(*common, "--recipe", recipe, "-o", out)
    assert result.exit_code == 0, result.output
    assert "Ranges: all from the recipe" in result.stdout
    members = [Bundle.open(path).manifest.members["model.onnx"].sha256 for path in (first, out)]
    assert members[0] == members[1]


@pytest.mark.parametrize(
    ("text", "extra", "words"),
    [
        ('precision = "fp16"\nprecsion = "fp32"\n', [], ["plan.toml", "unknown key 'precsion'"]),
        ("precision = ", [], ["plan.toml is not valid TOML"]),
        ('precision = "fp16"\n[layers.none]\nprecision = "fp32"\n', [], ['[layers."none"]', "no such module"]),
        ('precision = "fp16"\n', ["--precision", "fp32"], ["is for fp16", "asked for is fp32"]),
        ('precision = "fp16"\n', ["--precision", "auto"], ["leave --precision auto out"]),
    ],
)
def test_a_bad_recipe_is_named(
    weights: Path, out: Path, tmp_path: Path, text: str, extra: list[str], words: list[str]
) -> None:
    recipe = tmp_path / "plan.toml"
    recipe.write_text(text)
    result = invoke("patchconvnet", "--weights", weights, *SMALL[:4], "--recipe", recipe, *extra, "-o", out)
    refused(result, 2, *words, out=out)


def test_weights_must_be_chosen(weights: Path, out: Path) -> None:
    words = ["Give exactly one of", "--weights FILE", "--random-weights"]
    refused(invoke("patchconvnet_s60", *SMALL, "-o", out), 2, *words, out=out)
    refused(invoke("patchconvnet_s60", "--weights", weights, "--random-weights", "-o", out), 2, *words, out=out)


def test_random_weights_say_so_when_they_replace_images(factory: str, out: Path) -> None:
    words = ["--random-weights", "--resolution", "32", "--precision", "int8", "--images", "4", "-o", out]
    result = invoke(factory, *words)
    assert result.exit_code == 0, result.output
    assert "Note: the weights are random, so synthetic images calibrate them." in result.stderr
    assert "from standard normal noise." in result.output and "given arrays" not in result.output
    assert Bundle.open(out).manifest.provenance["weights"] is None


class Malicious:
    """Unpickling it makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


def test_a_malicious_checkpoint_runs_nothing(out: Path, tmp_path: Path) -> None:
    marker, path = tmp_path / "owned", tmp_path / "evil.pth"
    for save in (lambda data: torch.save(data, path), lambda data: path.write_bytes(pickle.dumps(data, protocol=2))):
        save({"model": Malicious(marker)})
        result = invoke("patchconvnet", "--weights", path, *SMALL, "-o", out)
        refused(result, 1, "corrupt, or holds objects other than tensors", "torch.save(model.state_dict()", out=out)
        assert not marker.exists()


@pytest.mark.parametrize("name", ["bad.pth", "bad.safetensors"])
@pytest.mark.parametrize("content", [b"", b"no checkpoint", b"PK\x03\x04 truncated", None], ids=str)
def test_a_checkpoint_that_cannot_be_read(out: Path, tmp_path: Path, name: str, content: bytes | None) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    refused(invoke("patchconvnet", "--weights", path, *SMALL, "-o", out), 1, name, out=out)


def test_a_truncated_checkpoint(weights: Path, out: Path) -> None:
    weights.write_bytes(weights.read_bytes()[:-1000])
    refused(invoke("patchconvnet", "--weights", weights, *SMALL, "-o", out), 1, "Download or save it again", out=out)


def test_keys_that_do_not_fit_are_listed(state: dict[str, Any], out: Path, tmp_path: Path) -> None:
    altered = {key: value for key, value in state.items() if key != "norm.bias"}
    altered["surplus.weight"] = torch.zeros(1)
    altered["norm.weight"] = torch.zeros(7)
    torch.save(altered, tmp_path / "altered.pth")
    result = invoke("patchconvnet", "--weights", tmp_path / "altered.pth", *SMALL, "-o", out)
    parts = ["1 missing: norm.bias", "1 extra: surplus.weight", "1 misshapen: norm.weight (7,) instead of (32,)"]
    refused(result, 1, *parts, "Check the model name", out=out)


def test_weights_of_another_network(out: Path, tmp_path: Path) -> None:
    torch.save({"conv1.weight": torch.zeros(3)}, tmp_path / "other.pth")
    result = invoke("patchconvnet", "--weights", tmp_path / "other.pth", *SMALL, "-o", out)
    refused(result, 1, "not a PatchConvNet", "conv1.weight", out=out)


def test_an_unknown_model_and_the_closest_names(out: Path) -> None:
    result = invoke("patchconvnet_s61", "--random-weights", "-o", out)
    refused(result, 1, "Unknown model 'patchconvnet_s61'. Did you mean patchconvnet_s60", out=out)


@pytest.mark.parametrize("name", ["missing.py:Net", "no_such_module:Net", "{file}:absent", "{file}:number"])
def test_a_factory_that_fails(factory: str, out: Path, name: str) -> None:
    spec = name.format(file=factory.rpartition(":")[0])
    refused(invoke(spec, "--random-weights", *SMALL, "-o", out), 1, spec, out=out)


def test_a_factory_that_is_not_there_or_takes_arguments(factory: str, out: Path) -> None:
    where = factory.rpartition(":")[0]
    result = invoke(f"{where}:Nett", "--random-weights", *SMALL, "-o", out)
    refused(result, 1, "there is no function or class 'Nett'; it has Net.", out=out)
    Path(where).write_text(FACTORY + "\n\ndef make(width):\n    return Net()\n")
    result = invoke(f"{where}:make", "--random-weights", *SMALL, "-o", out)
    refused(result, 1, ":make' takes (width), but is called with no arguments", "def net(): return make(...)", out=out)


def test_the_output_is_looked_at_before_the_long_work(
    weights: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pcn_deploy.cli.commands.build.compile_made", lambda *_, **__: pytest.fail("built for nothing"))
    out.write_bytes(b"precious")
    refused(invoke("patchconvnet", "--weights", weights, *SMALL, "-o", out), 1, "exists. Give --overwrite")


def test_outputs_that_cannot_be_written(weights: Path, out: Path, tmp_path: Path) -> None:
    given = ["patchconvnet", "--weights", weights, *SMALL, "-o"]
    refused(invoke(*given, tmp_path / "missing" / "a.pcn"), 1, "does not exist. Create it", "-o", out=out)
    refused(invoke(*given, out.parent), 1, "is a folder", out=out)
    out.write_bytes(b"precious")
    refused(invoke(*given, out), 1, "exists. Give --overwrite")
    assert out.read_bytes() == b"precious"
    assert invoke(*given, out, "--overwrite").exit_code == 0
    assert Bundle.open(out).engines


def test_resolutions_that_cannot_be(factory: str, weights: Path, out: Path) -> None:
    for text in ("0x32", "32x", "-3", "axb", "1x2x3"):
        result = invoke("patchconvnet", "--weights", weights, "--resolution", text, "-o", out)
        refused(result, 2, "is not HxW in pixels, such as 224x224", out=out)
    result = invoke(factory, "--random-weights", "--precision", "fp32", "--resolution", "8x8", "-o", out)
    refused(result, 1, "cannot run on one input of shape (1, 3, 8, 8)", "check --resolution", out=out)


def test_any_other_resolution_is_taken(weights: Path, out: Path) -> None:
    """The stem pads, so sides need not be multiples of the patch, nor equal."""
    given = ["--precision", "fp32", "--resolution", "30x45", "-q", "-o", out]
    assert invoke("patchconvnet", "--weights", weights, *given).exit_code == 0
    assert Bundle.open(out).manifest.interface.inputs[0].shape == ("batch", 3, 30, 45)


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--batch", "4:2:1"], "is not ordered"),
        (["--batch", "x"], "was not understood"),
        (["--crop-pct", "0"], "crop_pct 0.0 is not in (0, 1]"),
        (["--mean", "0.5"], "1 means but 3 standard deviations"),
        (["--mean", "a,b"], "not numbers separated by commas"),
        (["--max-drop", "-1"], "--max-drop -1.0"),
        (["--target", "cpu", "--target", "cpu"], "each only once"),
        (["--target", "gpu"], "'gpu' is not one of"),
        (["--precision", "int4"], "'int4' is not one of"),
        (["--images", "0"], "0 is not in the range"),
    ],
    ids=str,
)
def test_options_that_make_no_sense(weights: Path, out: Path, words: list[str], text: str) -> None:
    refused(invoke("patchconvnet", "--weights", weights, *words, "-o", out), 2, text, out=out)


def test_calibration_images_that_are_not_there(weights: Path, out: Path, tmp_path: Path) -> None:
    given = ["patchconvnet", "--weights", weights, "--precision", "int8", "-o", out, "--calibration"]
    refused(invoke(*given, tmp_path / "missing"), 1, "neither a folder of images nor an .npz file", out=out)
    refused(invoke(*given, out.parent), 1, "No images in", out=out)


def test_a_failed_parity_writes_nothing(weights: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pcn_deploy.proof import executions as proof
    from pcn_deploy.proof import judgement

    def spoiled(engine: Any, *rest: Any) -> Any:
        real = engine.outputs
        engine.outputs = lambda images: {"logits": real(images)["logits"][:, ::-1]}
        return judgement.verify_golden(engine, *rest)

    monkeypatch.setattr(proof, "verify_golden", spoiled)
    monkeypatch.setattr(proof, "EXECUTIONS", tuple(replace(each, judge=spoiled) for each in proof.EXECUTIONS))
    result = invoke("patchconvnet", "--weights", weights, *SMALL, "-o", out, "--json")
    assert result.exit_code == 3
    found = json.loads(result.stdout)
    assert (found["passed"], found["bytes"], found["parity"][0]["passed"]) == (False, None, False)
    assert f"Parity failed, so {out} was not written: cpu, stock: cosine" in result.stderr
    assert result.stderr.count("edge images: SQNR") == 1, "what the executions share is told once"
    assert list(out.parent.iterdir()) == []


def test_a_failed_build(weights: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        msg = "the library says no"
        raise BuildError(msg)

    monkeypatch.setattr(OnnxRuntimeBackend, "_build_impl", refuse)
    refused(invoke("patchconvnet", "--weights", weights, *SMALL, "-o", out, "-q"), 6, "the library says no", out=out)


def test_a_missing_dependency(weights: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: None if name == "onnxruntime" else real(name))
    result = invoke("patchconvnet", "--weights", weights, *SMALL, "-o", out, "-q")
    refused(result, 7, install("runtime"), out=out)
