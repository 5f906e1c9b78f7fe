"""At 80 and at 120 columns no word and no number is broken, and no line is wider than the screen.

What a command prints on a screen of 1000 columns, where nothing wraps, tells which words there are.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from helpers import small_manifest
from rich.console import Console
from rich.progress import Progress

from pcn_deploy import Bundle
from pcn_deploy.artefact.manifest import Judged, Manifest
from pcn_deploy.calibration.plan.rules import PlanEntry, PrecisionPlan
from pcn_deploy.calibration.search.analysis import Analysis
from pcn_deploy.calibration.search.search import SearchResult
from pcn_deploy.calibration.search.sensitivity import Effect, LayerSensitivity, Sensitivity
from pcn_deploy.cli import display
from pcn_deploy.cli.commands import analyze, bench, build, engine, run, verify
from pcn_deploy.cli.main import COMMANDS, main
from pcn_deploy.cli.steps import Bars, columns
from pcn_deploy.cli.tables import column_widths
from pcn_deploy.cli.text import wrapped
from pcn_deploy.members import BUDGET, PLAN, parity_member
from pcn_deploy.proof.budget import BudgetProof
from pcn_deploy.show.heatmap import MapRange
from pcn_deploy.tasks.bound import PairedCounts
from pcn_deploy.tasks.classification import LogitsMeter
from pcn_deploy.tasks.limits import budget_for
from pcn_deploy.tasks.report import ParityReport
from pcn_deploy.verbs.bench import Latency
from pcn_deploy.verbs.build import CompileResult
from pcn_deploy.verbs.run import Prediction
from pcn_deploy.verbs.steps.advice import Attempt

TARGETS = ("tensorrt-rtx", "torchscript")
DATA = "/mnt/storage-of-the-robotics-laboratory/datasets/warehouse_parts_2026-11/validation_of_november/images"
LAYERS = [f"backbone.stages.{n}.blocks.17.attention.relative_position_projection.conv_expand" for n in range(9)]
CLASSES = ["countersunk_flat_head_socket_cap_screw_M8x1.25_stainless_steel_A4-80", "hexagon nut, zinc plated", "washer"]


def report(target: str, executed_by: str) -> ParityReport:
    """With a number in every column."""
    expected, error = np.random.default_rng(0).standard_normal((2, 300, 3))
    meter = LogitsMeter()
    labels = np.random.default_rng(1).integers(0, 3, 300)
    meter.update(expected, expected + 0.05 * error, labels)
    one = meter.report(target=target, executed_by=executed_by, data=DATA, budget=budget_for("int8", 5.0))
    edges = {"edge_cosine_min": -0.987654, "edge_sqnr_db": 27.25, "attention_map_cosine_min": 0.999999}
    edges |= {"attention_map_sqnr_db": 123.4, "attention_map_max_abs_error": 1.2e-05}
    parts = {"edge": False, "rounded": True, "attention_map": True}
    return replace(
        one,
        metrics={**one.metrics, **edges},
        executions={"rounded": one.metrics},
        outputs={"logits": "logits", "attention_map": "attention_map"},
        parts=parts,
        failures=(*one.failures, "edge images: cosine -0.987654 of the worst image, gravel.png, is below 0.95"),
        notes=(f"the images of {DATA} hardly differ to the network.",),
    )


def proof(target: str) -> BudgetProof:
    return BudgetProof(
        target=target,
        executed_by="rounded",
        data=DATA,
        held_out=True,
        labelled=True,
        counts=PairedCounts(50000, 1234, 1200),
        top1=81.25,
        budget=0.05,
        given=100000,
    )


def manifest() -> Manifest:
    made = Manifest.from_json({**small_manifest(), "model": f"{DATA}/own_network.py:make_network", "precision": "int8"})
    made.calibration = {"calibrator": "percentile", "images": 512, "unreadable": 3, "source": DATA}
    made.calibration |= {"recovery": {"equalisation": 12, "smoothquant": 34, "weight-rounding": 56}}
    made.golden, made.class_names, made.notes = DATA, CLASSES, [f"3 of 512 images of {DATA} look odd."]
    made.judged = Judged(golden_images=8, edge_images=7, accuracy="no labelled images were at hand: give --data DIR")
    made.provenance = {"weights": f"{DATA}/checkpoint_epoch_300_ema.safetensors", "weights_sha256": "9f" * 32}
    made.choice = {"reason": "1.73 x as fast: 1.234 ms in INT8, 2.134 ms in FP16 on tensorrt-rtx"}
    return made


def plan() -> PrecisionPlan:
    reasons = ("dense product of enough rows and channels", "activations reach 1.23e+05, above 16376", "as asked for")
    entries = tuple(
        PlanEntry(op=name, kind="ConvTranspose2d", precision=("int8", "fp32", "fp16")[n % 3], reason=reasons[n % 3])
        for n, name in enumerate(LAYERS)
    )
    return PrecisionPlan(precision="int8", remainder="fp16", entries=entries)


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """With everything in it that a bundle can tell; its engines are bytes that nothing opens."""
    made = Bundle(manifest(), {})
    made.add_json(PLAN, plan().to_json())
    for target in TARGETS:
        made.add_engine(target, f"engines/{target}.engine", b"plan" * 70000, {"tensorrt": "10.3.0.26", "sm": "SM87"})
        made.add_json(parity_member(target), report(target, "rounded").to_json())
    made.add_json(BUDGET, {"search": None, "proofs": [proof(target).to_json() for target in TARGETS]})
    place = tmp_path / "bundles_for_the_delivery_of_november" / "patchconvnet_s60_warehouse_parts_int8.pcn"
    place.parent.mkdir()
    return made.save(place)


def effect(value: float) -> Effect:
    return Effect(sqnr_db=value, top1_agreement=99.25, top1_drop=-0.75)


def print_build(file: Path) -> None:
    parameters = {"output": file, "explain": True, "changed": file, "calibration_cache": file}
    search = SearchResult(
        budget=0.05, unquantized=tuple(LAYERS), counts=PairedCounts(900, 9, 1), reached=True, evaluations=123
    )
    proofs, reports = tuple(map(proof, TARGETS)), tuple(report(target, "rounded") for target in TARGETS)
    result = CompileResult(bundle=Bundle.open(file), plan=plan(), reports=reports, search=search, proofs=proofs)
    words = "--recipe FILE.toml with " + ", ".join(f'[layers."{name}"] precision = "fp16"' for name in LAYERS)
    advice = (
        Attempt(words="--calibrator max", sqnr_db=17.5, passed=True),
        Attempt(words=words, sqnr_db=16.5, passed=False),
    )
    build._show(result, display.failures((*reports, *proofs)), parameters, wrote_cache=True)
    display.tell(display.tried(advice, explain=True))


def print_verify(file: Path) -> None:
    verify._show(report(TARGETS[0], "cpu"), Bundle.open(file).manifest, given=True)
    verify._show(replace(report(TARGETS[0], "cpu"), failures=()), Bundle.open(file).manifest, given=False)


def print_run(file: Path) -> None:
    seen = MapRange(class_index=0, smallest=0.001, largest=0.25, uniform=0.005, nearly_flat=False)
    one = Prediction(
        image=f"{DATA}/IMG_2026-11-27_08-47-50.jpg",
        classes=(0, 1, 2),
        names=tuple(CLASSES),
        probabilities=(0.9, 0.09, 0.01),
        outputs={"boundary_features": {"role": "tensor", "shape": [64, 7, 7], "smallest": -1.25, "largest": 3.5}},
        heatmap=f"{DATA}/maps/IMG_2026-11-27_08-47-50.png",
        attention=seen,
    )
    run._show([one, replace(one, image="short.png")], CLASSES, "tensorrt-rtx")


def print_bench(file: Path) -> None:
    one = Latency(target="tensorrt-rtx", batch=256, runs=123456, p50=1234.56, p90=2345.67, p99=13456.78)
    bench._show({"tensorrt-rtx": one}, {"tensorrt": f"no NVIDIA driver: libcuda.so.1 not found, {file}"})


def print_analyze(file: Path) -> None:
    layers = tuple(
        LayerSensitivity(
            op=name,
            kind="ConvTranspose2d",
            only_quantized=effect(-12.5),
            only_kept=effect(31.25),
            weight_only=effect(102.5),
            input_only=effect(7.75),
        )
        for name in LAYERS
    )
    found = Sensitivity(images=128, labelled=True, all_quantized=effect(15.5), layers=layers)
    order = tuple(LAYERS)
    analyze._print(Analysis(sensitivity=found, order=order, unquantized={}, data=DATA, resumed=12), file, file)


def command(*words: Any) -> Callable[[Path], Result]:
    """The command itself; FILE stands for the bundle."""
    return lambda file: CliRunner().invoke(main, [word.replace("FILE", str(file)) for word in words])


PRINTED: dict[str, Callable[[Path], Any]] = {
    "build": print_build,
    "verify": print_verify,
    "run": print_run,
    "bench": print_bench,
    "analyze": print_analyze,
    "inspect": command("inspect", "FILE"),
    "inspect --explain": command("inspect", "FILE", "--explain"),
    "models": command("models"),
    "doctor": command("doctor"),
    "engine": command("engine", "FILE", "--target", "tensorrt-rtx"),
    "slim": command("slim", "FILE", "--target", "torchscript", "-o", "FILE.plan"),
    "extract": command("extract", "FILE", "--target", "tensorrt-rtx", "-o", "FILE.plan"),
    "an error": command("inspect", "FILE.which.is.not.there"),
    "another error": command("build", "patchconvnet", "-o", "FILE", "--weights", f"{DATA}/no.pth"),
    "usage": command("verify", "FILE", "--classes", f"{DATA}/classes.txt"),
    "help": command("--help"),
    **{f"{name} --help": command(name, "--help") for name in COMMANDS},
}


def printed(name: str, file: Path, columns: int, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> str:
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setattr(engine, "add_engine", lambda *_, **__: replace(report(TARGETS[0], "cpu"), failures=()))
    capsys.readouterr()
    result = PRINTED[name](file)
    captured = capsys.readouterr()
    return result.output if isinstance(result, Result) else captured.out + captured.err


HEADS_OF_TWO = {"what", "value"}
"""In a record of two columns the first names the second."""


def words(text: str) -> set[str]:
    """What stands between spaces and the lines of tables, without the signs that records put behind it."""
    return {word.strip(":;") for word in re.split(r"[\s─-╿]+", text)} - {""}


@pytest.mark.parametrize("screen", [80, 120])
@pytest.mark.parametrize("name", PRINTED)
def test_no_word_and_no_number_is_broken(
    bundle: Path, name: str, screen: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = printed(name, bundle, 1000, monkeypatch, capsys)
    for made in bundle.parent.glob("*.plan*"):
        made.unlink()
    shown = printed(name, bundle, screen, monkeypatch, capsys)
    assert len(words(whole)) > 5
    assert words(whole) - words(shown) <= HEADS_OF_TWO
    for line in shown.splitlines():
        assert len(line) <= screen or " " not in line.strip(" \\"), "only a word that is longer than the screen"


def test_the_words_that_are_looked_for_are_those_of_the_data(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Otherwise the test above could pass on nothing."""
    expected = {
        "build": {*LAYERS, DATA, "-0.987654", "1.2e-05", "1234", "50000", "1.23e+05", "27.2", "equalisation"},
        "verify": {DATA, "-0.987654", "123.4", "attention"},
        "run": {f"{DATA}/IMG_2026-11-27_08-47-50.jpg", CLASSES[0], "90.00", "64x7x7", "boundary_features"},
        "bench": {"123456", "13456.78"},
        "analyze": {*LAYERS, "-12.5", "102.5", "99.25"},
        "inspect": {"9f" * 32, f"{DATA}/checkpoint_epoch_300_ema.safetensors", str(bundle)},
        "inspect --explain": set(LAYERS),
        "an error": {f"{bundle}.which.is.not.there"},
        "engine": {"Wrote"},
    }
    for name, some in expected.items():
        shown = words(printed(name, bundle, 80, monkeypatch, capsys).replace("'", " "))
        assert {
            word for word in some if word not in shown and f"{word}." not in shown and f"{word}," not in shown
        } == set()


def test_what_fits_is_a_table_and_what_does_not_is_records(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [["a.png", "1", "cat"], ["", "2", "dog"], ["b.png", "1", "cat"]]
    assert column_widths(["image", "rank", "class"], rows, 24) == [5, 4, 5]
    assert column_widths(["image", "rank", "class"], rows, 23) is None
    assert column_widths(["what"], [["one two three four"]], 10) is None, "a cell of four lines is no cell"
    assert column_widths(["what", "x"], [["one two three four", "y"]], 100) == [18, 1]


def test_words_longer_than_the_screen_and_commands_stay_whole() -> None:
    assert wrapped("see /a/very/long/path now", 10) == "see\n/a/very/long/path\nnow"
    assert wrapped("  one two three", 9) == "  one two\n  three"
    assert wrapped("Try it:\n  pcn-compile verify x.pcn", 24) == "Try it:\n  pcn-compile verify \\\n      x.pcn"
    assert wrapped("pip install x", 5) == "pip install\nx"
    assert wrapped("at 31.5 dB of 4 MiB", 9) == "at\n31.5 dB\nof 4 MiB"
    assert wrapped("a b", None) == "a b"
    assert wrapped("", 10) == ""


def test_bars_fit_eighty_columns() -> None:
    screen = io.StringIO()
    console = Console(file=screen, width=80, force_terminal=True, color_system=None, legacy_windows=False)
    with Progress(*columns(), console=console) as progress:
        bars = Bars(progress)
        bars("Answers of the network", 12345, 50000, "images")
        bars("Loading into ONNX Runtime", 1, 1)
    for text in ("Answers of the network", "12345/50000", "Loading into ONNX Runtime", "1/1"):
        assert text in screen.getvalue(), screen.getvalue()
