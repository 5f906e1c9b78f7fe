"""Find where a network fails: the innermost module, and the line of the network's own code."""

from __future__ import annotations

import inspect
import linecache
import logging
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch
from torch import fx, nn

log = logging.getLogger(__name__)

_TORCH = str(Path(torch.__file__).parent)
_LOCATION = re.compile(r'File "([^"]+)", line (\d+)')
_COMPILED_BEFORE = "Can't redefine method"
"""TorchScript's words on a type that it failed to compile before."""


@dataclass(frozen=True)
class Place:
    """Where a network fails.

    Attributes:
        module: Path and class of the innermost module, such as `stage.1 (class Attention)`.
        file: File of the network's own code; empty if only torch's code is involved.
        line: Line in it.
        helper: Whether what fails is a function that this line calls, not the line itself.
    """

    module: str
    file: str = ""
    line: int = 0
    helper: bool = False

    def __str__(self) -> str:
        if not self.file:
            return self.module
        source = linecache.getline(self.file, self.line).strip()
        return f"{self.module}, {self.file}:{self.line}\n    {source}".rstrip()


def safely(find: Callable[..., Place | None], *given: Any) -> Place | None:
    """A search for the place that may itself fail."""
    try:
        return find(*given)
    except Exception as error:
        log.debug("The place of the error was not found: %r", error)
        return None


def chain_of(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what it came from, each once."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def place_of_module(path: str, module: nn.Module) -> Place:
    """A module as a whole."""
    return Place(_name(path, module))


def _name(path: str, module: nn.Module) -> str:
    return f"{path or 'the network itself'} (class {type(module).__name__})"


def _is_own(file: str) -> bool:
    return not file.startswith(_TORCH)


def _lines_of(code: CodeType) -> range:
    """The lines of a function, decorators included."""
    last = max((line for _, _, line in code.co_lines() if line), default=code.co_firstlineno)
    return range(code.co_firstlineno, last + 1)


def _own_code(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, range]]:
    """Path, module, file and lines of every method of the network's modules, torch's own left out."""
    for path, module in model.named_modules():
        for kind in type(module).__mro__:
            for function in vars(kind).values():
                code = getattr(inspect.unwrap(function), "__code__", None) if callable(function) else None
                if code is not None and _is_own(code.co_filename):
                    yield path, module, code.co_filename, _lines_of(code)


def _place_in_frames(model: nn.Module, frames: Iterable[tuple[FrameType, int]]) -> Place | None:
    """The innermost module on the stack, and the innermost line of the network's own files."""
    paths = {id(module): _name(path, module) for path, module in model.named_modules()}
    files = {file for _, _, file, _ in _own_code(model)}
    owner, file, line = "", "", 0
    for frame, number in frames:
        owner = paths.get(id(frame.f_locals.get("self")), owner)
        if owner and frame.f_code.co_filename in files:
            file, line = frame.f_code.co_filename, number
    return Place(owner, file, line) if owner else None


def place_in_traceback(model: nn.Module, error: Exception) -> Place | None:
    """The place where an error was raised, or what it came from."""
    for link in reversed(list(chain_of(error))):
        place = _place_in_frames(model, traceback.walk_tb(link.__traceback__))
        if place is not None:
            return place
    return None


def place_of_node(error: Exception) -> Place | None:
    """The place noted on the node that could not be translated."""
    for link in chain_of(error):
        for frame, _ in traceback.walk_tb(link.__traceback__):
            node = frame.f_locals.get("node")
            if isinstance(node, fx.Node) and node.meta.get("nn_module_stack"):
                path, kind = list(node.meta["nn_module_stack"].values())[-1]
                name = kind.rpartition(".")[2] if isinstance(kind, str) else kind.__name__
                places = [found for found in _LOCATION.findall(node.meta.get("stack_trace") or "") if _is_own(found[0])]
                module = f"{path or 'the network itself'} (class {name})"
                return Place(module, places[-1][0], int(places[-1][1])) if places else Place(module)
    return None


def place_of_specialisation(model: nn.Module, replay: Callable[[], Any]) -> Place | None:
    """Export again and look at the stack at the moment when the symbol of the batch becomes a number."""
    found: list[Place] = []

    class Watch(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if str(record.msg).startswith("set_replacement"):
                stack = reversed(list(traceback.walk_stack(sys._getframe())))
                found.extend(place for place in [safely(_place_in_frames, model, stack)] if place)

    logger, watch = logging.getLogger("torch.fx.experimental.symbolic_shapes"), Watch()
    level, handlers, propagate = logger.level, logger.handlers, logger.propagate
    logger.handlers, logger.propagate = [watch], False
    logger.setLevel(logging.INFO)
    try:
        replay()
    except Exception as error:  # the same error again: only the stack on the way to it matters
        log.debug("Exported again: %r", error)
    finally:
        logger.handlers, logger.propagate = handlers, propagate
        logger.setLevel(level)
    return found[0] if found else None


def place_in_source(model: nn.Module, error: Exception) -> Place | None:
    """The module whose code holds one of the lines in a message of TorchScript, the innermost first."""
    words = str(error)
    locations = [(file, int(line)) for file, line in _LOCATION.findall(words)]
    code = list(_own_code(model))
    for index, (file, line) in enumerate(locations):
        owners = {path: module for path, module, where, lines in code if where == file and line in lines}
        if owners:
            path = _first_that_fails(owners, words)
            return Place(_name(path, owners[path]), file, line, helper=index > 0)
    for file, line in locations:  # of a function that TorchScript refuses to read, only its own line is told
        called = re.search(r"def (\w+)", linecache.getline(file, line))
        for path, module, where, lines in code if called else []:
            for number in lines:
                if called and f"{called[1]}(" in linecache.getline(where, number):
                    return Place(_name(path, module), where, number, helper=True)
    return _deepest_that_fails("", model, words)


def _first_that_fails(modules: dict[str, nn.Module], words: str) -> str:
    """Which of several modules of one class it was: their settings may differ."""
    if len(modules) > 1:
        for path, module in modules.items():
            if _refusal(module) in (words, _COMPILED_BEFORE):
                return path
    return next(iter(modules))


def _deepest_that_fails(path: str, module: nn.Module, words: str) -> Place:
    for name, child in module.named_children():
        if _refusal(child) in (words, _COMPILED_BEFORE):
            return _deepest_that_fails(f"{path}.{name}".lstrip("."), child, words)
    forward = getattr(type(module).forward, "__code__", None)
    if forward is None or not _is_own(forward.co_filename):
        return Place(_name(path, module))
    lines = _lines_of(forward)
    line = next((at for at in lines if "def " in linecache.getline(forward.co_filename, at)), lines.start)
    return Place(_name(path, module), forward.co_filename, line)


def _refusal(module: nn.Module) -> str:
    """What TorchScript says against a module on its own; empty if nothing."""
    try:
        torch.jit.script(module)
    except Exception as error:
        return _COMPILED_BEFORE if str(error).startswith(_COMPILED_BEFORE) else str(error)
    return ""
