"""How soon a death, a silence and a healing are noticed across hosts. The figures are in the output."""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from baton.chaos import network
from baton.chaos.hosts import HostPlan, HostsHandle, start_hosts
from baton.client import Client
from baton.cluster import ClusterSpec
from baton.handle import wait_until
from baton.v1 import cluster_pb2
from tests.support.hosts import settle

_WHY_NOT = network.why_not()
pytestmark = [pytest.mark.processes, pytest.mark.skipif(bool(_WHY_NOT), reason=_WHY_NOT or "-")]

ROUNDS = 5
DECODE = "decode-0@b1"
# The decode has a network of its own, so that looking at the store does not wait for it.
PLAN = (
    HostPlan("s", ("scheduler",)),
    HostPlan("b", ("kv-store", "prefill")),
    HostPlan("b1", ("decode",), decode=1, arena_of="b"),
)


@pytest.fixture(scope="module")
def cluster() -> Iterator[HostsHandle]:
    with tempfile.TemporaryDirectory(prefix="bt-", dir="/tmp") as root:
        running = start_hosts(ClusterSpec(run_dir=root), PLAN)
        try:
            settle(running)
            yield running
        finally:
            assert running.stop() == 0


class Clock:
    """Milliseconds from one event to another, several times."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self.ms: dict[str, list[float]] = {}

    def until(self, what: str, since: float, condition: Callable[[], bool]) -> None:
        wait_until(condition, 20, what)
        self.ms.setdefault(what, []).append(1e3 * (time.monotonic() - since))

    def median(self, what: str) -> float:
        return statistics.median(self.ms[what])

    def state(self) -> int | None:
        """Of the decode; None while it is not attached."""
        states = [w.state for w in self._client.view().workers if w.name == DECODE]
        return states[0] if states else None


def one_round(cluster: HostsHandle, clock: Clock) -> None:
    alive = Path(cluster.hosts["b1"].spec.run_dir) / f"baton-{DECODE}.alive"
    ready = cluster_pb2.WORKER_STATE_READY
    cluster.network.partition("s", "b1")
    cut = time.monotonic()
    clock.until("scheduler hears silence", cut, lambda: clock.state() != ready)
    clock.until("worker hears silence", cut, lambda: not alive.exists())
    cluster.network.heal()
    healed = time.monotonic()
    clock.until("attached after healing", healed, lambda: alive.exists() and clock.state() == ready)
    pid = cluster.kill(DECODE)
    killed = time.monotonic()
    clock.until("scheduler hears death", killed, lambda: clock.state() is None)
    cluster.wait_restarted(DECODE, pid)
    settle(cluster)


def test_death_silence_and_healing_are_noticed_in_time(
    cluster: HostsHandle, record_property: Callable[[str, object], None]
) -> None:
    """Death within 300 ms, silence within 1 s on both sides, attached again about 1 s after healing:
    medians, and on a machine that has other work only in order of magnitude."""
    with Client(cluster.address) as client:
        clock = Clock(client)
        for _ in range(ROUNDS):
            one_round(cluster, clock)
    medians = {what: round(clock.median(what)) for what in clock.ms}
    record_property("noticed_ms", medians)
    print(json.dumps({"noticed_ms": medians, "load_1min": os.getloadavg()[0]}))
    idle = os.getloadavg()[0] <= 2 * len(os.sched_getaffinity(0))
    slack = 1.0 if idle else 10.0
    assert medians["scheduler hears death"] <= 300 * slack
    assert medians["scheduler hears silence"] <= 1000 * slack
    assert medians["worker hears silence"] <= 1000 * slack
    assert medians["attached after healing"] <= 1500 * slack
