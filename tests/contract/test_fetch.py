"""Cached blocks from another store: what arrives is what that store has sealed, it stays where it is
while it is being copied, and whatever happens neither side keeps anything back."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import numpy as np
import pytest

from baton.v1 import store_pb2
from services.kv.layout import PAGE_TOKENS
from services.kv.verify import verify_groups
from services.kv_store.endpoint import IDLE_S, Endpoint
from services.kv_store.fetch import KeyFetch, PeerCaches
from services.kv_store.ingest import Lending
from services.kv_store.loans import LOAN_S
from services.kv_store.prefetch import Prefetcher
from services.kv_store.runtime import KvStore
from services.wire.client import TICK_S
from services.wire.faulty_medium import Faults, FaultyMedium
from services.wire.medium import Medium
from services.wire.memory_medium import MemoryMedium
from services.wire.zmq_medium import ZmqMedium
from tests.support.media import Clock
from tests.support.store_actors import text, tokens_of
from tests.support.store_world import StoreWorld

MEDIA = ("memory", "tcp", "faulty", "faulty-tcp")
FAULTS = Faults(drop=0.05, duplicate=0.05, delay=0.1, corrupt=0.05, cut=0.01)
PROMPT = 257  # four complete blocks, and one token that is always computed
each_medium = pytest.mark.parametrize("medium", MEDIA)
DEADLINE_S = 30.0


@dataclass
class Pair:
    """`there` has what `here` wants."""

    there: StoreWorld
    here: StoreWorld
    clock: Clock
    media: list[Medium]
    ends: list[Endpoint] = field(default_factory=list)
    addresses: list[str] = field(default_factory=list)
    loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.new_event_loop)
    silent: bool = False
    epoch: int = 900

    def __post_init__(self) -> None:
        for n, world in enumerate((self.there, self.here)):
            medium = self.media[n]
            sockets = not self.clock.virtual
            listener = medium.listen("tcp://127.0.0.1:*" if sockets else f"store-{n}")
            arena = world.store.arena
            end = Endpoint(
                arena, Lending(world.store), medium, listener, clock=self.clock,
                inflight_bytes_max=1 << 20,
            )  # fmt: skip
            self.ends.append(end)
            self.addresses.append(listener.address)
        self.caches = PeerCaches(
            self.here.store.arena, self.ends[1].client, lambda: None, clock=self.clock
        )
        self.prefetcher = Prefetcher(self.here.store, [], wait_s=60.0)

    def turn(self) -> None:
        for end in self.ends[1 if self.silent else 0 :]:
            end.turn()
        self.clock.tick(self.media[0])

    def pump(self, until: Callable[[], bool]) -> None:
        async def turns() -> None:
            end = (
                time.monotonic() + DEADLINE_S
            )  # over tcp silence takes its time, whatever a turn takes
            while time.monotonic() < end:
                if until():
                    return
                self.turn()
                await asyncio.sleep(0)
            raise AssertionError("it does not come to an end")

        self.loop.run_until_complete(turns())

    def open(self, family: int = 0, prompt: int = PROMPT, *addresses: str) -> int:
        """How many tokens a new request at `here` finds; verified against its text."""
        self.epoch += 2
        request = store_pb2.OpenStreamRequest(
            request_id=f"r{family}", token_ids=tokens_of(family, prompt).tolist(),
            epoch=self.epoch, attempt=self.epoch + 1,
        )  # fmt: skip
        source = self.caches.at(addresses or self.addresses[:1])
        task = self.loop.create_task(self.prefetcher.open(request, [source]))
        self.pump(task.done)
        opened = task.result()
        stream = self.here.store.state.streams[request.request_id]
        table = np.array(stream.prefill_table, np.uint32)
        verify_groups(self.here.store.arena, table, text(family), 0, opened.cached_tokens)
        self.here.store.state.check_invariants()
        self.here.store.release(store_pb2.ReleaseRequest(request_id=request.request_id))
        return int(opened.cached_tokens)

    def at_rest(self) -> bool:
        for world in (self.there, self.here):
            world.store.state.check_invariants()
            state = world.store.state
            if state.copying or state.filling:
                return False
        return all(end.client.idle for end in self.ends)

    def settle(self) -> None:
        """Nothing is lent, being filled or on its way: at the latest when a loan has run out."""
        self.silent = False
        if self.clock.virtual:
            self.clock.now += LOAN_S
        self.pump(self.at_rest)
        assert not self.ends[0].receiver.loans.out


def cache(world: StoreWorld, family: int = 0, prompt: int = PROMPT) -> None:
    """Computes and ends a request, whose blocks stay as prefix cache."""
    request_id = world.open(family, prompt, 0)
    world.compute(request_id, prompt + 1)
    world.release(request_id)
    world.check()


@pytest.fixture
def pair(tmp_path: Path, medium: str, seed: int = 3) -> Iterator[Pair]:
    sockets, memory = medium.endswith("tcp"), MemoryMedium()
    media: list[Medium] = [ZmqMedium() if sockets else memory for _ in range(2)]
    if medium.startswith("faulty"):
        media = [FaultyMedium(m, Random(seed + n), FAULTS) for n, m in enumerate(media)]
    with StoreWorld(tmp_path / "a") as there, StoreWorld(tmp_path / "b") as here:
        pair = Pair(there, here, Clock(virtual=not sockets), media)
        yield pair
        for end in pair.ends:
            end.close()
        pair.loop.close()


@each_medium
def test_a_prefix_is_found_in_another_store(pair: Pair) -> None:
    """Every complete block, verified row by row against its tokens; the second time it is here."""
    cache(pair.there)
    assert pair.open() == 256
    assert pair.open() == 256
    assert pair.caches.blocks_fetched == 4
    pair.settle()


@pytest.mark.parametrize("medium", ["faulty"])
def test_damage_on_the_way_is_counted(pair: Pair) -> None:
    """Of what was fetched: it is asked for again, and the operator can see that it was."""
    cache(pair.there)
    assert isinstance(pair.media[1], FaultyMedium)
    pair.media[1].faults = Faults(corrupt=0.3)
    keys = text(0).parents[1:5]
    for _ in range(10):
        blocks = pair.here.store.begin_fill(4, [])
        task = pair.loop.create_task(pair.caches.at(pair.addresses[:1]).load(keys, blocks))
        pair.pump(task.done)
        pair.here.store.end_fill([], blocks, [])
    assert pair.caches.corrupt > 0


@each_medium
def test_only_what_is_missing_is_fetched(pair: Pair) -> None:
    """A prefix that is here in part is completed from there."""
    cache(pair.there)
    cache(pair.here, prompt=130)
    assert pair.open() == 256
    assert pair.caches.blocks_fetched == 2
    pair.settle()


@each_medium
def test_a_miss_is_no_error(pair: Pair) -> None:
    """Another text, or another store that has nothing: the request is computed."""
    cache(pair.there, family=1)
    assert pair.open(family=0) == 0
    pair.settle()


@pytest.mark.parametrize("medium", ["memory", "tcp"])
def test_the_next_store_is_asked_for_the_rest(pair: Pair) -> None:
    """Stores are asked one after the other; one that is not there costs a second, once."""
    cache(pair.there)
    nobody = "nobody" if pair.clock.virtual else "tcp://127.0.0.1:9"
    began = pair.clock()
    assert pair.open(0, PROMPT, nobody, pair.addresses[0]) == 256
    assert 0.5 < pair.clock() - began < 2.5
    began = pair.clock()
    assert pair.open(1, PROMPT, nobody, pair.addresses[0]) == 0
    assert pair.clock() - began < 0.5
    pair.settle()


@pytest.mark.parametrize("medium", ["memory", "tcp"])
def test_a_store_that_falls_silent_costs_a_second_and_no_block(pair: Pair) -> None:
    """What had come until then is used; the loan ends by itself."""
    cache(pair.there)
    pair.silent = True
    began = pair.clock()
    assert pair.open() == 0
    assert pair.clock() - began < 2.0
    pair.settle()
    pair.clock.now += 2.0
    if pair.clock.virtual:
        assert pair.open() == 256


@pytest.mark.parametrize("medium", ["memory"])
def test_lent_blocks_are_not_evicted(pair: Pair) -> None:
    """While another store copies them they stay, however full the arena is; afterwards they go."""
    cache(pair.there)
    lending = Lending(pair.there.store)
    keys = text(0).parents[1:5]
    blocks = lending.borrow(keys)
    assert len(blocks) == 4
    state = pair.there.store.state
    filled = pair.there.store.begin_fill(1000, [])
    assert not set(filled) & set(blocks)
    pair.there.store.end_fill([], filled, [])
    for block in blocks:
        lending.give_back(block)
    filled = pair.there.store.begin_fill(1000, [])
    assert set(blocks) <= set(filled)
    pair.there.store.end_fill([], filled, [])
    state.check_invariants()


@pytest.mark.parametrize("medium", ["memory"])
def test_the_clock_is_looked_at_while_something_is_under_way(pair: Pair) -> None:
    """A loan, or an exchange with another store; else a store sleeps until a message comes."""
    cache(pair.there)
    lends, asks = pair.ends
    assert lends.wait_s == asks.wait_s == IDLE_S
    number = lends.receiver.loans.lend(Lending(pair.there.store).borrow(text(0).parents[1:5]), 0.0)
    assert lends.wait_s == TICK_S
    lends.receiver.loans.end(number)
    assert lends.wait_s == IDLE_S
    asks.client.begin(pair.addresses[0], KeyFetch(pair.here.store.arena, text(0).parents[1:2], [0]))
    assert asks.wait_s == TICK_S


@pytest.mark.parametrize("medium", ["memory"])
def test_a_block_that_is_damaged_there_is_not_lent(pair: Pair) -> None:
    """Its header tells before anything is sent; what comes before it is still of use."""
    cache(pair.there)
    store: KvStore = pair.there.store
    block = store.state.index.longest(text(0).parents[1:5])[2]
    store.arena.headers["row_crc"][block, 3] ^= 1
    assert pair.open() == 2 * PAGE_TOKENS
    pair.settle()


@pytest.mark.parametrize("medium", ["memory"])
def test_rows_that_are_damaged_there_never_verify_here(pair: Pair) -> None:
    """The other store's checksums travel with its rows: a bad row is found before it is used."""
    cache(pair.there)
    store: KvStore = pair.there.store
    block = store.state.index.longest(text(0).parents[1:5])[2]
    store.arena.page(block)[0, 0, 0, 7, 0] ^= 1
    with pytest.raises(Exception, match=r"blocks \[2\]"):
        pair.open()


@pytest.mark.parametrize("medium", ["memory"])
def test_a_request_that_is_given_up_leaves_nothing(pair: Pair) -> None:
    """Cancelled in the middle: the blocks that were to be filled are free, and not written any more."""
    cache(pair.there)
    keys = text(0).parents[1:5]
    blocks = pair.here.store.begin_fill(4, [])
    task = pair.loop.create_task(pair.caches.at(pair.addresses[:1]).load(keys, blocks))
    pair.pump(lambda: bool(pair.ends[0].receiver.loans.out))
    task.cancel()
    pair.pump(task.done)
    assert task.cancelled()
    pair.here.store.end_fill([], blocks, [])
    before = pair.here.store.arena._pages.copy()
    for _ in range(50):
        pair.turn()
    assert (pair.here.store.arena._pages == before).all()
    pair.settle()
