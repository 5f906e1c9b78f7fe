"""The group: help, version, errors into exit codes, a real process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

import pcn_deploy
from pcn_deploy import errors
from pcn_deploy.cli.main import COMMANDS, EXIT_CODES, main


def process(*words: object) -> subprocess.CompletedProcess[str]:
    code = "import sys; from pcn_deploy.cli.main import main; main()"
    command = [sys.executable, "-c", code, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


def test_help_lists_every_command() -> None:
    for flag in ("-h", "--help"):
        result = CliRunner().invoke(main, [flag])
        assert result.exit_code == 0
        for name, line in COMMANDS.items():
            assert f"  {name} " in result.stdout
            assert line[:40] in result.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_and_its_name(name: str) -> None:
    command = main.get_command(click.Context(main), name)
    assert command is not None
    assert command.name == name
    result = CliRunner().invoke(main, [name, "--help"])
    assert result.exit_code == 0
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert parameter.help, f"{name} {parameter.opts} says nothing about itself"
            assert parameter.opts[-1] in result.stdout


def test_version() -> None:
    result = CliRunner().invoke(main, ["--version"])
    assert pcn_deploy.__version__ in result.stdout


def test_a_command_that_is_nearly_one() -> None:
    result = CliRunner().invoke(main, ["verfy"])
    assert result.exit_code == 2
    assert "No such command 'verfy'. Did you mean 'verify'?" in result.stderr
    assert CliRunner().invoke(main, ["xyz"]).exit_code == 2


EXPECTED = {
    errors.PcnDeployError: 1,
    errors.ModelError: 1,
    errors.CheckpointError: 1,
    errors.DataError: 1,
    errors.OutputError: 1,
    errors.ProcessError: 1,
    errors.ExecutionError: 1,
    errors.StockSessionError: 1,
    errors.OptionError: 2,
    errors.ParityError: 3,
    errors.IncompatibleError: 4,
    errors.BundleError: 5,
    errors.BuildError: 6,
    errors.DependencyError: 7,
}


def test_every_error_of_ours_has_its_code() -> None:
    assert set(EXPECTED) == {errors.PcnDeployError, *errors.PcnDeployError.__subclasses__()}
    assert set(EXIT_CODES) == {kind for kind, code in EXPECTED.items() if code != 1}


@pytest.mark.parametrize("kind", EXPECTED, ids=lambda kind: kind.__name__)
def test_errors_become_exit_codes(kind: type[errors.PcnDeployError], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        msg = "the reason"
        raise kind(msg)

    monkeypatch.setattr("pcn_deploy.cli.commands.models.list_models", fail)
    result = CliRunner().invoke(main, ["models"])
    assert result.exit_code == EXPECTED[kind]
    assert result.stderr.rstrip().endswith("Error: the reason")
    assert result.stdout == ""


def test_a_bug_of_ours_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("pcn_deploy.cli.commands.models.list_models", fail)
    assert isinstance(CliRunner().invoke(main, ["models"]).exception, ZeroDivisionError)


def test_a_real_process_keeps_stdout_for_json() -> None:
    done = process("models", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["models"]


def test_a_real_process_fails_without_a_traceback(tmp_path: Path) -> None:
    (tmp_path / "bad.pcn").write_text("no bundle")
    done = process("inspect", tmp_path / "bad.pcn", "--json")
    assert (done.returncode, done.stdout) == (5, "")
    assert done.stderr.startswith("Error: ")
    assert "Traceback" not in done.stderr
    done = process("build", "no_such_model", "--random-weights", "-o", tmp_path / "a.pcn")
    assert (done.returncode, done.stdout) == (1, "")
    assert "Unknown model 'no_such_model'" in done.stderr
    assert not (tmp_path / "a.pcn").exists()
