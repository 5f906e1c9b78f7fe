"""ONNX Runtime as other people run `model.onnx`: default options, all of its rewrites.

Such a session may end its process (some graphs with FP16 attention do), so it has a process of its own, which is
given the graph and the inputs, and gives back outputs.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from typing import IO, Any, NoReturn

import numpy as np

from pcn_deploy.engines.base import CLOSED, Array, Session
from pcn_deploy.engines.onnxruntime import release_graph
from pcn_deploy.errors import PcnDeployError, StockSessionError
from pcn_deploy.memory import temporary_path
from pcn_deploy.specs import EngineSpec

STOCK = "stock"
"""What reports call this execution; like `cpu`, it computes FP32 in FP32."""

LIMIT = 600
"""Seconds after which an answer is no longer waited for."""

_START = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from pcn_deploy.engines.stock import serve; serve()"
"""Modules are looked for where this process looks, not in the current folder."""

_ANSWER, _ERROR = b"A", b"E"


def open_stock(read: Callable[[], bytes], spec: EngineSpec) -> Session:
    """Open a graph in a default session of ONNX Runtime, in a process of its own.

    Args:
        read: Gives the serialised ONNX graph; what it gives is written to a file and not kept.
        spec: Its interface.

    Raises:
        StockSessionError: If the session refuses the graph, or crashes on it.
    """
    return _StockSession(read, spec)


class _StockSession(Session):
    def __init__(self, read: Callable[[], bytes], spec: EngineSpec) -> None:
        super().__init__(spec)
        self._late = False
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as the process
        self._process: subprocess.Popen[bytes] | None = subprocess.Popen(
            [sys.executable, "-c", _START, json.dumps(sys.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
        )
        try:
            with temporary_path("model.onnx") as graph:
                graph.write_bytes(read())
                self._ask(str(graph).encode(), "opening it")
        except StockSessionError:
            self.close()
            raise

    def _run_impl(self, inputs: dict[str, Array], out: dict[str, Array]) -> dict[str, Array]:
        outputs = _unpack(self._ask(_pack(inputs), "running it"))
        return {tensor.name: outputs[tensor.name] for tensor in self.spec.outputs}

    def _ask(self, request: bytes, doing: str) -> bytes:
        process = self._process
        if process is None or process.stdin is None or process.stdout is None:
            raise PcnDeployError(CLOSED)
        timer = threading.Timer(LIMIT, self._give_up)
        timer.start()
        try:
            _send(process.stdin, _ANSWER, request)
            kind, answer = _receive(process.stdout)
        except (EOFError, OSError):  # the process has ended
            self._crashed(process.wait(), doing)
        finally:
            timer.cancel()
        if kind == _ERROR:
            msg = f"A stock ONNX Runtime session refuses this graph when {doing}: {answer.decode(errors='replace')}"
            raise StockSessionError(msg)
        return answer

    def _give_up(self) -> None:
        self._late = True
        if self._process is not None:
            self._process.kill()

    def _crashed(self, code: int, doing: str) -> NoReturn:
        self._log.seek(0)
        last = self._log.read().decode(errors="replace").strip().splitlines()[-1:]
        how = f"signal {-code}" if code < 0 else f"status {code}"
        how = f"no answer in {LIMIT} s" if self._late else how
        msg = f"A stock ONNX Runtime session crashes on this graph ({how} when {doing}){': '.join(['', *last])}"
        raise StockSessionError(msg)

    def close(self) -> None:
        """End the process. May be called more than once."""
        if self._process is not None:
            process, self._process = self._process, None
            process.kill()
            process.communicate()
            self._log.close()


def serve() -> None:
    """The other side: open the graph whose file standard input names, and answer with outputs until it ends."""
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not be taken for an answer
    session = None
    while True:
        try:
            _, request = _receive(requests)
        except EOFError:
            return
        try:
            if session is None:
                session, answer = _default_session(request.decode()), b""
            else:
                answer = _pack(_run(session, _unpack(request)))
            _send(answers, _ANSWER, answer)
        except Exception as error:  # ONNX Runtime's exceptions share no public base
            _send(answers, _ERROR, str(error).encode())


def _default_session(graph: str) -> Any:
    import onnxruntime

    onnxruntime.set_default_logger_severity(3)  # errors only; changes no computation
    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    release_graph(session)
    return session


def _run(session: Any, inputs: dict[str, Array]) -> dict[str, Array]:
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, inputs), strict=True))


def _pack(arrays: dict[str, Array]) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type] # numpy's stub takes allow_pickle for one of the arrays
    return buffer.getvalue()


def _unpack(data: bytes) -> dict[str, Array]:
    with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
        return dict(arrays)


def _send(stream: IO[bytes], kind: bytes, data: bytes) -> None:
    stream.write(kind + len(data).to_bytes(8, "little"))
    stream.write(data)
    stream.flush()


def _receive(stream: IO[bytes]) -> tuple[bytes, bytes]:
    head = _exactly(stream, 9)
    return head[:1], _exactly(stream, int.from_bytes(head[1:], "little"))


def _exactly(stream: IO[bytes], size: int) -> bytes:
    data = stream.read(size)
    if len(data) < size:
        raise EOFError
    return data
