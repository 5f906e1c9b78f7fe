"""What the documents point at exists: files, commands, options."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest

from pcn_deploy.cli.main import COMMANDS, main

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted(
    path
    for path in [
        *(ROOT / f"{name}.md" for name in ("README", "ARCHITECTURE", "CONTRIBUTING")),
        *ROOT.glob("docs/**/*.md"),
    ]
    if path.is_file()
)
documents = pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))

LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)(?:\s+\"[^\"]*\")?\)")
HEADING = re.compile(r"^#+\s+(.*)$", re.MULTILINE)
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
CALL = re.compile(r"pcn-compile((?:[^\n`\\|;&)]|\\\n)*)")


def anchors(path: Path) -> set[str]:
    """Anchors of the headings as GitHub makes them."""
    titles = HEADING.findall(FENCE.sub("", path.read_text(encoding="utf-8")))
    return {re.sub(r"[^\w\- ]", "", title.lower().replace("`", "")).replace(" ", "-") for title in titles}


def calls(path: Path) -> list[list[str]]:
    """The words after each `pcn-compile` in the text."""
    found = []
    for match in CALL.finditer(path.read_text(encoding="utf-8")):
        text = match[1].replace("\\\n", " ").split(" #")[0]
        try:
            words = shlex.split(text)
        except ValueError:
            words = text.split()
        if text.startswith(" ") and words:
            found.append(words)
    return found


def options_of(name: str) -> set[str]:
    context = click.Context(main)
    command = main.get_command(context, name)
    assert command is not None, name
    given = {flag for parameter in command.params for flag in (*parameter.opts, *parameter.secondary_opts)}
    return {flag for flag in given if flag.startswith("-")} | {"-h", "--help"}


def test_there_is_a_readme() -> None:
    assert ROOT / "README.md" in DOCUMENTS


@documents
def test_links_into_the_repository_lead_somewhere(path: Path) -> None:
    text = FENCE.sub("", path.read_text(encoding="utf-8"))
    for target in LINK.findall(text):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        place = (path.parent / name).resolve() if name else path
        assert place.exists(), f"{path.name} points at {target}"
        assert place.is_relative_to(ROOT), f"{path.name} points outside the repository: {target}"
        if anchor and place.suffix == ".md":
            assert anchor in anchors(place), f"{path.name} points at {target}"


@documents
def test_commands_and_options_shown_exist(path: Path) -> None:
    for words in calls(path):
        if words[0].startswith("-"):
            assert words[0] in {"-h", "--help", "-V", "--version"}, words
            continue
        if not re.fullmatch(r"[a-z]+", words[0]):
            continue
        assert words[0] in COMMANDS, f"{path.name}: pcn-compile {' '.join(words)}"
        known = options_of(words[0])
        for word in words[1:]:
            if re.match(r"--?[a-z]", word):
                assert word.split("=")[0] in known, f"{path.name}: pcn-compile {' '.join(words)}"


def test_the_readers_of_this_file_work(tmp_path: Path) -> None:
    """Otherwise the tests above could pass by seeing nothing."""
    page = tmp_path / "page.md"
    shown = "```\npcn-compile build M \\\n  --json # it\n```\n"
    page.write_text(f"# A `b` Title\n[x](y.md#z) `pcn-compile run F.pcn a.png`, then\n{shown}")
    assert anchors(page) == {"a-b-title"}
    assert LINK.findall(page.read_text()) == ["y.md#z"]
    assert calls(page) == [["run", "F.pcn", "a.png"], ["build", "M", "--json"]]
    assert {"--weights", "-o", "--json"} <= options_of("build")
