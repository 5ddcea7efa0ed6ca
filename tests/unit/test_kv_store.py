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
    RequestConflict,
    UnknownRequest,
)
from tests.support.store_actors import end_store, new_store, tokens_of
from tests.support.store_walk import StoreWalk
from tests.support.store_world import StoreWorld, ready


@pytest.fixture
def world(tmp_path: Path) -> Iterator[StoreWorld]:
    with StoreWorld(tmp_path) as world:
        yield world


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
