"""The kv-store over a real arena: what it answers, and what its workers' locks and words change."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from baton.v1 import store_pb2
from services.kv.arena import OWN, Arena
from services.kv.layout import PAGE_TOKENS
from services.kv.record import FREE, RESTING, StreamRecord
from services.kv_store import report
from services.kv_store.recover import torn_blocks
from services.kv_store.scrub import Scrub
from services.ops.errors import (
    ConfigError,
    CorruptKv,
    InvalidRequest,
    Overloaded,
    RequestConflict,
    StaleEpoch,
    UnknownRequest,
)
from tests.support.store_actors import Decoding, end_store, new_store, tokens_of
from tests.support.store_walk import StoreWalk
from tests.support.store_world import StoreWorld


@pytest.fixture
def world(tmp_path: Path) -> Iterator[StoreWorld]:
    with StoreWorld(tmp_path) as world:
        yield world


def ready(world: StoreWorld, prompt: int = 100, max_new: int = 100, steps: int = 0) -> str:
    """A stream whose prefill has left and whose decode has committed `steps`."""
    request_id = world.open(0, prompt, max_new)
    world.compute(request_id, prompt + 1)
    world.publish(request_id)
    world.decode(request_id, steps)
    return request_id


@pytest.mark.parametrize("seed", range(30))
def test_whatever_happens_every_byte_is_where_it_belongs(tmp_path: Path, seed: int) -> None:
    """Requests, takeovers, deaths and fenced workers that wake up and write: committed rows, tokens
    and cached blocks stay what their text says, and at the end nothing has leaked."""
    rng = random.Random(1000 + seed)
    with StoreWorld(tmp_path, disk_blocks=5 * (seed % 2)) as world:
        walk = StoreWalk(world, restarts=False)
        try:
            for _ in range(60):
                walk.step(rng.choice)
            world.end()
        except AssertionError as error:
            raise AssertionError(f"{error}\n" + "\n".join(walk.story)) from error


def fill(world: StoreWorld) -> str:
    """A stream that takes every free block."""
    return world.open(1, PAGE_TOKENS * len(world.store.state.pool.free), 1)


# --- opening ---


def test_opening_again_is_the_same_opening(world: StoreWorld) -> None:
    """Idempotent for an epoch and attempt: an answer that was lost can be asked for again."""
    request = store_pb2.OpenStreamRequest(
        request_id="r", token_ids=tokens_of(0, 70).tolist(), max_new_tokens=5, epoch=2, attempt=3,
        prefill_writer=world.worker("p0").id, decode_writer=world.worker("d0").id, first_index=4,
    )  # fmt: skip
    first = world.store.open(request)
    free = set(world.store.state.pool.free)
    assert world.store.open(request) == first
    assert world.store.state.pool.free == free
    request.epoch = 9
    with pytest.raises(RequestConflict):
        world.store.open(request)
    assert world.store.read("r").first_index == 4


@pytest.mark.parametrize(("prompt", "max_new"), [(0, 1), (2048, 1), (2000, 49)])
def test_a_stream_that_cannot_fit_a_context_is_refused(
    world: StoreWorld, prompt: int, max_new: int
) -> None:
    """The field is named and nothing is leased."""
    request = store_pb2.OpenStreamRequest(
        request_id="r", token_ids=[1] * prompt, max_new_tokens=max_new, epoch=2, attempt=3
    )
    with pytest.raises(InvalidRequest, match=r"^token_ids: "):
        world.store.open(request)
    assert not world.store.state.pool.leases


def test_tenants_share_nothing(world: StoreWorld) -> None:
    """The same tokens of another tenant are other content."""
    request_id = ready(world, prompt=128)
    for tenant, cached in (("a", 0), ("", 64)):
        reply = world.store.open(
            store_pb2.OpenStreamRequest(
                request_id=f"tenant-{tenant}", token_ids=tokens_of(0, 128).tolist(), epoch=50,
                attempt=51, prefill_writer=world.worker("p0").id, tenant=tenant,
            )
        )  # fmt: skip
        assert reply.cached_tokens == cached
    assert request_id in world.store.state.streams


def test_a_second_store_is_refused(world: StoreWorld) -> None:
    """One store owns an arena; the other says so and does not start."""
    with pytest.raises(ConfigError, match=r"^arena_dir: another kv-store"):
        new_store(world.directory)


def test_requests_that_are_not_open_are_unknown(world: StoreWorld) -> None:
    """Every call says so, but for a release, which has nothing left to do."""
    store = world.store
    for call in (
        lambda: store.publish("x"), lambda: store.read("x"), lambda: store.invalidate("x", [0]),
        lambda: store.reassign(store_pb2.ReassignRequest(request_id="x", epoch=5)),
    ):  # fmt: skip
        with pytest.raises(UnknownRequest):
            call()
    assert not store.release(store_pb2.ReleaseRequest(request_id="x"))


# --- takeovers ---


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


# --- who may still write ---


def test_a_word_of_a_writer_without_quarantine_is_heard(world: StoreWorld) -> None:
    """Stopped is remembered even when no block waits for it now: at the end nothing does."""
    request_id = ready(world, prompt=100, max_new=28, steps=10)
    world.move_decode(request_id, "d1")
    [zombie] = world.zombies()
    assert not world.store.state.pool.quarantined
    world.stops(zombie)
    world.release(request_id)
    assert not world.store.state.pool.quarantined
    assert not world.store.state.resting_slots


def test_a_slot_rests_until_its_last_writer_has_stopped(world: StoreWorld) -> None:
    """The record says so too; then it is free."""
    request_id = ready(world, steps=3)
    slot = world.store.state.streams[request_id].slot
    world.release(request_id, stopped=False)
    record = StreamRecord(world.arena, slot)
    assert record.number("state") == RESTING
    assert world.store.state.streams == {}
    [decode] = world.zombies()
    world.stops(decode)
    assert record.number("state") == FREE


def test_every_page_is_counted_once(world: StoreWorld) -> None:
    """What the dashboard shows adds up, through a request's whole life."""

    def pages() -> tuple[int, int, int, int, int]:
        p = report.pages(world.store, "address")
        parts = (p.pages_free, p.pages_open, p.pages_sealed, p.pages_cached, p.pages_quarantined)
        assert sum(parts) == p.pages_total
        return parts

    baseline = pages()[0]
    request_id = ready(world, prompt=128, max_new=100, steps=10)
    assert pages()[1:] == (4, 4, 0, 0)
    world.move_decode(request_id, "d1")
    assert pages()[4] == 2
    world.release(request_id, stopped=False)
    assert pages()[3:] == (4, 8)
    for session in world.zombies():
        world.stops(session)
    assert pages() == (baseline - 4, 0, 0, 4, 0)


def test_reconcile_ends_what_nobody_remembers(world: StoreWorld) -> None:
    """A scheduler that comes back names its requests; the others are released, their writers waited
    for."""
    kept, lost = ready(world, steps=3), ready(world, steps=3)
    asked = world.asked.pop(lost)
    assert world.store.reconcile([kept]) == 1
    for session in (asked.prefill, asked.decode):
        if session:
            session.fenced = True
    world.check()
    assert set(world.store.state.streams) == {kept}
    assert world.store.reconcile([kept]) == 0


def test_a_release_that_comes_late_does_not_end_another_opening(world: StoreWorld) -> None:
    """It was said of all that had been opened until then; what has been opened since is not meant."""
    request_id = ready(world)
    stream = world.store.state.streams[request_id]
    opened = max(stream.epoch, stream.attempt)
    late = store_pb2.ReleaseRequest(request_id=request_id, epoch=opened - 1)
    assert not world.store.release(late)
    assert request_id in world.store.state.streams
    release = world.forget(request_id)
    release.epoch = opened
    assert world.store.release(release)
    world.check()


# --- leases ---


def test_a_stream_that_nobody_renews_is_released(world: StoreWorld) -> None:
    """Its complete blocks stay cached, its decode can commit no more and is waited for."""
    request_id = ready(world, prompt=128, steps=70)
    world.renew()
    world.passes(9.875)
    assert request_id in world.store.state.streams
    world.passes(0.125)
    assert world.store.counts.leases_expired == 1
    assert not world.store.state.streams
    assert len(world.store.state.index) == (128 + 70) // PAGE_TOKENS
    world.check()
    zombies = world.zombies()
    assert world.store.state.pool.quarantined
    for zombie in zombies:
        world.wakes(zombie)
        world.stops(zombie)
    world.check_empty()


def test_a_store_that_was_stopped_waits_for_its_streams(world: StoreWorld) -> None:
    """It could hear nobody: no lease ends by that, and a renewal that comes then is in time."""
    request_id = ready(world, steps=3)
    world.stands_still(1000.0)
    assert request_id in world.store.state.streams
    world.renew()
    world.passes(9.0)
    world.decode(request_id, 3)
    world.restart()
    world.passes(9.0)
    world.decode(request_id, 3)
    world.check()


def test_renewing_names_what_is_lost(world: StoreWorld) -> None:
    """Whoever wants it computes it again."""
    request_id = ready(world)
    assert world.store.renew([request_id, "x"]) == ["x"]
    world.release(request_id)
    assert world.store.renew([request_id]) == [request_id]


# --- corrupt pages ---


def test_a_corrupt_cached_block_is_found_before_it_is_used(world: StoreWorld) -> None:
    """A flipped byte in a cached block fails the request that would have read it."""
    first = ready(world, prompt=200)
    block = world.store.state.streams[first].prefill_table[1]
    world.release(first)
    page = world.arena.page(world.arena.page_id(block, 1)).view(np.uint8)
    page[0, 1, 0, 5, 7] ^= 1
    request_id = world.open(0, 200, 10)
    world.compute(request_id, 201)
    with pytest.raises(CorruptKv):
        world.decode(request_id, 1)


def scrub_all(world: StoreWorld) -> None:
    scrub = Scrub(world.store, pages_max=1, blocks_max=1)
    for _ in range(world.arena.plan.pages):
        scrub.step()


@pytest.mark.parametrize("field", OWN.names or ())
def test_a_flipped_header_is_mended(world: StoreWorld, field: str) -> None:
    """From the store's own copy, whosever the page is; counted, and nobody notices."""
    request_id = ready(world, prompt=128, steps=3)
    kept = world.arena.headers.copy()
    scrub_all(world)
    assert world.store.counts.headers_repaired == 0
    for n, page in enumerate((0, world.arena.plan.pages - 1)):
        world.arena.headers[page : page + 1][field].view(np.uint8)[0] ^= 16
        assert torn_blocks(world.arena).any() == (field != "own_padding")
        scrub_all(world)
        assert world.store.counts.headers_repaired == n + 1
        assert world.arena.headers.tobytes() == kept.tobytes()
    world.decode(request_id, 3)
    world.restart()


@pytest.mark.parametrize("field", ["row_crc", "checksum", "key", "tokens", "state"])
def test_a_cached_block_that_has_changed_is_dropped(world: StoreWorld, field: str) -> None:
    """Before anybody wants it; counted, and computed again."""
    first = ready(world, prompt=200)
    block = world.store.state.streams[first].prefill_table[1]
    world.release(first)
    scrub_all(world)
    assert world.store.counts.corrupt_cached == 0
    page = world.arena.page_id(block, 1)
    world.arena.headers[page : page + 1][field].view(np.uint8)[..., 0] ^= 1
    scrub_all(world)
    assert world.store.counts.corrupt_cached == 1
    other = world.open(0, 200, 0)
    assert StreamRecord(world.arena, world.asked[other].prefill.slot).ready_tokens() == 64
    world.check()


def test_a_free_page_looks_free(world: StoreWorld) -> None:
    """A flip cannot make a cached block of it for the store after this one."""
    world.arena.headers["state"][3] = 2
    scrub_all(world)
    assert world.arena.headers["state"][3] == 0
    assert world.store.counts.headers_repaired == 1


def test_an_invalid_block_stays_out_of_the_cache(world: StoreWorld) -> None:
    """Also after the store has started anew, while the stream still holds the block."""
    request_id = ready(world, prompt=200)
    world.invalidate(request_id, 1)
    world.release(world.open(0, 200, 0), keep=False, stopped=True)
    for restart in (False, True):
        if restart:
            world.restart()
        other = world.open(0, 200, 0)
        assert StreamRecord(world.arena, world.asked[other].prefill.slot).ready_tokens() == 64
        world.release(other, keep=False)


def test_an_arena_of_another_shape_is_replaced(tmp_path: Path) -> None:
    """The old file goes; whoever maps it is refused by its own check, not by luck."""
    with StoreWorld(tmp_path) as world:
        ready(world)
        old = world.store.store_id
        end_store(world.store)
        world.store = new_store(tmp_path, arena_bytes=2 << 20)
        assert world.store.store_id != old
        assert not world.store.state.streams
        assert Arena(tmp_path).plan.store_id == world.store.store_id


def test_a_stream_of_one_token_needs_no_decode(world: StoreWorld) -> None:
    """Prefill alone answers; its complete blocks are kept."""
    request_id = world.open(0, 130, 1)
    world.compute(request_id, 131)
    reply = world.store.read(request_id)
    assert (reply.token_ids, reply.committed) == (tokens_of(0, 131)[130:].tolist(), 0)
    world.release(request_id)
    assert len(world.store.state.index) == 130 // PAGE_TOKENS
    world.check()
