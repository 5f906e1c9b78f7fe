"""The page that a new user follows: every command of it runs, in its order, in a folder of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("sklearn")

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "quick-start.md"
BLOCK = re.compile(r"^```(sh|python)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def test_every_command_of_the_quick_start_runs(tmp_path: Path) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    beside = str(Path(sys.executable).parent)
    environment = {**os.environ, "PATH": f"{beside}{os.pathsep}{os.environ['PATH']}", "COLUMNS": "80"}
    shown = []
    for language, text in BLOCK.findall(PAGE.read_text(encoding="utf-8")):
        command = ["bash", "-euc", text] if language == "sh" else [sys.executable, "-c", text]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"
        shown.append(done.stdout)
    images, built, answered, frame, proven = shown
    assert "1437 images" in images
    assert "360 images" in images
    assert "Wrote lost.csv" in built
    assert (tmp_path / "digits.pcn").exists()
    assert (tmp_path / "lost.csv").read_text().startswith("target,image,true_class")
    assert len(re.findall(r"digits/test/3/\d+\.png", answered.replace("\n", ""))) >= 30
    assert re.fullmatch(r"\d 0\.\d+", frame.strip()) or re.fullmatch(r"\d 1\.0", frame.strip())
    assert proven.count("passed") >= 2
