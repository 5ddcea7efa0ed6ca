"""What is known of a kv-store's requests and workers, and what must hold of its arena: every committed
row, every token and every cached block is what its stream's tokens say."""

from __future__ import annotations

from asyncio import Task
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from baton.v1 import store_pb2
from services.kv.arena import Arena
from services.kv.layout import PAGE_TOKENS, blocks_for
from services.kv.record import StreamRecord
from services.kv_store.runtime import KvStore
from services.kv_store.state import KvState
from tests.support import arenas
from tests.support.store_actors import (
    GROUPS,
    Decoding,
    Prefilling,
    Worker,
    places,
    text,
    tokens_of,
)
from tests.support.store_tiers import StoreTiers

STREAM_FIELDS = (
    "slot", "prompt_tokens", "max_new", "prefill_writer", "decode_writer", "keys", "prefill_table",
    "decode_table", "cached_blocks", "tail_source", "tail_rows", "table_epoch", "table_attempt",
)  # fmt: skip


@dataclass
class Session:
    """A worker at work on a request, until it says Stopped or dies."""

    worker: Worker
    request_id: str
    slot: int
    role: Prefilling | Decoding
    fenced: bool = False

    def __str__(self) -> str:
        mark = "fenced " if self.fenced else ""
        return f"{mark}{self.worker.name}/{self.worker.number} on {self.request_id} in {self.slot}"


@dataclass
class Asked:
    """What is known of an open request."""

    family: int
    prompt: int
    max_new: int
    prefill: Session
    decode: Session | None
    steps: int = 0
    first: bool = False
    published: bool = False


@dataclass
class StoreBooks:
    """One store, its workers and its requests."""

    directory: Path
    one_class: bool = True
    disk_blocks: int = 0  # with a disk tier of so many blocks below the arena
    store: KvStore = field(init=False)
    tiers: StoreTiers | None = None
    arena: Arena = field(init=False)
    workers: dict[str, Worker] = field(default_factory=dict)
    asked: dict[str, Asked] = field(default_factory=dict)
    sessions: list[Session] = field(default_factory=list)
    opening: list[tuple[Task[Any], store_pb2.OpenStreamRequest, int]] = field(default_factory=list)
    now: float = 1000.0  # the store's clock, in seconds
    lease_now: float = 0.0  # without the time in which the store was stopped
    renewed: dict[str, float] = field(default_factory=dict)  # request -> when, in `lease_now`
    pins: dict[str, list[bytes]] = field(default_factory=dict)
    kept: set[bytes] = field(default_factory=set)  # pinned keys that have been seen in the cache
    epoch: int = 10
    opened: int = 0

    def check(self) -> None:
        state = self.store.state
        state.check_invariants()
        self.store.leases.check_invariants(state.streams)
        self._check_pins()
        if self.tiers:
            self.tiers.disk.index.check_invariants()
            files = {path.stem for path in self.tiers.disk.files.directory.glob("*.kv")}
            assert {key.hex() for key in self.tiers.disk.index.keys} <= files
        owners: dict[int, Session] = {}
        for session in self.sessions:
            for block in session.role.blocks():
                other = owners.setdefault(block, session)
                assert other is session, f"block {block} has two writers: {other}, {session}"
                assert block not in state.pool.free, f"block {block} is free, {session} may write"
                assert block not in state.index, f"block {block} of {session} can be found"
            stream = state.streams.get(session.request_id)
            mine = stream is not None and stream.slot == session.slot
            assert mine or session.slot in state.resting_slots, f"the slot of {session} is free"
        for request_id, asked in self.asked.items():
            self._check_rows(request_id, asked)
        for stream in state.streams.values():
            assert len(set(stream.prefill_table)) == len(stream.prefill_table)
            assert len(set(stream.decode_table)) == len(stream.decode_table)
        for key, block in state.index.blocks.items():
            assert key in places(), f"block {block} is cached under a key of nobody's"
            family, at = places()[key]
            self.whole(block, family, at * PAGE_TOKENS, (at + 1) * PAGE_TOKENS)

    def _check_pins(self) -> None:
        """What was cached and is pinned is still cached."""
        pinned = {key for keys in self.pins.values() for key in keys}
        cached = set(self.store.state.index.blocks)
        assert self.kept & pinned <= cached, "a pinned block was evicted"
        self.kept = pinned & cached
        assert {n: list(k) for n, k in self.store.state.pins.names.items()} == self.pins

    def _check_rows(self, request_id: str, asked: Asked) -> None:
        """All that is committed lies where the next reader looks for it."""
        stream = self.store.state.streams[request_id]
        record = StreamRecord(self.arena, stream.slot)
        assert record.text("request_id") == request_id
        known = asked.prompt + (asked.steps + 1 if asked.first else 0)
        same = record.tokens[:known] == tokens_of(asked.family, known)
        assert same.all(), f"{request_id}: token {int(np.argmin(same))} has been overwritten"
        ready = record.ready_tokens()
        for at in range(blocks_for(ready)):
            end = min(ready, (at + 1) * PAGE_TOKENS)
            self.whole(stream.prefill_table[at], asked.family, at * PAGE_TOKENS, end)
        if not asked.max_new or not asked.first:
            return
        tokens = asked.prompt + asked.steps
        for at in range(asked.prompt // PAGE_TOKENS, tokens // PAGE_TOKENS):
            end = (at + 1) * PAGE_TOKENS
            self.whole(stream.decode_table[at], asked.family, at * PAGE_TOKENS, end)
        if tokens % PAGE_TOKENS:
            attached = record.attached_epoch() >= stream.table_epoch
            tail = stream.decode_table[tokens // PAGE_TOKENS] if attached else stream.tail_source
            assert tail is not None, f"{request_id}: nobody knows where the open tail lies"
            self.whole(tail, asked.family, tokens - tokens % PAGE_TOKENS, tokens)

    def whole(self, block: int, family: int, begin: int, end: int) -> None:
        """Rows [begin, end) of the family's text lie in this block, in every group."""
        for group in GROUPS:
            page, seeds = self.arena.page_id(block, group), text(family).seeds[begin:end]
            bad = arenas.bad_row(self.arena, page, seeds, group, begin % PAGE_TOKENS)
            assert bad == -1, f"block {block}, group {group}: row {bad} is not what was written"

    def same(self, lost: KvState, found: KvState) -> None:
        """A rebuilt state is the lost one, as far as it can still matter."""
        alive = {w.id for w in self.workers.values() if w.alive}
        assert set(found.streams) == set(lost.streams)
        for request_id, stream in lost.streams.items():
            other = found.streams[request_id]
            record = StreamRecord(self.arena, stream.slot)
            assert (other.epoch, other.attempt) == (record.commit()[0], record.first()[0])
            assert other.epoch >= stream.epoch
            assert other.attempt >= stream.attempt
            for name in STREAM_FIELDS:
                assert getattr(other, name) == getattr(stream, name), f"{request_id}.{name}"
            blocks = (set(other.blocks()), set(stream.blocks()))
            assert blocks[0] == blocks[1], f"{request_id}: has {blocks[0]}, had {blocks[1]}"
            fenced = tuple(
                {w: e for w, e in f.items() if w in alive} for f in (other.fenced, stream.fenced)
            )
            assert fenced[0] == fenced[1], f"{request_id}: fenced are {fenced[0]}, were {fenced[1]}"
        assert found.pool.free == lost.pool.free, "free blocks"
        rest = (held_back(found, alive), held_back(lost, alive))
        assert rest[0] == rest[1], f"quarantine is {rest[0]}, was {rest[1]}"
        rest = (waiting(found, alive), waiting(lost, alive))
        assert rest[0] == rest[1], f"slots rest for {rest[0]}, did for {rest[1]}"
        for key, block in lost.index.blocks.items():
            assert key in found.index.blocks, f"block {block} was cached"  # or its equal
        for session in self.sessions:
            for block in session.role.blocks() & set(found.pool.leases):
                writer = found.pool.writers.get(block)
                assert writer == session.worker.id, f"block {block}: writer {writer}, not {session}"

    def check_empty(self) -> None:
        pool = self.store.state.pool
        assert not pool.quarantined
        assert not self.store.state.resting_slots
        assert not self.store.state.copying
        assert not self.store.state.filling
        assert len(pool.free) + self.store.state.evictable() == pool.total
        assert set(pool.leases) == set(self.store.state.index.keys)


def held_back(state: KvState, alive: set[str]) -> dict[int, Any]:
    """Which blocks are in quarantine, and for whom; for the dead it is over at the next sweep."""
    held = state.pool.quarantined.items()
    return {block: why if why.writer in alive else why.writer for block, why in held}


def waiting(state: KvState, alive: set[str]) -> dict[int, dict[tuple[str, str], int]]:
    """Which slots rest for whom, the dead left out."""
    resting = {
        slot: {pair: since for pair, since in pairs.items() if pair[1] in alive}
        for slot, pairs in state.resting_slots.items()
    }
    return {slot: pairs for slot, pairs in resting.items() if pairs}
