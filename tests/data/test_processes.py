"""Four processes that share the images find what one finds, to the bit, and fail together."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pcn_deploy.data.processes import Processes, current, is_first, join
from pcn_deploy.errors import ProcessError

pytest.importorskip("torch")

SCRIPT = Path(__file__).with_name("shared_run.py")
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",  # as torchrun sets it: with more threads, activations differ in the last digits
    "GLOO_SOCKET_IFNAME": "lo",
    "PYTHONPATH": os.pathsep.join(sys.path),
}
TASKS = ("ranges", "parity", "search", "unreadable", "bad_image", "bug", "other_images")


def finish(process: subprocess.Popen[str]) -> None:
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output


def start(*words: object, **variables: str) -> subprocess.Popen[str]:
    kept = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
    return subprocess.Popen(
        [sys.executable, *map(str, words)],
        env={**kept, **ENVIRONMENT, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What one process alone and each of four found in every task."""
    one, four = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("four")
    finish(start(SCRIPT, one, "ranges", "parity", "search", "unreadable"))
    run = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4")
    finish(start(*run, SCRIPT, four, *TASKS))
    files = [*one.glob("*.json"), *four.glob("[0-3].json")]
    return {path.stem: json.loads(path.read_text()) for path in files if not path.stem.startswith("cache")}


def test_everybody_took_part(found: dict[str, dict[str, Any]]) -> None:
    assert set(found) == {"alone", "0", "1", "2", "3"}


@pytest.mark.parametrize("calibrator", ["max", "percentile", "entropy", "mse", "cached"])
def test_ranges_and_histograms_of_four_processes_are_those_of_one(
    found: dict[str, dict[str, Any]], calibrator: str
) -> None:
    expected = found["alone"]["ranges"][calibrator]
    assert expected["images"] == 45
    assert all(value > 0 for value in expected["ranges"].values())
    assert bool(expected["histograms"]) == (calibrator != "max")
    for rank in "0123":
        assert found[rank]["ranges"][calibrator] == expected


def test_parity_of_four_processes_is_that_of_one(found: dict[str, dict[str, Any]]) -> None:
    expected = found["alone"]["parity"]
    assert expected["metrics"]["top1_reference"] == pytest.approx(100 * 30 / 45)
    assert all(found[rank]["parity"] == expected for rank in "0123")


def test_four_processes_share_a_search_and_an_analysis(found: dict[str, dict[str, Any]]) -> None:
    expected = found["alone"]["search"]
    assert 0 < len(expected["found"]["unquantized"]) < expected["found"]["evaluations"]
    for rank in "0123":
        mine = found[rank]["search"]
        assert mine["found"] == expected["found"]
        for shared, alone in zip(mine["runs"], expected["runs"], strict=True):
            assert shared < alone / 2, "each runs the network for its share"


def test_an_unreadable_image_moves_no_other(found: dict[str, dict[str, Any]]) -> None:
    expected = {**found["alone"]["unreadable"]}
    assert (expected["images"], expected["unreadable"]) == (23, 1)
    differing = ("source", "sha256")  # each made a folder of its own
    for rank in "0123":
        mine = found[rank]["unreadable"]
        assert {key: mine[key] for key in mine if key not in differing} == {
            key: expected[key] for key in expected if key not in differing
        }


@pytest.mark.parametrize(
    ("task", "culprit", "kind", "words"),
    [
        ("bad_image", 1, "DataError", "array[9] holds NaN or infinite values"),
        ("bug", 2, "ProcessError", "TypeError: a bug"),
        ("other_images", None, "DataError", "Process 3 has other images than process 0"),
    ],
)
def test_all_fail_when_one_fails(
    found: dict[str, dict[str, Any]], task: str, culprit: int | None, kind: str, words: str
) -> None:
    for rank in range(4):
        name, message = found[str(rank)][task]
        if rank == culprit:
            assert not message.startswith("Process"), "its own error"
            continue
        assert name == kind
        assert message.startswith(f"Process {culprit} of 4: {words}" if culprit is not None else words)


def test_a_process_that_dies_leaves_nobody_waiting(tmp_path: Path) -> None:
    """Without torchrun, which would end the others."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "3"}
    started = [start(SCRIPT, tmp_path, "dies", **place, RANK=str(rank)) for rank in range(3)]
    for process in started:
        process.communicate(timeout=60)
    assert started[1].returncode < 0
    for rank in (0, 2):
        name, message = json.loads((tmp_path / f"{rank}.json").read_text())["dies"]
        assert name == "ProcessError"
        assert f"Process {rank} of 3 lost contact with the others: one of them died" in message


@pytest.mark.parametrize("rank", [None, "0"])
def test_without_the_others_it_says_what_is_missing(monkeypatch: pytest.MonkeyPatch, rank: str | None) -> None:
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    with pytest.raises(ProcessError, match=r"cannot be reached.*Start them with torchrun, or unset WORLD_SIZE"), join():
        pytest.fail("joined nobody")
    assert type(current()) is Processes


def test_a_process_alone_joins_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for value in (None, "", "1"):
        monkeypatch.delenv("WORLD_SIZE", raising=False)
        if value is not None:
            monkeypatch.setenv("WORLD_SIZE", value)
        with join() as processes:
            assert type(processes) is Processes
            assert (processes.rank, processes.count, processes.first) == (0, 1, True)
            assert processes.gather(b"x") == [b"x"]
            assert current() is processes


def test_who_prints(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    for rank, first in (("0", True), ("1", False), ("3", False)):
        monkeypatch.setenv("RANK", rank)
        assert is_first() is first
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert is_first()
