"""Benchmarks and examples run by hand: what they take from the library must be there after every move."""

from __future__ import annotations

import ast
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted((*ROOT.glob("benchmarks/*.py"), *ROOT.glob("examples/**/*.py")))


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_a_script_imports_is_there(path: Path) -> None:
    pytest.importorskip("torch")
    taken = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
    for node in taken:
        if node.module is not None and node.module.split(".")[0] == "pcn_deploy":
            module = import_module(node.module)
            names = [name.name for name in node.names]
            missing = [name for name in names if not (hasattr(module, name) or find_spec(f"{node.module}.{name}"))]
            assert not missing, f"{path.name} imports {missing} of {node.module}"
