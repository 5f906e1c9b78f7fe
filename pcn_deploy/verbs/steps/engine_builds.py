"""The engines of a build: those that keep to one core are made beside the work that goes on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from threading import Event

from pcn_deploy.artefact.bundle import Bundle
from pcn_deploy.engines.base import Backend, EngineArtifact, GraphSource
from pcn_deploy.memory import return_freed
from pcn_deploy.progress import Progress


class EngineBuilds:
    """Builds of engines from one graph; `engine_builds` makes it.

    A backend that is `built_aside` starts at once, in a thread that all such share; the others are built in the
    caller's thread when they are asked for, so that nothing disturbs the timing of their kernels.
    """

    def __init__(
        self,
        bundle: Bundle,
        backends: Sequence[Backend],
        graphs: GraphSource,
        progress: Progress,
        thread: ThreadPoolExecutor,
    ) -> None:
        self._bundle, self._backends, self._graphs, self._progress = bundle, backends, graphs, progress
        self._stopped = Event()
        self._aside: dict[str, Future[EngineArtifact]] = {
            backend.target: thread.submit(backend.build, graphs, self._told)
            for backend in backends
            if backend.built_aside
        }

    def add(self, backend: Backend) -> None:
        """Put an engine into the bundle, once it is built; one that is there is left.

        Args:
            backend: Builds it.

        Raises:
            BuildError: If the backend refuses the graph.
        """
        if any(entry.target == backend.target for entry in self._bundle.engines):
            return
        aside = self._aside.pop(backend.target, None)
        artifact = aside.result() if aside else backend.build(self._graphs, self._progress)
        self._bundle.add_engine(backend.target, backend.member, artifact.data, artifact.built_with)
        del aside, artifact
        return_freed()

    def add_built_aside(self) -> None:
        """Wait for the engines that are built beside other work, and put them into the bundle.

        Raises:
            BuildError: If a backend refuses the graph.
        """
        for backend in self._backends:
            if backend.target in self._aside:
                self.add(backend)

    def add_all(self) -> None:
        """Put every engine into the bundle, and list them in the order of the backends.

        Raises:
            BuildError: If a backend refuses the graph.
        """
        for backend in self._backends:
            self.add(backend)
        order = [backend.target for backend in self._backends]
        self._bundle.engines.sort(key=lambda entry: order.index(entry.target))

    def stop(self) -> None:
        """Let the builds that go on end at their next step."""
        self._stopped.set()

    def _told(self, step: str, done: int, total: int, unit: str = "", /) -> None:
        """Pass progress on; where the build is over, stop the backend that reports it."""
        if self._stopped.is_set():
            raise _StoppedError
        self._progress(step, done, total, unit)


class _StoppedError(Exception):
    """Ends a build whose engine nobody waits for any more."""


@contextmanager
def engine_builds(
    bundle: Bundle, backends: Sequence[Backend], graphs: GraphSource, progress: Progress
) -> Iterator[EngineBuilds]:
    """Start the builds that go on beside other work; when the block is left, none goes on.

    PyTorch leaves a core to them: its threads wait for each other in loops, and together they would be slower than one.

    Args:
        bundle: Gets the engines.
        backends: What to build, in the order in which the bundle lists the engines.
        graphs: What they are built from.
        progress: Told how far each build is, from either thread.

    Yields:
        What adds the engines to the bundle.
    """
    import torch

    threads = torch.get_num_threads()
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="engines") as thread:
        builds = EngineBuilds(bundle, backends, graphs, progress, thread)
        try:
            if any(backend.built_aside for backend in backends):
                torch.set_num_threads(max(1, threads - 1))
            yield builds
        finally:
            torch.set_num_threads(threads)
            builds.stop()
