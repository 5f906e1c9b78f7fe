"""`pcn-compile models`."""

from __future__ import annotations

import json

from click.testing import CliRunner

from pcn_deploy.cli.main import main
from pcn_deploy.models.registry import list_models


def test_a_table_of_all() -> None:
    result = CliRunner().invoke(main, ["models"])
    assert result.exit_code == 0
    assert result.stderr == ""
    for info in list_models():
        assert info.name in result.stdout
    assert "25.23" in result.stdout, "millions of parameters of patchconvnet_s60"
    assert "file.py:factory" in result.stdout


def test_json() -> None:
    result = CliRunner().invoke(main, ["models", "--json"])
    assert result.exit_code == 0
    found = {entry["name"]: entry for entry in json.loads(result.stdout)["models"]}
    assert list(found) == [info.name for info in list_models()]
    assert found["patchconvnet_s60"]["parameters"] == 25_231_096
    assert found["patchconvnet_s60"]["resolution"] == [224, 224]
