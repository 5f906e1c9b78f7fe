"""What TensorRT says while it works, and how Ctrl-C waits until TensorRT can bear it."""

from __future__ import annotations

import signal
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

_KEPT = 500
_SHOWN = 4


class Messages:
    """The most recent messages, as pairs of severity and text. Verbose ones are not kept."""

    def __init__(self) -> None:
        self._kept: deque[tuple[str, str]] = deque(maxlen=_KEPT)

    def add(self, severity: str, text: str) -> None:
        """Keep one message. TensorRT may call from several threads; a deque takes that."""
        if severity != "VERBOSE":
            self._kept.append((severity, text.strip()))

    def clear(self) -> None:
        """Forget everything, before a new piece of work."""
        self._kept.clear()

    def of(self, *severities: str) -> list[str]:
        """Texts of these severities, oldest first, each once."""
        return list(dict.fromkeys(text for severity, text in self._kept if severity in severities))

    def summary(self, first: list[str] | None = None) -> str:
        """The first few errors on one line each.

        Args:
            first: Messages that come before those of the log, such as the parser's.
        """
        texts = list(dict.fromkeys([*(first or []), *self.of("INTERNAL_ERROR", "ERROR")]))
        texts = texts or self.of("WARNING", "INFO")[-_SHOWN:]
        lines = "".join(f"\n  {text}" for text in texts[:_SHOWN])
        return lines or " it gave no reason (its messages may go to a logger that other code has registered)"


@cache
def log_of(trt: Any) -> tuple[Any, Messages]:
    """The one logger of a flavour, and what it has collected.

    TensorRT knows one logger per process: while any builder or runtime lives, a second logger is ignored. So
    all work shares one, and clears it first.

    Args:
        trt: The loaded bindings.
    """
    messages = Messages()

    class Log(trt.ILogger):  # type: ignore[misc]  # the base is loaded at run time
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, text: str) -> None:
            messages.add(severity.name, text)

    return Log(), messages


@contextmanager
def interrupt_deferred() -> Iterator[threading.Event]:
    """Hold back Ctrl-C, and raise `KeyboardInterrupt` when the block is left.

    TensorRT calls our logger and monitor from C++. An exception that a signal handler raises there would
    unwind through its frames, which is undefined; so the handler only sets a flag that the monitor reads.

    Yields:
        The flag, set once Ctrl-C was pressed. Only ever set in the main thread: others get no signals.

    Raises:
        KeyboardInterrupt: When the block is left, if Ctrl-C was pressed in it.
    """
    pressed = threading.Event()
    previous = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(previous):
        yield pressed  # a handler of C code, or none: Python raises nothing either
        return
    signal.signal(signal.SIGINT, lambda *_: pressed.set())
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, previous)
        if pressed.is_set():
            raise KeyboardInterrupt
