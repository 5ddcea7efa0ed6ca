"""The hand-over of a stream's KV, the same over every medium: same arena, memory, ZeroMQ over tcp and
ipc, and each of them with faults; pushed, and fetched."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from random import Random

import numpy as np
import pytest

from services.kv.runs import read_pages
from services.wire.faulty_medium import Faults
from services.wire.memory_medium import MemoryMedium
from services.wire.session import Buffer, Tracker
from services.wire.stream import Ack, Announce, Message, Refused, Welcome, pack, unpack
from tests.support.media import Setting
from tests.support.streams import BuildLink, at_rest, each, each_remote, each_steady, in_memory

# --- delivery ---


@each
@pytest.mark.parametrize("layers_per_group", [1, 2, 3])
@pytest.mark.parametrize("prompt", [1, 64, 130, 300])
def test_everything_arrives(
    build: BuildLink, setting: Setting, layers_per_group: int, prompt: int
) -> None:
    """Every row of every group, whatever the groups and wherever the prompt ends."""
    world = build(setting, layers_per_group=layers_per_group, prompt=prompt)
    assert world.deliver(world.handoff()) is None
    world.assert_delivered()


@each
def test_only_verified_rows_are_ever_announced(build: BuildLink, setting: Setting) -> None:
    """At every moment: what a group's word says is there verifies, and no word moves back; the first
    token comes last."""
    world = build(setting)
    before = [0] * len(world.groups)
    turn = world.pump

    def watched() -> None:
        turn()
        world.assert_verified()
        now = [world.remote.ready(group)[1] for group in world.groups]
        assert all(a <= b for a, b in zip(before, now, strict=True))
        assert not world.remote.first()[1] or min(now) == len(world.tokens)
        before[:] = now

    world.pump = watched  # type: ignore[method-assign]
    assert world.deliver(world.handoff()) is None
    world.assert_delivered()


@each
def test_what_is_complete_twice_is_sent_once(build: BuildLink, setting: Setting) -> None:
    """Telling the same again changes nothing."""
    world = build(setting)
    handoff = world.handoff()
    world.compute(0, 300)
    for group in [*world.groups, *world.groups]:
        handoff.ready(group, 300)
    handoff.first(7, -0.5)
    assert world.finish(handoff) is None
    world.assert_delivered()
    if world.push is not None and "faulty" not in setting.medium:
        assert world.push.sent_again == 0


@each_steady
def test_neighbours_travel_as_one_run(build: BuildLink, setting: Setting) -> None:
    """A group's blocks go in as few messages as their frames allow."""
    world = build(setting)
    handoff = world.handoff()
    world.compute(0, 300)
    for group in world.groups:
        handoff.ready(group, 300)
    handoff.first(7, -0.5)
    assert world.finish(handoff) is None
    assert world.push is not None
    assert world.push.messages_sent == len(world.groups)
    frames = read_pages(world.source, 0, np.array(world.record.prefill_table[:5]))
    page = world.source.layout.page_bytes
    assert [len(frame) for frame in frames] == [5 * 256, 4 * page, page]  # blocks 1 2 3 4, 0


@each_remote
def test_the_decode_is_woken_at_its_present_address(build: BuildLink, setting: Setting) -> None:
    """Once a group is complete there, at the latest address that prefill was told."""
    world = build(setting)
    woken: list[tuple[str, Announce]] = []

    def notify(address: str, data: bytes) -> None:
        announce = unpack(data)
        assert isinstance(announce, Announce)
        assert world.remote.ready(announce.group)[1] >= announce.tokens
        woken.append((address, announce))

    receiver = world.stores[-1].receiver
    receiver._notify = notify
    handoff = world.handoff()
    handoff.announce = "tcp://old:1"
    world.compute(0, 300)
    handoff.ready(0, 128)
    world.until(lambda: bool(woken), "a wake")
    handoff.announce = "tcp://new:1"
    assert world.deliver(handoff) is None
    assert woken[0][0] == "tcp://old:1"
    assert woken[-1][0] == "tcp://new:1"
    assert woken[-1][1].slot == world.remote.slot


# --- flow control ---


@in_memory
@pytest.mark.parametrize("pages", [2, 3])
def test_no_more_is_on_its_way_than_was_granted(
    build: BuildLink, setting: Setting, pages: int
) -> None:
    """The bytes that wait at a store stay below its window, and computing is not held up for it."""
    window = pages * 64 * 1024
    world = build(setting, inflight_bytes_max=window)
    memory = world.media[0]
    assert isinstance(memory, MemoryMedium)
    handoff = world.handoff()
    world.compute(0, 300)
    for group in world.groups:
        handoff.ready(group, 300)  # nobody has had a turn: it returns all the same
    handoff.first(7, -0.5)
    most = 0

    def waiting() -> bool:
        nonlocal most
        world.client.poll()  # type: ignore[union-attr]
        for listener in memory.listeners.values():
            size = sum(len(f) for _, message in listener.inbox for f in message.frames[1:])
            most = max(most, size)
        return world.push.done  # type: ignore[union-attr]

    page = world.source.layout.page_bytes + 256
    window = pages * page
    world.until(waiting, "the hand-off")
    world.assert_delivered()
    assert most <= 64 * 1024 * pages


@each_steady
def test_windows_are_bounded_together(build: BuildLink, setting: Setting) -> None:
    """A store grants no more than it has to all its peers; who gets none is told so, in words."""
    world = build(setting)
    page = world.source.layout.page_bytes + 256
    receiver = world.stores[-1].receiver
    receiver._inflight_bytes_max = 5 * page
    answers: list[Message] = []
    receiver._reply = lambda peer, frames: answers.append(unpack(bytes(frames[0])))
    for n in range(4):
        hello = pack(replace(receiver.hello, client=b"%016d" % n, session=1))
        receiver.handle(b"peer-%d" % n, [memoryview(hello)])
    granted = [a.window_bytes for a in answers if isinstance(a, Welcome)]
    assert sum(granted) <= 5 * page
    assert granted
    refused = [answer for answer in answers if isinstance(answer, Refused)]
    assert all("ingest_bytes_inflight_max" in answer.words for answer in refused)
    assert len(granted) + len(refused) == 4
    world.clock.now += 2.0 if world.clock.virtual else 0.0
    if world.clock.virtual:  # peers that say nothing make room
        hello = pack(replace(receiver.hello, client=b"another client..", session=1))
        receiver.handle(b"peer-9", [memoryview(hello)])
        assert isinstance(answers[-1], Welcome)


@in_memory
def test_what_comes_together_is_acknowledged_together(build: BuildLink, setting: Setting) -> None:
    """Several requests of one turn, each exactly once, and nothing that has not come."""
    world = build(setting)
    receiver = world.stores[-1].receiver
    reply, acks, asked = receiver._reply, [], []
    take = receiver._take

    def watched(peer: bytes, message: Message, frames: Sequence[memoryview]) -> None:
        asked.append(message.sequence)
        take(peer, message, frames)

    def heard(peer: bytes, frames: Sequence[Buffer]) -> Tracker | None:
        message = unpack(bytes(frames[0]))
        if isinstance(message, Ack):
            acks.append(list(message.sequences()))
        return reply(peer, frames)

    receiver._reply, receiver._take = heard, watched  # type: ignore[method-assign]
    handoff = world.handoff()
    world.compute(0, 300)
    for group in world.groups:
        handoff.ready(group, 300)
    handoff.first(7, -0.5)
    assert world.finish(handoff) is None
    world.assert_delivered()
    named = [sequence for ack in acks for sequence in ack]
    assert len(named) == len(set(named)) == len(world.groups) + 1
    assert set(named) <= set(asked)
    assert len(acks) < len(named)


# --- everything at once ---


@pytest.mark.parametrize("seed", range(60))
def test_any_faults_any_shape(build: BuildLink, seed: int) -> None:
    """Dropped, repeated, delayed, reordered, damaged and cut: whatever the shape of the stream and the
    size of the window, it arrives whole."""
    rng = Random(seed)
    setting = Setting(
        "faulty", rng.choice(["push", "pull"]), layers_per_group=rng.randint(1, 3),
        prompt=rng.randint(1, 500), inflight_bytes_max=rng.choice([1 << 16, 1 << 20]), seed=seed,
        faults=Faults(*(rng.uniform(0, 0.12) for _ in range(4)), cut=rng.uniform(0, 0.02)),
    )  # fmt: skip
    world = build(setting)
    assert world.deliver(world.handoff(), chunk=rng.choice([64, 128, 192])) is None
    world.assert_delivered()
    world.until(lambda: at_rest(world), "rest")
