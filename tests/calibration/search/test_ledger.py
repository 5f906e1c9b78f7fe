"""Measurements that outlive a killed run."""

from __future__ import annotations

from pathlib import Path

import pytest

from pcn_deploy.calibration.search.ledger import Ledger
from pcn_deploy.errors import DataError, OutputError

RUN = {"run": "abc", "layers": ["a", "b"]}


def test_a_new_run_finds_what_the_killed_one_measured(tmp_path: Path) -> None:
    path = tmp_path / "run.partial"
    first = Ledger(path, RUN)
    first["one"] = {"sqnr_db": 30.25}
    first["two"] = [1, 2]
    second = Ledger(path, RUN)
    assert second.resumed == 2
    assert second["one"] == {"sqnr_db": 30.25}
    assert "two" in second
    assert "three" not in second
    second["three"] = 3
    assert Ledger(path, RUN).resumed == 3
    second.remove()
    assert not path.exists()


def test_a_line_that_was_cut_off_is_measured_again(tmp_path: Path) -> None:
    path = tmp_path / "run.partial"
    Ledger(path, RUN)["one"] = 1
    with path.open("a") as file:
        file.write('["two", {"sqnr')
    again = Ledger(path, RUN)
    assert again.resumed == 1
    again["two"] = 2
    assert Ledger(path, RUN)["two"] == 2


@pytest.mark.parametrize("text", ["", '{"version": '])
def test_a_run_killed_while_it_began_begins_again(tmp_path: Path, text: str) -> None:
    path = tmp_path / "run.partial"
    path.write_text(text)
    Ledger(path, RUN)["one"] = 1
    assert Ledger(path, RUN)["one"] == 1


@pytest.mark.parametrize("value", ["[99]", "null", '["a", "b"]'])
def test_an_altered_measurement_is_refused(tmp_path: Path, value: str) -> None:
    path = tmp_path / "run.partial"
    Ledger(path, RUN)["one"] = [1, 2]
    path.write_text(path.read_text().replace("[1, 2]", value))
    with pytest.raises(DataError, match="the measurement 'one' was altered"):
        Ledger(path, RUN)


def test_the_measurements_of_another_run_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.partial"
    Ledger(path, RUN)["one"] = 1
    with pytest.raises(DataError, match="another run: run differ"):
        Ledger(path, {**RUN, "run": "xyz"})


@pytest.mark.parametrize(
    "text", ["no json\n", '{"version": 1}\n17\n', "\xff\n[1]\n", "[]\n", "5\n", "[" * 100_000 + "\n"]
)
def test_a_file_that_holds_something_else_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "run.partial"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(DataError, match=r"run\.partial"):
        Ledger(path, RUN)


def test_a_folder_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="cannot be written"):
        Ledger(tmp_path / "none" / "run.partial", RUN)


def test_without_a_file_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    ledger = Ledger(None, RUN)
    ledger["one"] = 1
    assert ledger["one"] == 1
    assert not list(tmp_path.iterdir())
