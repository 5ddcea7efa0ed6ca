"""Real clusters of real processes, one per configuration and test run."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from baton.cluster import ClusterSpec
from baton.handle import SupervisorHandle
from services.engine.reference import Reference

StartCluster = Callable[..., SupervisorHandle]


@pytest.fixture(scope="session")
def start_cluster() -> Iterator[StartCluster]:
    """Gives a running cluster for a configuration; equal configurations share one."""
    running: dict[tuple[tuple[str, object], ...], SupervisorHandle] = {}
    with tempfile.TemporaryDirectory(prefix="bt-", dir="/tmp") as root:

        def start(**settings: object) -> SupervisorHandle:
            key = tuple(sorted(settings.items()))
            if key not in running:
                run_dir = Path(root) / str(len(running))
                spec = ClusterSpec(run_dir=str(run_dir), listen="127.0.0.1:0", **settings)  # type: ignore[arg-type]
                running[key] = SupervisorHandle.start(spec)
            return running[key]

        try:
            yield start
        finally:
            for cluster in running.values():
                assert cluster.stop() == 0


@pytest.fixture(params=["shm", "zmq"])
def cluster(request: pytest.FixtureRequest, start_cluster: StartCluster) -> SupervisorHandle:
    """A cluster with two decodes, over each medium in turn."""
    return start_cluster(medium=request.param, decode=2)


@pytest.fixture(scope="session")
def reference() -> Reference:
    """The one-process reference of the model that ships."""
    return Reference("models/pico")
