"""The engines of a build, beside other work. The backends are fakes: what is tested is when they build."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from helpers import small_bundle

from pcn_deploy.engines.base import Availability, Backend, EngineArtifact, GraphSource, OpenOptions, Session
from pcn_deploy.errors import BuildError
from pcn_deploy.progress import Progress, silent
from pcn_deploy.specs import BatchRange, EngineSpec
from pcn_deploy.verbs.steps.engine_builds import engine_builds

GRAPHS = GraphSource(
    onnx=b"graph", torchscript=b"", spec=EngineSpec(inputs=(), outputs=(), batch=BatchRange(min=1, opt=1, max=1))
)


class _Fake(Backend):
    extra = ""

    def __init__(self, name: str, *, aside: bool, error: str = "") -> None:
        self.target = self.member = name  # type: ignore[misc]
        self.built_aside = aside  # type: ignore[misc]
        self.started, self.go_on, self.thread, self.error = threading.Event(), threading.Event(), "", error

    def availability(self) -> Availability:
        return Availability(can_build=True, can_run=True, detail="")

    def _build_impl(self, source: GraphSource, progress: Progress) -> EngineArtifact:
        self.thread = threading.current_thread().name
        self.started.set()
        assert self.go_on.wait(60)
        progress("Fake build", 1, 2)
        if self.error:
            raise BuildError(self.error)
        return EngineArtifact(data=memoryview(source.read_onnx() + self.target.encode()))

    def _open_impl(self, data: bytes, spec: EngineSpec, options: OpenOptions) -> Session:
        raise NotImplementedError


def test_an_engine_is_built_beside_the_work_that_goes_on() -> None:
    aside, own = _Fake("aside", aside=True), _Fake("own", aside=False)
    own.go_on.set()
    bundle = small_bundle()
    with engine_builds(bundle, [aside, own], GRAPHS, silent) as builds:
        assert aside.started.wait(60)
        assert not own.started.is_set()
        builds.add(own)
        assert [entry.target for entry in bundle.engines] == ["own"]
        aside.go_on.set()
        builds.add_all()
    assert [entry.target for entry in bundle.engines] == ["aside", "own"]
    assert bundle.read("aside") == b"graphaside"
    assert own.thread == threading.current_thread().name != aside.thread


def test_a_refusal_is_raised_where_the_engine_is_asked_for() -> None:
    refused = _Fake("refused", aside=True, error="no such operator")
    refused.go_on.set()
    with engine_builds(small_bundle(), [refused], GRAPHS, silent) as builds:
        assert refused.started.wait(60)
        with pytest.raises(BuildError, match="no such operator"):
            builds.add_all()


class _Endless(_Fake):
    """Builds until it is stopped, for a minute at most."""

    def _build_impl(self, source: GraphSource, progress: Progress) -> EngineArtifact:
        self.started.set()
        for step in range(6000):
            progress("Fake build", step, 6000)
            self.go_on.wait(0.01)
        return EngineArtifact(data=b"")


def test_an_error_in_the_other_work_stops_the_build() -> None:
    endless, told = _Endless("aside", aside=True), list[tuple[Any, ...]]()
    with (
        pytest.raises(ZeroDivisionError),
        engine_builds(small_bundle(), [endless], GRAPHS, lambda *state: told.append(state)),
    ):
        assert endless.started.wait(60)
        raise ZeroDivisionError
    assert len(told) < 6000


def test_torch_leaves_a_core_to_it_and_gets_it_back() -> None:
    before, aside = torch.get_num_threads(), _Fake("aside", aside=True)
    aside.go_on.set()
    try:
        torch.set_num_threads(3)
        with engine_builds(small_bundle(), [aside], GRAPHS, silent):
            assert torch.get_num_threads() == 2
        assert torch.get_num_threads() == 3
        with engine_builds(small_bundle(), [_Fake("own", aside=False)], GRAPHS, silent):
            assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
