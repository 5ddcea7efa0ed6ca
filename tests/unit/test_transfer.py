"""Prefill's sending thread: it takes words from any thread, sends on its own, on its own core, and says
when nobody needs the pages any more."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from baton.handle import wait_until
from baton.v1 import control_pb2
from services.ops import lifecycle
from services.ops.errors import BatonError, ConfigError, StaleEpoch, Unavailable
from services.prefill.config import PrefillConfig
from services.prefill.engine_loop import PrefillEngine
from services.prefill.handoff import Destination, LocalHandoff, RemoteHandoff, push_of
from services.prefill.transfer import Transfers
from services.wire.client import Client
from services.wire.memory_medium import MemoryMedium
from services.wire.push import Push, Target
from services.wire.session import SILENCE_S, hello_of
from services.wire.stream import Hello
from services.wire.zmq_medium import ZmqMedium
from tests.support import arenas
from tests.support.media import ATTEMPT, Link, Setting, link

HELLO = Hello(fingerprint=b"f" * 16, layout="any")


@dataclass
class Sending:
    """A transfer thread between the two arenas of a link, whose stores are pumped by another."""

    world: Link
    transfers: Transfers
    ended: list[BatonError | None] = field(default_factory=list)

    def handoff(self) -> RemoteHandoff:
        world = self.world
        local = LocalHandoff(world.record, ATTEMPT, b"f" * 16, world.media[0].notify)
        to = Destination(world.address, world.remote.slot, ATTEMPT)
        return RemoteHandoff(local, push_of(world.record, ATTEMPT, to), to, self.transfers)

    def pump_until(self, condition: Callable[[], bool]) -> None:
        def turn() -> bool:
            for store in self.world.stores:
                store.turn()
            return condition()

        wait_until(turn, 10, "the transfer")


@pytest.fixture
def sending(tmp_path: Path) -> Iterator[Sending]:
    with link(tmp_path, Setting("tcp")) as world:
        core = sorted(os.sched_getaffinity(0))[-1]
        transfers = Transfers(ZmqMedium(core), hello_of(world.source.plan), core)
        transfers.start()
        yield Sending(world, transfers)
        transfers.close()
        assert not transfers._thread.is_alive()


def test_a_prompt_is_sent_while_nobody_waits(sending: Sending) -> None:
    """`ready`, `first` and `end` return at once; the end is told from the sending thread."""
    world, ended = sending.world, sending.ended
    handoff = sending.handoff()
    threads: list[int] = []

    def over(error: BatonError | None) -> None:
        threads.append(threading.get_native_id())
        ended.append(error)

    world.compute(0, 300)
    for group in world.groups:
        handoff.ready(group, 300)
    handoff.first(7, -0.5)
    handoff.end(over)
    assert not ended  # no store has had a turn
    sending.pump_until(lambda: bool(ended))
    assert ended == [None]
    world.assert_delivered()
    assert threads != [threading.get_native_id()]


def test_a_cancelled_transfer_ends_though_the_store_is_silent(sending: Sending) -> None:
    """From any thread, after `end` too; it is no error."""
    handoff = sending.handoff()
    sending.world.compute(0, 300)
    handoff.ready(0, 300)
    handoff.end(sending.ended.append)
    handoff.cancel()
    wait_until(lambda: bool(sending.ended), SILENCE_S / 2, "the end")
    assert sending.ended == [None]


def test_a_failure_is_raised_where_pages_are_computed(sending: Sending) -> None:
    """The engine learns of a fence at its next layer group, and has not to wait for the end."""
    handoff = sending.handoff()
    sending.world.compute(0, 300)
    sending.world.remote.fence_prefill(ATTEMPT + 1, 0)
    handoff.ready(0, 128)

    def fenced() -> bool:
        try:
            handoff.ready(0, 128)
        except StaleEpoch:
            return True
        return False

    sending.pump_until(fenced)
    handoff.end(sending.ended.append, cancel=True)
    sending.pump_until(lambda: bool(sending.ended))
    assert isinstance(sending.ended[0], StaleEpoch)


def test_an_address_that_is_none_is_a_failure_with_words(sending: Sending) -> None:
    """And not the end of the thread."""
    world = sending.world
    sending.world.address = "nowhere"
    handoff = sending.handoff()
    handoff.end(sending.ended.append)
    wait_until(lambda: bool(sending.ended), 5, "the end")
    assert isinstance(sending.ended[0], Unavailable)
    assert "nowhere" in sending.ended[0].message
    assert world.client is not None


def cores_of_new_threads(before: set[int]) -> list[set[int]]:
    """Core sets of the threads that have come since, as the kernel has them."""
    tasks = {int(task.name) for task in Path("/proc/self/task").iterdir()}
    return [os.sched_getaffinity(task) for task in sorted(tasks - before)]


@pytest.mark.parametrize("pinned", [True, False])
def test_io_threads_keep_off_the_cores_that_compute(pinned: bool) -> None:
    """ZeroMQ's own threads and the sending thread run on `io_core` and nowhere else, though the
    process is pinned to others; without one they are where the process is."""
    allowed = os.sched_getaffinity(0)
    if len(allowed) < 2:
        pytest.skip("needs two cores")
    compute, io_core = min(allowed), max(allowed)
    before = {int(task.name) for task in Path("/proc/self/task").iterdir()}
    os.sched_setaffinity(0, {compute})
    try:
        core = io_core if pinned else -1
        transfers = Transfers(ZmqMedium(core), HELLO, core)
        transfers.start()
        medium = ZmqMedium(core)
        listener = medium.listen("tcp://127.0.0.1:*")  # its threads start with the first socket
        wanted = {io_core if pinned else compute}

        def settled() -> bool:
            cores = cores_of_new_threads(before)
            return len(cores) >= 3 and all(one == wanted for one in cores)

        wait_until(settled, 5, "the threads")
        assert os.sched_getaffinity(0) == {compute}
        listener.close()
        medium.close()
        transfers.close()
    finally:
        os.sched_setaffinity(0, allowed)


def test_a_core_that_cannot_be_had_stops_the_process() -> None:
    """By the name of the option; the process stays where it was."""
    allowed = os.sched_getaffinity(0)
    with pytest.raises(ConfigError, match=r"^io_core: "):
        lifecycle.require_core(1000, "io_core")
    lifecycle.require_core(max(allowed), "io_core")
    lifecycle.require_core(-1, "io_core")
    assert os.sched_getaffinity(0) == allowed


def test_a_process_without_a_core_is_no_silent_peer() -> None:
    """Silence is counted while this end listens: time in which it did not run is nobody's fault."""
    memory = MemoryMedium()
    target = Target(slot=0, attempt=1, groups=1, page_bytes=64, prompt_tokens=64)
    push = Push(target, lambda *_: [np.zeros(1).tobytes()])
    now = 0.0
    client = Client(memory, HELLO, clock=lambda: now)
    memory.listen("store")
    client.begin("store", push)
    client.poll()
    now = 60.0  # stopped for a minute
    client.poll()
    assert push.error is None
    for _ in range(int(SILENCE_S / 0.05) + 2):
        now += 0.05
        client.poll()
    assert isinstance(push.error, Unavailable)


def test_a_hand_off_without_an_address_is_refused(tmp_path: Path) -> None:
    """A scheduler that has just restarted may not know decode's store yet: announced in prefill's own
    arena alone, the pages would never be seen there."""
    arena = arenas.small_arena(tmp_path)
    arenas.open_record(arena, attempt=ATTEMPT)
    events: list[control_pb2.WorkerEvent] = []
    backend: Any = None  # nothing is computed
    engine = PrefillEngine(PrefillConfig(), arena, backend, events.append)
    engine.start()
    command = control_pb2.ExecutePrefill(
        request_id="r", attempt=ATTEMPT, remote_slot=1, remote_attempt=ATTEMPT
    )
    engine.submit(command)
    wait_until(lambda: len(events) == 2, 5, "the refusal")
    engine.close()
    assert events[0].refused.code == "UNAVAILABLE"
    assert "ingest_address" in events[0].refused.message
    assert events[1].stopped.epoch == ATTEMPT
    assert not engine.jobs
