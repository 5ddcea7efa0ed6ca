"""Takeovers at the kv-store, over a real arena: who is fenced, what is inherited, what is held back."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from baton.v1 import store_pb2
from services.kv.record import StreamRecord
from services.ops.errors import Overloaded, StaleEpoch
from tests.support.store_actors import Decoding, tokens_of
from tests.support.store_world import StoreWorld, fill, ready


@pytest.fixture
def world(tmp_path: Path) -> Iterator[StoreWorld]:
    with StoreWorld(tmp_path) as world:
        yield world


def test_a_takeover_goes_on_where_the_last_decode_stopped(world: StoreWorld) -> None:
    """No token is lost, none is computed again, and the answer says how far it was."""
    request_id = ready(world, steps=40)
    world.dies(world.workers["d0"])
    reply = world.store.read(request_id)
    assert reply.committed == 40
    assert reply.token_ids == tokens_of(0, 141)[100:].tolist()
    world.move_decode(request_id, "d1")
    world.decode(request_id, 5)
    world.check()
    assert world.store.read(request_id).token_ids == tokens_of(0, 146)[100:].tolist()


def test_a_paused_decode_that_wakes_changes_nothing(world: StoreWorld) -> None:
    """Its pages are its own until it has said Stopped, and its epoch commits nothing."""
    request_id = ready(world, steps=40)
    world.move_decode(request_id, "d1")
    [zombie] = world.zombies()
    world.decode(request_id, 10)
    world.wakes(zombie)
    world.check()
    world.release(request_id)
    other = ready(world)
    world.wakes(zombie)
    world.check()
    assert other in world.asked


def test_a_decode_that_attaches_while_it_is_fenced_loses_nothing(
    world: StoreWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It attached and committed after the store had begun the takeover and before the fence: what it
    committed is the stream's, its tail is the one to copy."""
    request_id = ready(world, prompt=100)
    world.asked[request_id].decode, late = None, world.asked[request_id].decode
    assert late is not None
    role = late.role
    assert isinstance(role, Decoding)
    # as far as the store can tell, it has not attached yet
    StreamRecord(world.arena, late.slot)._words.store(2, 0)
    role.attached, role.stream.steps = False, 0
    fence = StreamRecord.fence

    def late_fence(record: StreamRecord, epoch: int) -> int:
        role.stream.attach(None)
        role.attached = True
        assert all(role.step() for _ in range(3))
        return fence(record, epoch)

    monkeypatch.setattr(StreamRecord, "fence", late_fence)
    world.asked[request_id].steps = 3
    world.move_decode(request_id, "d1")
    world.check()
    world.decode(request_id, 1)
    world.check()


def test_the_same_epoch_again_only_reports(world: StoreWorld) -> None:
    """A decode that has forgotten a stream and is asked for it again has its own tail already."""
    request_id = ready(world, steps=10)
    session = world.asked[request_id].decode
    assert session is not None
    world._end(session)
    world._prepare(
        request_id, world.worker("d0"), session.slot, world.store.state.streams[request_id].epoch
    )
    world.decode(request_id, 5)
    world.check()


def test_an_old_epoch_is_refused(world: StoreWorld) -> None:
    """For either role, and nothing changes."""
    request_id = ready(world, steps=3)
    stream = world.store.state.streams[request_id]
    for role, epoch in (
        (store_pb2.WRITER_ROLE_DECODE, stream.epoch), (store_pb2.WRITER_ROLE_PREFILL, stream.attempt),
    ):  # fmt: skip
        with pytest.raises(StaleEpoch):
            world.store.reassign(
                store_pb2.ReassignRequest(request_id=request_id, role=role, epoch=epoch, writer="x")
            )
    world.decode(request_id, 1)
    world.check()


def test_a_takeover_without_room_can_be_tried_again(world: StoreWorld) -> None:
    """Nobody is fenced: a decode that was only paused goes on, so that a full arena cannot hold all
    its streams for ever. Once there is room the next epoch goes on from the same step."""
    request_id = ready(world, prompt=100, max_new=300, steps=40)
    other = fill(world)
    with pytest.raises(Overloaded):
        world.move_decode(request_id, "d1")
    world.check()
    assert world.zombies() == []
    world.decode(request_id, 3)
    world.release(other)
    world.move_decode(request_id, "d1")
    world.decode(request_id, 30)
    world.check()


def test_a_takeover_that_is_asked_for_again_is_answered_again(world: StoreWorld) -> None:
    """The first answer was lost: the same one comes, nothing changes, and no epoch is burnt."""
    request_id = ready(world, steps=40)
    epoch = world.next_epoch()
    request = store_pb2.ReassignRequest(
        request_id=request_id, role=store_pb2.WRITER_ROLE_DECODE, epoch=epoch,
        writer=world.worker("d1").id,
    )  # fmt: skip
    first = world.store.reassign(request)
    tables = list(world.store.state.streams[request_id].decode_table)
    again = world.store.reassign(request)
    assert (again.slot, again.committed) == (first.slot, first.committed) == (first.slot, 40)
    assert not again.previous_gone
    assert world.store.state.streams[request_id].decode_table == tables


def test_a_takeover_that_a_dead_store_began_is_finished_by_the_same_call(world: StoreWorld) -> None:
    """It died between fence and tables: the record has the new epoch, the tables have the old one."""
    request_id = ready(world, steps=40)
    epoch = world.next_epoch()
    slot = world.store.state.streams[request_id].slot
    assert StreamRecord(world.arena, slot).fence(epoch) == 40
    world.begin_anew()
    reply = world.store.reassign(
        store_pb2.ReassignRequest(
            request_id=request_id, role=store_pb2.WRITER_ROLE_DECODE, epoch=epoch,
            writer=world.worker("d1").id,
        )
    )  # fmt: skip
    assert reply.committed == 40
    assert world.store.state.streams[request_id].table_epoch == epoch


def test_a_takeover_that_found_no_room_can_be_asked_for_again(world: StoreWorld) -> None:
    """With the same epoch: the call is repeated when its answer was lost."""
    request_id = ready(world, prompt=100, max_new=300, steps=40)
    other, epoch = fill(world), world.next_epoch()
    request = store_pb2.ReassignRequest(
        request_id=request_id, role=store_pb2.WRITER_ROLE_DECODE, epoch=epoch,
        writer=world.worker("d1").id,
    )  # fmt: skip
    for _ in range(2):
        with pytest.raises(Overloaded):
            world.store.reassign(request)
    world.release(other)
    assert world.store.reassign(request).committed == 40


def test_who_is_waited_for_is_named(world: StoreWorld) -> None:
    """A scheduler that has come back cannot know whom a takeover before it had fenced."""
    request_id = ready(world, steps=40)
    world.move_decode(request_id, "d1")
    world.release(request_id, stopped=True)
    waiting = world.store.state.waiting_for(request_id)
    assert waiting == {s.worker.id for s in world.zombies()}
    assert waiting
    [awaited] = world.store.renewed(store_pb2.RenewRequest()).awaited
    assert (awaited.request_id, {awaited.writer}) == (request_id, waiting)
    for zombie in world.zombies():
        world.stops(zombie)
    assert world.store.state.waiting_for(request_id) == set()


@pytest.mark.parametrize("dead", [False, True])
def test_cached_blocks_are_not_written_again(world: StoreWorld, dead: bool) -> None:
    """A prefill that begins before them gets fresh ones: others read these."""
    ready(world, prompt=190)
    [request_id] = world.asked
    world.publish(request_id)
    second = world.open(0, 190, 10, "p1", "d1")
    stream = world.store.state.streams[second]
    cached = stream.prefill_table[: stream.cached_blocks]
    assert len(cached) == 2
    if dead:
        world.dies(world.workers["p1"])
    world.store.reassign(
        store_pb2.ReassignRequest(
            request_id=second, role=store_pb2.WRITER_ROLE_PREFILL, epoch=world.next_epoch(),
            writer=world.worker("p2").id, resume_at=0,
        )
    )  # fmt: skip
    assert not set(stream.prefill_table) & set(cached)
    world.store.state.check_invariants()


def test_a_finished_prefill_is_not_moved(world: StoreWorld) -> None:
    """Everything is there: the answer is the whole prompt, and the attempt stays."""
    request_id = world.open(0, 100, 10)
    world.compute(request_id, 101)
    attempt = world.store.state.streams[request_id].attempt
    reply = world.store.reassign(
        store_pb2.ReassignRequest(
            request_id=request_id, role=store_pb2.WRITER_ROLE_PREFILL, epoch=world.next_epoch(),
            writer=world.worker("p1").id,
        )
    )  # fmt: skip
    assert reply.committed == 100
    assert world.store.state.streams[request_id].attempt == attempt


def test_a_prefill_goes_on_from_the_last_whole_block(world: StoreWorld) -> None:
    """Complete in every layer group; the last token is always computed again."""
    for upto, start in ((64, 64), (70, 64), (128, 64)):
        request_id = world.open(1, 128, 10)
        world.compute(request_id, upto)
        world.move_prefill(request_id, "p1")
        assert (
            StreamRecord(world.arena, world.asked[request_id].prefill.slot).ready_tokens() == start
        )
        world.check()
        world.release(request_id, keep=False)
