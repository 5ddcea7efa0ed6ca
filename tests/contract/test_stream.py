"""The hand-over of a stream's KV, the same over every medium: same arena, memory, ZeroMQ over tcp and
ipc, and each of them with faults; pushed, and fetched."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

import numpy as np
import pytest

from services.kv.runs import read_pages
from services.ops.errors import CorruptKv, LayoutMismatch, StaleEpoch, Unavailable
from services.wire import stream
from services.wire.faulty_medium import Faults
from services.wire.memory_medium import MemoryMedium
from services.wire.stream import Announce, Message, Refused, Welcome, pack, unpack
from tests.support import arenas
from tests.support.media import ATTEMPT, Link, Setting, link

REMOTE = ("memory", "tcp", "ipc", "faulty", "faulty-tcp")
MEDIA = [
    Setting("shm"),
    *(Setting(medium, way) for medium in REMOTE for way in ("push", "pull")),
]  # fmt: skip
BuildLink = Callable[..., Link]


@pytest.fixture
def build(tmp_path: Path) -> Iterator[BuildLink]:
    """Builds worlds that are closed in the end."""
    with ExitStack() as stack:

        def make(setting: Setting, **change: object) -> Link:
            changed = replace(setting, **change)  # type: ignore[arg-type]
            directory = tmp_path / str(len(list(tmp_path.iterdir())))
            directory.mkdir()
            return stack.enter_context(link(directory, changed))

        yield make


REMOTE_SETTINGS = [setting for setting in MEDIA if setting.medium != "shm"]
STEADY = [setting for setting in REMOTE_SETTINGS if "faulty" not in setting.medium]
each = pytest.mark.parametrize("setting", MEDIA, ids=str)
each_remote = pytest.mark.parametrize("setting", REMOTE_SETTINGS, ids=str)
each_steady = pytest.mark.parametrize("setting", STEADY, ids=str)
MEMORY = [Setting("memory", way) for way in ("push", "pull")]
in_memory = pytest.mark.parametrize("setting", MEMORY, ids=str)


def damaged(world: Link) -> int:
    return world.stores[-1].receiver.landing.damaged


def repeated(world: Link) -> int:
    return world.stores[-1].receiver.landing.repeated


def at_rest(world: Link) -> bool:
    """Nobody holds anything for a transfer any more."""
    assert world.client is not None
    stores = [store.client.idle and not store.receiver.pulls.open for store in world.stores]
    return world.client.idle and all(stores)


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


# --- resume ---


@each_steady
def test_a_cut_connection_resumes_where_it_was(build: BuildLink, setting: Setting) -> None:
    """After a cut only what had not been stored is sent again."""
    world = build(setting, prompt=500, inflight_bytes_max=1 << 16)
    handoff = world.handoff()
    world.compute(0, 500)
    for group in world.groups:
        handoff.ready(group, 256)
    world.until(lambda: world.remote.ready_tokens() == 256, "half of it")
    assert world.client is not None
    for one in world.client._links.values():
        one.connection.reset()
    assert world.deliver(handoff) is None
    world.assert_delivered()
    assert repeated(world) == 0


@each_steady
def test_a_store_that_comes_back_resumes(build: BuildLink, setting: Setting) -> None:
    """It reads from its arena how far each group is, and the rest follows."""
    world = build(setting, prompt=500)
    handoff = world.handoff()
    world.compute(0, 500)
    handoff.ready(0, 256)
    world.until(lambda: world.remote.ready(0)[1] == 256, "a part of it")
    world.restart_store()
    assert world.deliver(handoff) is None
    world.assert_delivered()
    assert repeated(world) == 0


@each_remote
def test_what_the_store_has_is_not_sent(build: BuildLink, setting: Setting) -> None:
    """Its cached prefix stays as it is, and is not overwritten by anybody's copy."""
    world = build(setting)
    world.compute(0, 300)
    for arena, record in ((world.source, world.record), (world.target, world.remote)):
        for group in world.groups:
            record.set_ready(group, ATTEMPT, 128)
        table = record.prefill_table
        for group in world.groups:
            for block in range(2):
                source = world.source.page_id(int(world.record.prefill_table[block]), group)
                page = arena.page_id(int(table[block]), group)
                arena.page(page)[...] = world.source.page(source)
                arena.headers["row_crc"][page] = world.source.headers["row_crc"][source]
                key = arenas.identity_of(world.tokens).key(block)
                arena.native.seal(page, group, 64, key)
    pages = [world.target.page_id(int(world.remote.prefill_table[0]), g) for g in world.groups]
    sealed = world.target.headers[pages].copy()
    world.source.page(world.source.page_id(int(world.record.prefill_table[0]), 0))[...] = 0
    assert world.deliver(world.handoff()) is None
    world.assert_delivered()
    assert (world.target.headers[pages] == sealed).all()
    assert repeated(world) == 0 or setting not in STEADY


# --- fencing ---


@each
def test_a_fenced_attempt_writes_no_more(build: BuildLink, setting: Setting) -> None:
    """The sender learns it at once, with words, and not one byte of the pages changes."""
    world = build(setting)
    handoff = world.handoff()
    world.compute(0, 300)
    handoff.ready(0, 128)
    world.until(lambda: world.remote.ready(0)[1] == 128, "a part of it")
    world.remote.fence_prefill(ATTEMPT + 1, 0)
    before = world.target._pages.copy()
    started = world.clock()
    with contextlib.suppress(StaleEpoch):  # in the shared arena it runs into the fence itself
        for group in world.groups:
            handoff.ready(group, 300)
        handoff.first(7, -0.5)
    error = world.finish(handoff)
    if setting.medium != "shm":
        assert isinstance(error, StaleEpoch)
        assert f"attempt: {ATTEMPT}" in error.message
        assert world.clock() - started < 0.5
    assert (world.target._pages == before).all()
    assert world.remote.ready(0) == (ATTEMPT + 1, 0)
    assert not world.remote.first()[1]


@each_remote
def test_a_closed_stream_takes_nothing(build: BuildLink, setting: Setting) -> None:
    """The request is over; what still comes for it is refused."""
    world = build(setting)
    handoff = world.handoff()
    world.compute(0, 300)
    world.remote.close()
    before = world.target._pages.copy()
    for group in world.groups:
        handoff.ready(group, 300)
    assert isinstance(world.finish(handoff), StaleEpoch)
    assert (world.target._pages == before).all()


# --- damage ---


@pytest.mark.parametrize("mode", ["push", "pull"])
@pytest.mark.parametrize("seed", range(8))
def test_damage_on_the_wire_is_noticed_and_repaired(build: BuildLink, mode: str, seed: int) -> None:
    """One flipped bit in a third of all messages, either way: each is counted and comes again."""
    faults = Faults(corrupt=0.3)
    world = build(Setting("faulty", mode, seed=seed, faults=faults), prompt=500)
    assert world.deliver(world.handoff()) is None
    world.assert_delivered()
    store = world.stores[-1]
    assert world.client is not None
    assert store.corrupt + world.client.damaged > 0
    assert store.corrupt >= damaged(world) + store.receiver.counts.corrupt_headers


def test_without_the_check_damage_is_taken(build: BuildLink) -> None:
    """The control: with verification at the receiver off, the same faults put bad rows into the
    arena."""
    faults = Faults(corrupt=0.3)
    bad = 0
    for seed in range(4):
        setting = Setting("faulty", seed=seed, faults=faults, verify=False)
        world = build(setting, prompt=500)
        with contextlib.suppress(CorruptKv):
            world.deliver(world.handoff())
            world.assert_verified()
            continue
        bad += 1
    assert bad > 0


@each_steady
def test_a_page_that_is_damaged_at_its_source_is_named(build: BuildLink, setting: Setting) -> None:
    """It would fail for ever: the transfer ends, and says which block."""
    world = build(setting)
    handoff = world.handoff()
    world.compute(0, 300)
    page = world.source.page_id(int(world.record.prefill_table[2]), 1)
    world.source.page(page)[0, 0, 0, 5, 3] ^= 1
    for group in world.groups:
        handoff.ready(group, 300)
    error = world.finish(handoff)
    assert isinstance(error, CorruptKv if setting.mode == "push" else Unavailable)
    assert "block 2, layer group 1" in error.message
    assert not isinstance(error, CorruptKv) or error.blocks == [2]
    assert world.remote.ready(1)[1] <= 128


# --- silence ---


@each_remote
def test_silence_is_noticed_within_a_second(build: BuildLink, setting: Setting) -> None:
    """A store that is there and says nothing: Unavailable, which the scheduler retries."""
    world = build(setting)
    handoff = world.handoff()
    world.compute(0, 300)
    handoff.ready(0, 128)
    world.until(lambda: world.remote.ready(0)[1] == 128, "a part of it")
    world.silent = True
    started = world.clock()
    for group in world.groups:
        handoff.ready(group, 300)
    error = world.finish(handoff)
    assert isinstance(error, Unavailable)
    assert error.retryable
    assert 0.5 < world.clock() - started < 1.2


@each_steady
def test_patience_outlasts_a_store_that_restarts(build: BuildLink, setting: Setting) -> None:
    """A store that is away for longer than silence is noticed, and comes back: the same transfer goes
    on where it was. One that stays away is given up when patience ends."""
    world = build(setting)
    world.patience_s = 3.0
    world.compute(0, 300)
    handoff = world.handoff()
    handoff.ready(0, 128)
    world.until(lambda: world.remote.ready(0)[1] == 128, "a part of it")
    world.silent = True
    away = world.clock()
    world.until(lambda: world.clock() - away > 1.3, "silence to be noticed")
    world.silent = False
    assert world.deliver(handoff) is None
    world.assert_delivered()
    world.silent = True
    away = world.clock()
    assert isinstance(world.finish(world.handoff()), Unavailable)
    assert 1.5 < world.clock() - away < 4.0


@each_steady
def test_a_failure_is_not_held_against_the_store(build: BuildLink, setting: Setting) -> None:
    """The next transfer over the same connection begins as if nothing had happened."""
    world = build(setting)
    world.silent = True
    world.compute(0, 300)
    failed = world.handoff()
    failed.ready(0, 128)
    assert isinstance(world.finish(failed), Unavailable)
    world.silent = False
    assert world.deliver(world.handoff()) is None
    world.assert_delivered()


@each_remote
@pytest.mark.parametrize("silent", [False, True])
def test_a_cancelled_transfer_ends_at_once(
    build: BuildLink, setting: Setting, silent: bool
) -> None:
    """Also while it waits for a window or for acknowledgements; nothing reads its pages then."""
    world = build(setting, inflight_bytes_max=1 << 16)
    handoff = world.handoff()
    world.compute(0, 300)
    for group in world.groups:
        handoff.ready(group, 300)
    world.silent = silent
    for _ in range(3):
        world.pump()
    ended: list[object] = []
    started = world.clock()
    handoff.end(ended.append, cancel=True)
    world.until(lambda: bool(ended), "the end")
    assert ended == [None]
    assert world.clock() - started < 0.4
    assert world.push is not None
    assert not world.push.trackers


@each_remote
def test_nothing_is_left_behind(build: BuildLink, setting: Setting) -> None:
    """Delivered, cancelled, fenced: neither end holds anything for it, and no memory is being read."""
    world = build(setting)
    world.compute(0, 300)
    for end in ("cancelled", "fenced"):
        handoff = world.handoff()
        handoff.ready(0, 300)
        world.pump()
        if end == "fenced":
            world.remote.fence_prefill(ATTEMPT + 1, 0)
            world.remote.fence_prefill(ATTEMPT, 0)
        ended: list[object] = []
        handoff.end(ended.append, cancel=True)
        world.until(lambda: bool(ended), "the end")  # noqa: B023
    assert world.deliver(world.handoff()) is None
    world.assert_delivered()
    world.until(lambda: at_rest(world), "rest")


@in_memory
def test_frames_that_a_dead_connection_holds_are_dropped(
    build: BuildLink, setting: Setting
) -> None:
    """A transfer that was achieved over a second connection does not wait for the first one's frames:
    the connection is dropped, and with it whatever still reads the pages."""
    world = build(setting)

    @dataclass
    class Stuck:
        done: bool = False

    stuck = Stuck()
    handoff = world.handoff()
    world.compute(0, 300)
    handoff.ready(0, 128)
    world.until(lambda: world.remote.ready(0)[1] == 128, "a part of it")
    assert world.push is not None
    assert world.client is not None
    world.push.trackers.append(stuck)
    connection = next(iter(world.client._links.values())).connection
    reset = connection.reset

    def drops() -> None:
        stuck.done = True
        reset()

    connection.reset = drops  # type: ignore[method-assign]
    assert world.deliver(handoff) is None
    assert stuck.done
    world.assert_delivered()


# --- the handshake ---


@each_steady
@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("layout", {"layout": "v1/64t/9l/9g/2h/16d/bf16"}),
        ("codec", {"codec": "int8"}),
        ("fingerprint", {"fingerprint": b"another model..."}),
    ],
)
def test_a_foreign_peer_is_refused_by_name(
    build: BuildLink, setting: Setting, field: str, change: dict[str, object]
) -> None:
    """Another layout, codec or model: refused at once with words that name what differs."""
    world = build(setting)
    receiver = world.stores[-1].receiver
    receiver.hello = replace(receiver.hello, **change)  # type: ignore[arg-type]
    started = world.clock()
    handoff = world.handoff()
    error = world.finish(handoff)
    assert isinstance(error, LayoutMismatch)
    assert error.message.startswith(f"{field}: the peer has")
    assert world.clock() - started < 0.5


@each_steady
def test_another_version_is_refused_by_name(
    build: BuildLink, setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both sides say which version the other one speaks."""
    world = build(setting)
    client = world.client
    assert client is not None
    poll = client.poll

    def older() -> None:
        with monkeypatch.context() as patch:
            patch.setattr(stream, "VERSION", stream.VERSION - 1)
            poll()

    client.poll = older  # type: ignore[method-assign]
    error = world.finish(world.handoff())
    assert isinstance(error, LayoutMismatch)
    assert error.message.startswith("version: the peer speaks")


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
