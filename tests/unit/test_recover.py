"""A kv-store that dies finds everything again in the arena: streams, leases, quarantine and cache.

What it finds must be right wherever it died, since nobody else knows who may write which page.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import count
from pathlib import Path

import numpy as np
import pytest

from services.kv.arena import OWN
from services.kv.record import FREE, StreamRecord
from services.kv_store.recover import torn_blocks
from tests.support.dying import die_before
from tests.support.store_actors import GROUPS, Prefilling
from tests.support.store_walk import StoreWalk
from tests.support.store_world import StoreWorld

WRITING = (
    "kv_store/runtime.py",
    "kv_store/headers.py",
    "kv/record.py",
)  # where the store writes into the arena


@pytest.mark.parametrize("one_class", [True, False])
@pytest.mark.parametrize("seed", range(40))
def test_whatever_happened_is_found_again(tmp_path: Path, seed: int, one_class: bool) -> None:
    """Any history of requests, takeovers, deaths and late writers; the store restarts within it."""
    rng = random.Random(seed)
    with StoreWorld(tmp_path, one_class, disk_blocks=5 * (seed % 2)) as world:
        walk = StoreWalk(world)
        try:
            for _ in range(40):
                walk.step(rng.choice)
            world.end()
        except AssertionError as error:
            raise AssertionError(f"{error}\n" + "\n".join(walk.story)) from error


def cached_tokens(world: StoreWorld, prompt: int, family: int = 0) -> int:
    """How much of this prompt a new request finds."""
    request_id = world.open(family, prompt, 0)
    role = world.asked[request_id].prefill.role
    found: int = role.at if isinstance(role, Prefilling) else -1
    world.release(request_id, keep=False)
    return found


@pytest.mark.parametrize(("one_class", "found"), [(True, 192), (False, 128)])
def test_what_decode_computed_is_cached_in_one_numerics_class_only(
    tmp_path: Path, one_class: bool, found: int
) -> None:
    """Where prefill's kernels are not decode's, a prompt never finds a generated block: not after
    the answer's end, and not in a store that rebuilds itself when it died while it let go of one."""
    with StoreWorld(tmp_path, one_class) as world:
        request_id = ready(world, prompt=128, steps=64)
        world.release(request_id)
        assert cached_tokens(world, 256) == found
        world.restart()
        assert cached_tokens(world, 256) == found
        again = ready(world, family=1, prompt=128, steps=64)
        slot = world.store.state.streams[again].slot
        world.forget(again)
        StreamRecord(world.arena, slot).set_state(
            FREE
        )  # the record is closed, no header is written
        world.begin_anew()
        assert cached_tokens(world, 256, family=1) == found


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize(
    "field",
    [
        "row_crc", "checksum", "key", "tokens", "state", "magic", "group", "block", "lease", "owner",
        "stamp", "writer", "epoch", "quarantined", "own_crc",
    ],
)  # fmt: skip
def test_a_damaged_header_is_not_trusted(tmp_path: Path, field: str, group: int) -> None:
    """A block is cached when the headers of all its pages fit: anything else is no block."""
    with StoreWorld(tmp_path) as world:
        request_id = world.open(0, 192, 0)
        world.compute(request_id, 193)
        block = world.store.state.streams[request_id].prefill_table[1]
        world.release(request_id)
        header = world.arena.headers[world.arena.page_id(block, group) :][:1]
        header[field].view(np.uint8)[..., 0] ^= 1
        world.begin_anew()
        assert cached_tokens(world, 193) == 64


OWN_FIELDS = [name for name in OWN.names or () if name != "own_padding"]


@pytest.mark.parametrize("field", OWN_FIELDS)
def test_a_block_with_a_damaged_header_waits_for_everybody(tmp_path: Path, field: str) -> None:
    """Nobody knows who may write it: it is held back until every worker has gone that was there."""
    with StoreWorld(tmp_path) as world:
        worker, other = world.worker("d0"), world.worker("p0")
        block = 5
        world.arena.headers[world.arena.page_id(block, 1) :][:1][field].view(np.uint8)[0] ^= 4
        world.begin_anew()
        assert world.store.counts.headers_repaired == 1
        world.worker("d1")  # came later
        for _ in range(2):
            assert block in world.store.state.pool.quarantined
            assert not torn_blocks(world.arena).any()
            world.store.sweep()
            world.begin_anew()
        world.dies(worker)
        world.store.sweep()
        assert block in world.store.state.pool.quarantined
        for gone in (other, world.worker("d1")):
            world.dies(gone)
        world.store.sweep()
        assert block in world.store.state.pool.free
        world.check()


@pytest.mark.parametrize("prefill", [True, False])
def test_a_writer_is_waited_for_up_to_what_it_got(tmp_path: Path, prefill: bool) -> None:
    """A store that dies between fence and tables leaves a record that is ahead of its writer: its word
    about the epoch that it knows is enough."""
    with StoreWorld(tmp_path) as world:
        request_id = world.open(0, 190, 10)
        if not prefill:
            world.compute(request_id, 191)
            world.publish(request_id)
        stream = world.store.state.streams[request_id]
        writer = stream.prefill_writer if prefill else stream.decode_writer
        known = stream.attempt if prefill else stream.epoch
        record = StreamRecord(world.arena, stream.slot)
        if prefill:
            record.fence_prefill(world.next_epoch(), 0)
        else:
            record.fence(world.next_epoch())
        world.begin_anew()
        if prefill:
            world.move_prefill(request_id, "p1")
        else:
            world.move_decode(request_id, "d1")
        assert world.store.state.streams[request_id].fenced == {writer: known}
        world.store.sweep(stopped=(request_id, writer), epoch=known)
        assert not world.store.state.streams[request_id].fenced


def test_who_came_later_is_not_waited_for(tmp_path: Path) -> None:
    """A process that began after the store cannot have got a block from the one before it."""
    with StoreWorld(tmp_path) as world:
        worker = world.worker("d0")
        world.arena.headers["epoch"][3] ^= 1
        world.begin_anew()
        world.worker("d1")
        world.dies(worker)
        world.store.sweep()
        assert not world.store.state.pool.quarantined


@pytest.mark.parametrize("field", OWN_FIELDS)
def test_a_damaged_header_of_a_stream_is_written_anew(tmp_path: Path, field: str) -> None:
    """Its table says whose it is; takeovers go on as if nothing had happened."""
    with StoreWorld(tmp_path) as world:
        request_id = ready(world)
        [*_, block] = world.store.state.streams[request_id].decode_table
        world.arena.headers[world.arena.page_id(block, 0) :][:1][field].view(np.uint8)[0] ^= 1
        world.begin_anew()
        world.check()
        pool = world.store.state.pool
        assert pool.writers[block] == world.workers["d0"].id
        world.move_decode(request_id, "d1")
        assert block in pool.quarantined
        world.decode(request_id, 20)
        world.restart()
        world.check()
        world.end()


def test_blocks_of_an_unfinished_prefill_are_not_cached(tmp_path: Path) -> None:
    """They are sealed and may still be given to another prefill, which writes them again."""
    with StoreWorld(tmp_path) as world:
        request_id = world.open(0, 128, 10)
        world.compute(request_id, 128)
        world.begin_anew()
        assert cached_tokens(world, 193) == 0
        world.move_prefill(request_id, "p1")
        world.check()
        world.compute(request_id, 129)
        world.decode(request_id, 5)
        world.check()
        world.end()


def test_what_was_cached_twice_is_cached_once(tmp_path: Path) -> None:
    """A running request computed what somebody else had put into the cache meanwhile."""
    with StoreWorld(tmp_path) as world:
        slow, fast = world.open(0, 190, 10), world.open(0, 190, 10)
        for request_id in (fast, slow):
            world.compute(request_id, 191)
            world.publish(request_id)
        world.restart()
        world.check()
        world.release(slow)
        world.restart()
        world.end()


# --- a store that dies in the middle of a call ---

Call = Callable[[], object]


def ready(world: StoreWorld, family: int = 0, prompt: int = 100, steps: int = 30) -> str:
    """A stream whose prefill has left and whose decode has committed `steps`."""
    request_id = world.open(family, prompt, 100)
    world.compute(request_id, prompt + 1)
    world.publish(request_id)
    world.decode(request_id, steps)
    return request_id


def opening(world: StoreWorld) -> Call:
    """Beside a running stream, into blocks that have to be evicted first."""
    ready(world)
    old = world.open(1, 256, 0)
    world.compute(old, 257)
    world.release(old)
    request = world.wish(0, 190, 200)
    free = len(world.store.state.pool.free)
    assert free < 7 <= free + world.store.state.evictable(), "nothing has to be evicted"
    return lambda: world.store.open(request)


def taking_over(world: StoreWorld) -> Call:
    """From a decode that is paused, with a former tail and quarantine from a takeover before."""
    request_id = ready(world)
    world.move_decode(request_id, "d1")
    world.decode(request_id, 5)
    return lambda: world.move_decode(request_id, "d2")


def taking_over_from_the_dead(world: StoreWorld) -> Call:
    """Its blocks are free at once and may be the very ones that the successor gets."""
    request_id = ready(world)
    world.dies(world.workers["d0"])
    return lambda: world.move_decode(request_id, "d1")


def moving_prefill(world: StoreWorld) -> Call:
    """From one that is paused in its second block."""
    request_id = world.open(0, 190, 10)
    world.compute(request_id, 100)
    return lambda: world.move_prefill(request_id, "p1")


def moving_prefill_from_the_dead(world: StoreWorld) -> Call:
    """The successor goes on in the same blocks."""
    request_id = world.open(0, 190, 10)
    world.compute(request_id, 190)
    world.dies(world.workers["p0"])
    return lambda: world.move_prefill(request_id, "p1")


def releasing(world: StoreWorld) -> Call:
    """Its workers have not stopped, and a fenced one is still there."""
    request_id = ready(world)
    world.move_decode(request_id, "d1")
    world.decode(request_id, 5)
    request = world.forget(request_id, stopped=False)
    return lambda: world.store.release(request)


def releasing_the_finished(world: StoreWorld) -> Call:
    """Everybody has stopped; complete blocks become cache."""
    request = world.forget(ready(world, steps=99))
    return lambda: world.store.release(request)


def throwing_away(world: StoreWorld) -> Call:
    """Its KV is not to be trusted: nothing of it may be found again."""
    request_id = ready(world)
    world.invalidate(request_id, 0)
    request = world.forget(request_id, keep=False, stopped=False)
    return lambda: world.store.release(request)


def hearing_stopped(world: StoreWorld) -> Call:
    """Blocks and slot of a request that has ended come back."""
    world.release(ready(world), stopped=False)
    [session] = world.zombies()
    return lambda: world.stops(session)


def publishing(world: StoreWorld) -> Call:
    request_id = world.open(0, 190, 10)
    world.compute(request_id, 191)
    return lambda: world.publish(request_id)


@pytest.mark.parametrize(
    "scene",
    [
        opening, taking_over, taking_over_from_the_dead, moving_prefill,
        moving_prefill_from_the_dead, releasing, releasing_the_finished, throwing_away,
        hearing_stopped, publishing,
    ],
)  # fmt: skip
def test_a_store_may_die_anywhere(tmp_path: Path, scene: Callable[[StoreWorld], Call]) -> None:
    """Before each line of a call: no page is listed twice, none that somebody may still write is free
    or cached, nothing committed is lost; the call can be made again, and in the end nothing leaks."""
    for line in count():
        with StoreWorld(tmp_path / str(line)) as world:
            call = scene(world)
            world.check()
            died = die_before(line, WRITING, call)
            try:
                world.begin_anew()
                world.check()
                if died:
                    call()
                world.check()
                for request_id in list(world.asked):
                    world.compute(request_id, 1000)
                    world.decode(request_id, 3)
                world.check()
                world.end()
            except AssertionError as error:
                raise AssertionError(f"died before line {line}: {error}") from error
        if not died:
            break
    assert line > 3
