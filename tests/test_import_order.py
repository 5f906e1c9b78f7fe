"""A file sees only rooms below its own, whether it imports at its head, in a function or for type checkers."""

from __future__ import annotations

import ast
import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = (
    "cli",
    "verbs",
    "show",
    "proof",
    "artefact",
    "graph",
    "calibration",
    "network",
    "models",
    "data",
    "tasks",
    "engines",
    "leaves",
)
"""Top floor first; leaves are the modules that stand in no folder."""


def modules(root: Path) -> dict[str, Path]:
    """Every module by its name without `pcn_deploy.`; links are not walked."""
    found = {}
    for top in (root / "pcn_deploy", *(root / name for name in ("cli", "engines", "calibration"))):
        for folder, _, files in os.walk(top):
            for path in (Path(folder) / name for name in files if name.endswith(".py")):
                place = path.relative_to(top if top.name == "pcn_deploy" else root).with_suffix("")
                found[".".join(place.parts).removesuffix("__init__").removesuffix(".")] = path
    del found[""]  # the package itself hands out names of all rooms, when they are asked for
    return found


def room(module: str) -> str:
    first, _, rest = module.partition(".")
    return first if rest or first in ROOMS else "leaves"


def imported(path: Path, known: dict[str, Path]) -> set[str]:
    """The modules of this package that a file imports anywhere."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            names |= {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {name.removeprefix("pcn_deploy.") for name in names} & set(known)


def looking_up(root: Path) -> list[str]:
    known = modules(root)
    return sorted(
        f"{module} imports {other}"
        for module, path in known.items()
        for other in imported(path, known)
        if ROOMS.index(room(other)) < ROOMS.index(room(module))
    )


def test_no_file_looks_up() -> None:
    assert {room(module) for module in modules(ROOT)} == set(ROOMS)
    assert looking_up(ROOT) == []


@pytest.mark.parametrize(
    ("place", "line"),
    [
        ("pcn_deploy/tasks/metrics.py", "from pcn_deploy.proof import judgement"),
        ("pcn_deploy/errors.py", "import pcn_deploy.tasks.metrics"),
        ("calibration/plan/rules.py", "def f():\n    from pcn_deploy.graph.export import serialise"),
        ("engines/base.py", "if TYPE_CHECKING:\n    from pcn_deploy.artefact.bundle import Bundle"),
    ],
)
def test_one_import_upward_is_seen(place: str, line: str, tmp_path: Path) -> None:
    for path in modules(ROOT).values():
        copy = tmp_path / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    (tmp_path / "pcn_deploy" / "__init__.py").touch()
    assert looking_up(tmp_path) == []
    with (tmp_path / place).open("a") as file:
        file.write(f"\n\n{line}\n")
    assert looking_up(tmp_path)


def test_no_modules_go_round_in_a_circle() -> None:
    known = modules(ROOT)
    left = {module: imported(path, known) - {module} for module, path in known.items()}
    while free := {module for module, others in left.items() if not others & set(left)}:
        left = {module: others for module, others in left.items() if module not in free}
    assert not left


FRAMEWORKS = {
    *("torch", "onnx", "onnx_ir", "onnxscript", "onnxruntime", "safetensors"),
    *("PIL", "matplotlib", "rich", "click"),
}


def statements(body: list[ast.stmt]) -> set[str]:
    """What the imports among statements name, those in `try` included, those for type checkers not."""
    names: set[str] = set()
    for node in body:
        if isinstance(node, ast.ImportFrom):
            names |= {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.Try):
            names |= statements(node.body)
    return {name.removeprefix("pcn_deploy.") for name in names}


def frameworks_loaded(trees: dict[str, ast.Module]) -> dict[str, set[str]]:
    """The frameworks that importing each module loads, by its own imports and those of what it imports."""
    names = {module: statements(tree.body) for module, tree in trees.items()}
    loaded = {module: {name.partition(".")[0] for name in own} & FRAMEWORKS for module, own in names.items()}
    below = {module: own & set(trees) for module, own in names.items()}
    before: dict[str, set[str]] = {}
    while before != loaded:
        before = loaded
        loaded = {module: own.union(*(loaded[name] for name in below[module])) for module, own in loaded.items()}
    return loaded


def needless(trees: dict[str, ast.Module]) -> list[str]:
    """Imports of our modules inside functions that keep no framework out."""
    loaded, found = frameworks_loaded(trees), []
    for module, tree in trees.items():
        functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
        inside = {node for function in functions for node in ast.walk(function) if isinstance(node, ast.ImportFrom)}
        for node in sorted(inside, key=lambda node: node.lineno):
            names = statements([node]) & set(trees)
            if names and not set().union(*(loaded[name] for name in names)) - loaded[module]:
                found.append(f"{module}:{node.lineno}: {ast.unparse(node)}")
    return found


def test_functions_import_our_modules_only_to_keep_frameworks_out() -> None:
    trees = {module: ast.parse(path.read_text(encoding="utf-8")) for module, path in modules(ROOT).items()}
    assert needless(trees) == []
    trees["tasks.metrics"].body += ast.parse("def f():\n    from pcn_deploy.exact import ExactSum").body
    (found,) = needless(trees)
    assert found.startswith("tasks.metrics:")
    trees["exact"].body += ast.parse("import torch").body
    assert not any(each.startswith("tasks.metrics:") for each in needless(trees))
