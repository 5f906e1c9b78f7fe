"""What the tests of the command line and of the verbs behind it share."""

from __future__ import annotations

from typing import Any

from click.testing import CliRunner, Result

from pcn_deploy import Bundle
from pcn_deploy.cli.main import main


def invoke(*words: Any) -> Result:
    """Run `pcn-compile` in this process."""
    return CliRunner().invoke(main, [str(word) for word in words])


def refused(result: Result, code: int, *words: str) -> None:
    """One clear error on stderr, the right code, no traceback, nothing on stdout."""
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    for word in ("Error: ", *words):
        assert word in " ".join(result.stderr.split()), result.stderr
    assert result.stdout == ""


def with_engines_of(bundle: Bundle, *targets: str) -> Bundle:
    """The bundle, its engines of other targets gone; their members stay."""
    bundle.manifest["engines"] = [bundle.engine(target) for target in targets]
    return bundle
