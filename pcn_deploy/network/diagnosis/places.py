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
from types import FrameType
from typing import Any

import torch
from torch import fx, nn

log = logging.getLogger(__name__)

_TORCH = str(Path(torch.__file__).parent)
_LOCATION = re.compile(r'File "([^"]+)", line (\d+)')


@dataclass(frozen=True)
class Place:
    """Where a network fails.

    Attributes:
        module: Path and class of the innermost module, such as `stage.1 (class Attention)`.
        file: File of the network's own code; empty if only torch's code is involved.
        line: Line in it.
    """

    module: str
    file: str = ""
    line: int = 0

    def __str__(self) -> str:
        if not self.file:
            return self.module
        source = linecache.getline(self.file, self.line).strip()
        return f"{self.module}, {self.file}:{self.line}\n    {source}".rstrip()


def safely(find: Callable[..., Place | None], *arguments: Any) -> Place | None:
    """A search for the place that may itself fail."""
    try:
        return find(*arguments)
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


def _own_files(model: nn.Module) -> set[str]:
    """The files that hold methods of the network's modules, torch's own left out."""
    classes = {kind for module in model.modules() for kind in type(module).__mro__}
    functions = [inspect.unwrap(value) for kind in classes for value in vars(kind).values() if callable(value)]
    files = {function.__code__.co_filename for function in functions if hasattr(function, "__code__")}
    return {file for file in files if _is_own(file)}


def _place_in_frames(model: nn.Module, frames: Iterable[tuple[FrameType, int]]) -> Place | None:
    """The innermost module on the stack, and the innermost line of the network's own files."""
    paths = {id(module): _name(path, module) for path, module in model.named_modules()}
    files = _own_files(model)
    owner, file, line = "", "", 0
    for frame, number in frames:
        owner = paths.get(id(_local(frame, "self")), owner)
        if owner and frame.f_code.co_filename in files:
            file, line = frame.f_code.co_filename, number
    return Place(owner, file, line) if owner else None


def _local(frame: FrameType, name: str) -> Any:
    """A local variable of a frame; None if it has none of that name.

    Before Python 3.13 a frame that was asked for its variables keeps all of them, deleted ones too, until it returns.
    So only those are asked that have the one in question.
    """
    code = frame.f_code
    return frame.f_locals.get(name) if name in (*code.co_varnames, *code.co_freevars) else None


def place_at_work(model: nn.Module, frames: Iterable[tuple[FrameType, int]]) -> Place | None:
    """The place that a stack of frames, the outermost first, is at."""
    return safely(_place_in_frames, model, frames)


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
            node = _local(frame, "node")
            if isinstance(node, fx.Node) and node.meta.get("nn_module_stack"):
                path, kind = list(node.meta["nn_module_stack"].values())[-1]
                name = kind.rpartition(".")[2] if isinstance(kind, str) else kind.__name__
                places = [
                    location
                    for location in _LOCATION.findall(node.meta.get("stack_trace") or "")
                    if _is_own(location[0])
                ]
                module = f"{path or 'the network itself'} (class {name})"
                return Place(module, places[-1][0], int(places[-1][1])) if places else Place(module)
    return None


def place_of_specialisation(model: nn.Module, replay: Callable[[], Any]) -> Place | None:
    """Export again and look at the stack at the moment when the symbol of the batch becomes a number."""
    places: list[Place] = []

    class Watch(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if str(record.msg).startswith("set_replacement"):
                stack = reversed(list(traceback.walk_stack(sys._getframe())))
                places.extend(place for place in [safely(_place_in_frames, model, stack)] if place)

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
    return places[0] if places else None
