"""The examples of nodes, as a user starts them: a service with threads, and a camera loop."""

from __future__ import annotations

import http.client
import io
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pytest
from PIL import Image

import pcn_deploy

pytest.importorskip("onnxruntime")

ROOT = Path(__file__).parents[1]
NODES = ROOT / "examples" / "nodes"
BUNDLE = Path(__file__).parent / "fixtures" / "schema1_fp32_map.pcn"


def pictures(count: int) -> list[Any]:
    random = np.random.default_rng(1)
    return [random.integers(0, 256, (30 + index, 40, 3), dtype=np.uint8) for index in range(count)]


def encoded(picture: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "png")
    return file.getvalue()


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    command = [sys.executable, str(NODES / "service.py"), str(BUNDLE), "--port", "0", "--top", "2"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        line = child.stdout.readline()
        found = re.search(r"cpu answers at http://127\.0\.0\.1:(\d+)/classify", line)
        assert found, line
        yield int(found[1])
        child.terminate()


def ask(port: int, method: str, path: str, body: bytes | None = None) -> tuple[int, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request(method, path, body)
    reply = connection.getresponse()
    return reply.status, json.loads(reply.read())


def test_a_service_answers_many_at_once(port: int) -> None:
    asked = pictures(12)
    with pcn_deploy.load(BUNDLE) as engine:
        expected = [engine.classify(picture, k=2)[0] for picture in asked]
    with ThreadPoolExecutor(6) as threads:
        replies = list(threads.map(lambda picture: ask(port, "POST", "/classify", encoded(picture)), asked))
    for (status, reply), classes in zip(replies, expected, strict=True):
        assert status == 200
        assert [(one["index"], one["name"]) for one in reply["classes"]] == [(one.index, one.name) for one in classes]
        assert [one["probability"] for one in reply["classes"]] == pytest.approx([one.probability for one in classes])
    assert ask(port, "GET", "/health") == (200, {"target": "cpu", "executed_by": "cpu"})


def test_a_service_survives_bad_requests(port: int) -> None:
    status, reply = ask(port, "POST", "/classify", b"no image")
    assert (status, "cannot identify image" in reply["error"]) == (400, True)
    assert ask(port, "POST", "/classify", b"")[0] == 400
    assert ask(port, "POST", "/elsewhere", encoded(pictures(1)[0]))[0] == 400
    assert ask(port, "GET", "/")[0] == 404
    assert ask(port, "GET", "/health")[0] == 200


def test_a_camera_loop_prints_an_answer_per_frame(tmp_path: Path) -> None:
    for index, picture in enumerate(pictures(6)):
        Image.fromarray(picture).save(tmp_path / f"{index}.png")
    command = [sys.executable, str(NODES / "camera.py"), str(BUNDLE), "--images", str(tmp_path), "--rate", "20"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    *answers, summary = done.stdout.splitlines()
    with pcn_deploy.load(BUNDLE) as engine:
        known = [engine.classify(picture, k=1)[0][0].name for picture in pictures(6)]
    assert [re.match(r"(\d+)  \d+%  [\d.]+ ms$", line)[1] for line in answers][-1] == known[-1]  # type: ignore[index]
    assert summary == f"{len(answers)} of 6 frames were looked at."


def test_a_slow_network_sees_the_newest_frame() -> None:
    spec = spec_from_file_location("camera_example", NODES / "camera.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    first_is_taken, all_are_read = Event(), Event()

    def frames() -> Iterator[int]:
        yield 0
        first_is_taken.wait(30)
        yield from (1, 2, 3)
        all_are_read.set()

    newest = module.Newest(frames())
    seen = []
    for frame in newest:
        seen.append(frame)
        first_is_taken.set()
        all_are_read.wait(30)
    assert seen[0] == 0
    assert seen[-1] == 3
    assert newest.count == 4
