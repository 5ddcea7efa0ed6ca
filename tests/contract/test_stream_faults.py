"""The hand-over of a stream's KV when something is wrong: a cut connection, a fenced writer, damage,
silence, a peer of another kind. Over every medium, pushed and fetched."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace

import pytest

from services.ops.errors import CorruptKv, LayoutMismatch, StaleEpoch, Unavailable
from services.wire import stream
from services.wire.faulty_medium import Faults
from tests.support import arenas
from tests.support.media import ATTEMPT, Setting
from tests.support.streams import (
    STEADY,
    BuildLink,
    at_rest,
    damaged,
    each,
    each_remote,
    each_steady,
    in_memory,
    repeated,
)

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
