"""Blocks come back from disk before a stream is opened, and go there before they are evicted."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from services.kv_store import report
from services.kv_store.prefetch import Prefetcher
from services.ops.errors import Overloaded
from tests.support.store_actors import Prefilling
from tests.support.store_tiers import StoreTiers
from tests.support.store_world import StoreWorld


@pytest.fixture
def world(tmp_path: Path) -> Iterator[StoreWorld]:
    with StoreWorld(tmp_path, disk_blocks=16) as world:
        yield world


def tiers(world: StoreWorld) -> StoreTiers:
    assert world.tiers
    return world.tiers


def cache(world: StoreWorld, family: int = 0, prompt: int = 192) -> None:
    """Computes and ends a request, whose blocks stay as prefix cache."""
    request_id = world.open(family, prompt, 0)
    world.compute(request_id, prompt + 1)
    world.release(request_id)
    world.check()


def hit(world: StoreWorld, family: int = 0, prompt: int = 193) -> int:
    """How many tokens a new request finds."""
    request_id = world.open(family, prompt, 0)
    role = world.asked[request_id].prefill.role
    assert isinstance(role, Prefilling)
    world.check()
    world.release(request_id, keep=False)
    return role.at


def evict_all(world: StoreWorld) -> None:
    """A stream takes every block there is, and goes."""
    free = len(world.store.state.pool.free) + world.store.state.evictable()
    blocks = world.store.begin_fill(free, [])
    world.store.end_fill([], blocks, [])
    assert not len(world.store.state.index)
    world.check()


def test_what_was_evicted_comes_back_from_disk(world: StoreWorld) -> None:
    """Written while it was cached, read back, verified, and found by the request that wants it."""
    cache(world)
    tiers(world).flush()
    evict_all(world)
    assert hit(world) == 192
    assert tiers(world).disk.counts.hits == 3
    assert hit(world) == 192
    assert tiers(world).disk.counts.hits == 3, "it was in the arena already"


def test_everything_may_start_again(world: StoreWorld) -> None:
    """Another arena, other processes, the same directory: the prefix is found."""
    cache(world)
    tiers(world).flush()
    world.begin_from_nothing()
    assert hit(world) == 192
    world.end()


def test_only_what_the_arena_lacks_is_read(world: StoreWorld) -> None:
    """The chain goes on from the arena to the disk."""
    cache(world)
    tiers(world).flush()
    world.store.state.invalidate([world.store.state.index.longest(keys(world))[2]])
    assert hit(world) == 192
    assert tiers(world).disk.counts.hits == 1


def keys(world: StoreWorld, family: int = 0, prompt: int = 193) -> list[bytes]:
    return world.store.prompt_keys(world.wish(family, prompt, 0))


def test_what_was_not_written_is_lost_and_computed_again(world: StoreWorld) -> None:
    """Eviction waits for nobody."""
    cache(world)
    evict_all(world)
    assert hit(world) == 0


def test_two_opens_read_a_block_once(world: StoreWorld) -> None:
    """The second waits for the first one's read."""
    cache(world)
    tiers(world).flush()
    evict_all(world)
    wishes = [world.wish(0, 193, 0), world.wish(0, 150, 0)]
    opening = [tiers(world).begin_open(wish) for wish in wishes]
    world.check()
    tiers(world).settle()
    assert [task.result().cached_tokens for task in opening] == [192, 128]
    assert tiers(world).disk.counts.hits == 3
    world.store.state.check_invariants()


def test_a_block_that_somebody_computed_meanwhile_is_kept_once(world: StoreWorld) -> None:
    """The first one under a key stays, the one that was read is free again."""
    cache(world)
    tiers(world).flush()
    evict_all(world)
    opening = tiers(world).begin_open(world.wish(0, 193, 0))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(world, "tiers", None)
        cache(world)
    free = len(world.store.state.pool.free)
    tiers(world).settle()
    assert opening.result().cached_tokens == 192
    assert len(world.store.state.pool.free) == free + 3 - 1
    world.store.state.check_invariants()


def test_no_room_is_a_shorter_hit(world: StoreWorld) -> None:
    """Blocks that others hold are not evicted for it, nor those that the chain has already."""
    cache(world)
    tiers(world).flush()
    evict_all(world)
    assert hit(world, prompt=65) == 64
    pool = world.store.state.pool
    held = world.store.begin_fill(len(pool.free) - 1, [])
    wish = world.wish(0, 193, 0)
    with pytest.raises(Overloaded):
        tiers(world).open(wish)
    assert len(pool.free) + world.store.state.evictable() == 2
    assert world.store.state.index.longest(keys(world)), "its own beginning was evicted for its end"
    world.store.end_fill([], held, [])
    assert tiers(world).open(wish).cached_tokens == 192


def test_a_block_is_held_while_it_is_written(world: StoreWorld) -> None:
    """Evicted or reused under the writer, another block's bytes would get its name."""
    cache(world)
    tiers(world).write_back()
    state = world.store.state
    assert len(state.copying) == 3
    assert state.evictable() == 0
    blocks = world.store.begin_fill(1000, [])
    assert not set(blocks) & set(state.copying)
    world.store.end_fill([], blocks, [])
    tiers(world).settle()
    assert not state.copying
    evict_all(world)
    assert hit(world) == 192


def test_a_damaged_block_is_not_written(world: StoreWorld) -> None:
    """Its seal does not fit: it leaves the cache, counted."""
    cache(world)
    block = world.store.state.index.longest(keys(world))[1]
    world.arena.headers["row_crc"][world.arena.page_id(block, 1), 5] ^= 1
    tiers(world).flush()
    assert world.store.counts.corrupt_cached == 1
    assert hit(world, prompt=193) == 64
    assert tiers(world).disk.counts.written == 2


def test_a_full_disk_stops_nothing(world: StoreWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests go on; what is not written stays to be written later."""

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("services.kv_store.blockfile._crc", full)
    cache(world)
    tiers(world).flush()
    assert tiers(world).disk.counts.write_failures == 3
    assert report.pages(world.store, "").disk_paused
    assert hit(world) == 192
    assert not world.store.state.copying
    assert len(world.store.state.index.unwritten) == 3


def test_a_disk_that_hangs_is_not_waited_for(world: StoreWorld) -> None:
    """After `prefetch_ms` the stream is opened with a shorter hit; the read goes on, for the next."""
    cache(world)
    tiers(world).flush()
    evict_all(world)
    t = tiers(world)
    t.prefetcher._wait_s = 0.01
    first = t.loop.run_until_complete(t.prefetcher.open(world.wish(0, 193, 0)))
    assert first.cached_tokens == 0
    world.store.state.check_invariants()
    t.settle()
    assert t.loop.run_until_complete(t.prefetcher.open(world.wish(0, 193, 0))).cached_tokens == 192


def test_a_cancelled_open_leaves_the_read_to_its_end(world: StoreWorld) -> None:
    """Its blocks are being written by a thread: they are not free before that has ended."""
    cache(world)
    tiers(world).flush()
    evict_all(world)
    opening = tiers(world).begin_open(world.wish(0, 193, 0))
    opening.cancel()
    tiers(world).turn()
    assert opening.cancelled()
    assert len(world.store.state.filling) == 3
    tiers(world).settle()
    assert not world.store.state.filling
    assert hit(world) == 192


class Elsewhere:
    """A source that has no inventory: it gives the first blocks from a store's arena."""

    def __init__(self, world: StoreWorld, count: int) -> None:
        self.world, self.count = world, count
        self.asked: list[int] = []

    async def load(self, keys: Sequence[bytes], blocks: Sequence[int]) -> int:
        self.asked.append(len(keys))
        tier = tiers(self.world).disk
        return await tier.load(keys[: self.count], blocks)


def test_sources_are_tried_in_order(world: StoreWorld) -> None:
    """Each is asked for what those before it did not have."""
    cache(world)
    tiers(world).flush()
    evict_all(world)
    one, two = Elsewhere(world, 1), Elsewhere(world, 5)
    prefetcher = Prefetcher(world.store, [one], 60.0)
    wish = world.wish(0, 193, 0)
    reply = tiers(world).run(prefetcher.open(wish, [two]))
    assert reply.cached_tokens == 192
    assert (one.asked, two.asked) == ([3], [2])


def test_a_request_that_wants_no_cache_gets_none(world: StoreWorld) -> None:
    """Nothing is read for it."""
    cache(world)
    tiers(world).flush()
    evict_all(world)
    wish = world.wish(0, 193, 0)
    wish.bypass_cache = True
    assert (
        asyncio.run(Prefetcher(world.store, [tiers(world).disk], 1.0).open(wish)).cached_tokens == 0
    )
    assert tiers(world).disk.counts.hits == 0
