"""A store's state and, beside it, the world it has to be right about: who is alive, who may still
write where, what each block really holds.

The world keeps its own books and shares no code with the store. A *session* is one worker at work on
one request under one epoch. It goes on after it has been fenced, as a paused process would, until the
worker says Stopped or dies.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from services.kv.layout import PAGE_TOKENS, blocks_for
from services.kv_store.index import PrefixIndex
from services.kv_store.pool import BlockPool
from services.kv_store.state import KvState, Stream
from services.ops.errors import Overloaded

BLOCKS, SLOTS = 14, 4


def key_of(family: int, block: int) -> bytes:
    """Requests of one family share their tokens as far as both go."""
    return bytes([family, block])


@dataclass
class Session:
    """A worker that may write: `blocks` until it has stopped or died, and the record in `slot`."""

    worker: str
    request_id: str
    slot: int
    blocks: set[int]
    fenced: bool = False


@dataclass
class Asked:
    """What is known of an open request."""

    family: int
    prompt: int
    max_new: int
    prefill: Session
    decode: Session | None
    ready: int  # prompt tokens announced in every layer group
    tail: tuple[int, int] | None  # (block, rows) where the open tail's committed rows lie
    first: bool = False
    attached: bool = False
    steps: int = 0

    @property
    def tokens(self) -> int:
        return self.prompt + self.steps


@dataclass
class World:
    """Does things to the store as a cluster would, and knows what must come of it."""

    state: KvState = field(default_factory=lambda: KvState(BlockPool(BLOCKS), PrefixIndex(), SLOTS))
    asked: dict[str, Asked] = field(default_factory=dict)
    sessions: list[Session] = field(default_factory=list)
    dead: set[str] = field(default_factory=set)
    cached: dict[bytes, int] = field(default_factory=dict)
    epoch: int = 0

    # --- what is true ---

    def alive(self, worker: str) -> bool:
        return bool(worker) and worker not in self.dead

    def at_work(self, request_id: str) -> set[str]:
        return {s.worker for s in self.sessions if s.request_id == request_id}

    def next_epoch(self) -> int:
        self.epoch += 1
        return self.epoch

    def _begin(self, worker: str, request_id: str, slot: int, blocks: list[int]) -> Session:
        session = Session(worker, request_id, slot, set(blocks))
        if self.alive(worker):
            self.sessions.append(session)
        return session

    def _end(self, session: Session | None) -> None:
        if session in self.sessions:
            self.sessions.remove(session)

    def computing(self) -> list[str]:
        """Requests whose prefill has not finished."""
        return sorted(r for r, asked in self.asked.items() if not asked.first)

    def decodable(self) -> list[str]:
        """Requests that have, or wait for, a decode."""
        return sorted(r for r, asked in self.asked.items() if asked.max_new)

    def zombies(self) -> list[tuple[str, str]]:
        """(worker, request) of everybody who may still write and should not."""
        return sorted({(s.worker, s.request_id) for s in self.sessions if s.fenced})

    # --- what happens ---

    def open(
        self, request_id: str, family: int, prompt: int, max_new: int, prefill: str, decode: str,
        bypass: bool,
    ) -> bool:  # fmt: skip
        """False when there was no room; then nothing may have changed."""
        keys = [key_of(family, block) for block in range(prompt // PAGE_TOKENS)]
        held = {block for stream in self.state.streams.values() for block in stream.blocks()}
        before = self._snapshot()
        try:
            stream, evicted = self.state.open(
                request_id, keys=keys, prompt_tokens=prompt, max_new=max_new,
                epoch=self.next_epoch(), attempt=self.next_epoch(), prefill_writer=prefill,
                decode_writer=decode if max_new else "", bypass_cache=bypass,
            )  # fmt: skip
        except Overloaded:
            assert self._snapshot() == before, "Overloaded has changed the state"
            return False
        hit = 0
        while not bypass and hit < (prompt - 1) // PAGE_TOKENS and keys[hit] in self.cached:
            hit += 1
        assert stream.prefill_table[:hit] == [self.cached[key] for key in keys[:hit]]
        assert stream.cached_blocks == hit, "not the longest cached prefix"
        assert not set(evicted) & held, "a held block was evicted"
        self._evicted(set(evicted))
        tail = prompt // PAGE_TOKENS
        self.asked[request_id] = Asked(
            family, prompt, max_new,
            self._begin(prefill, request_id, stream.slot, stream.prefill_table[hit:]),
            self._begin(decode, request_id, stream.slot, stream.decode_table[tail:])
            if max_new else None,
            hit * PAGE_TOKENS,
            (stream.prefill_table[tail], prompt % PAGE_TOKENS) if prompt % PAGE_TOKENS else None,
        )  # fmt: skip
        return True

    def compute(self, request_id: str, tokens: int) -> None:
        """Prefill comes as far as `tokens`; with one more it has sampled the first one."""
        asked = self.asked[request_id]
        if asked.prefill not in self.sessions or asked.first:
            return
        asked.ready = max(asked.ready, min(tokens, asked.prompt))
        done = self.state.streams[request_id].prefill_table[: asked.ready // PAGE_TOKENS]
        asked.prefill.blocks -= set(done)
        asked.first = tokens > asked.prompt

    def decode(self, request_id: str, steps: int) -> None:
        """Decode attaches, which copies the tail into its own first block, and commits."""
        asked = self.asked[request_id]
        if asked.decode not in self.sessions or not asked.first:
            return
        stream = self.state.streams[request_id]
        table = stream.decode_table
        if not asked.attached:
            rows = asked.tokens % PAGE_TOKENS
            found = (stream.tail_source, stream.tail_rows) if rows else None
            assert found == asked.tail, "the copy does not begin with the committed rows"
            assert rows == stream.tail_rows
        asked.attached = True
        asked.steps = max(asked.steps, min(asked.steps + steps, asked.max_new - 1))
        block, rows = divmod(asked.tokens, PAGE_TOKENS)
        asked.tail = (table[block], rows) if rows else None
        assert asked.decode is not None
        asked.decode.blocks = set(table[block:])

    def move_decode(self, request_id: str, worker: str) -> bool:
        """Another decode takes over. False when there was no room."""
        asked, stream = self.asked[request_id], self.state.streams[request_id]
        complete = stream.decode_table[: asked.tokens // PAGE_TOKENS]
        before, epoch = self._snapshot(), self.next_epoch()
        try:
            self.state.reassign_decode(
                request_id, epoch=epoch, writer=worker, committed=asked.steps,
                attached=asked.attached, may_write=self.alive,
            )  # fmt: skip
        except Overloaded:
            assert self._snapshot() == before, "Overloaded has changed the state"
            return False
        assert (stream.epoch, stream.decode_writer) == (epoch, worker)
        assert stream.decode_table[: len(complete)] == complete, "complete blocks have moved"
        if asked.decode:
            asked.decode.fenced = True
        fresh = stream.decode_table[len(complete) :]
        asked.decode = self._begin(worker, request_id, stream.slot, fresh)
        asked.attached = False
        self._evicted(set(fresh))
        return True

    def move_prefill(self, request_id: str, worker: str) -> bool:
        """Another prefill goes on where the record says. False when there was no room."""
        asked, stream = self.asked[request_id], self.state.streams[request_id]
        start = self.state.restart_at(stream, asked.ready)
        assert start <= asked.ready
        assert start < asked.prompt, "the last token is always computed"
        before, keep = self._snapshot(), stream.prefill_table[: start // PAGE_TOKENS]
        try:
            self.state.reassign_prefill(
                request_id, attempt=self.next_epoch(), writer=worker, start=start,
                may_write=self.alive,
            )  # fmt: skip
        except Overloaded:
            assert self._snapshot() == before, "Overloaded has changed the state"
            return False
        assert stream.prefill_table[: len(keep)] == keep, "computed blocks have moved"
        asked.prefill.fenced = True
        fresh = stream.prefill_table[len(keep) :]
        asked.prefill = self._begin(worker, request_id, stream.slot, fresh)
        asked.ready = start
        if asked.tail:
            asked.tail = (stream.prefill_table[-1], asked.tail[1])
        self._evicted(set(fresh))
        return True

    def publish(self, request_id: str) -> None:
        """The prefill has left: the prompt's complete blocks can be found."""
        asked = self.asked[request_id]
        if not asked.first:
            return
        self._end(asked.prefill)
        stream = self.state.streams[request_id]
        added = self.state.publish(request_id, asked.ready)
        assert added == self._cache(asked, stream.prefill_table, asked.prompt)

    def release(self, request_id: str, keep: bool, stopped: bool) -> None:
        """The request ends; with `stopped` its present workers have left it already."""
        asked = self.asked.pop(request_id)
        stream = self.state.streams[request_id]
        if stopped:
            self._end(asked.prefill)
            self._end(asked.decode)
        tokens = asked.tokens if asked.max_new and asked.first else asked.ready
        keys = [key_of(asked.family, b) for b in range(tokens // PAGE_TOKENS)] if keep else []
        at_work = self.at_work(request_id)
        self.state.release(request_id, keys=keys, may_write=lambda worker: worker in at_work)
        if keep:
            table = stream.decode_table if asked.max_new else stream.prefill_table
            self._cache(asked, table, tokens)
        for session in (asked.prefill, asked.decode):
            if session:
                session.fenced = True

    def invalidate(self, request_id: str, at: int) -> None:
        """A block of this request failed verification."""
        blocks = self.state.streams[request_id].prefill_table[at : at + 1]
        self.state.invalidate(blocks)
        self._evicted(set(blocks))

    def stops(self, worker: str, request_id: str) -> None:
        """The worker has left what it was fenced from."""
        for session in list(self.sessions):
            if session.fenced and (session.worker, session.request_id) == (worker, request_id):
                self._end(session)
        self.state.sweep(self.alive, (request_id, worker))

    def dies(self, worker: str) -> None:
        self.dead.add(worker)
        self.sessions = [s for s in self.sessions if s.worker != worker]

    def sweep(self) -> None:
        self.state.sweep(self.alive)

    # --- what must hold ---

    def check(self) -> None:
        self.state.check_invariants()
        pool = self.state.pool
        writable: dict[int, Session] = {}
        for session in self.sessions:
            for block in session.blocks:
                other = writable.setdefault(block, session)
                assert other is session, f"block {block} has two writers: {other}, {session}"
                assert block not in pool.free, f"block {block} is free while {session} may write"
                assert block not in self.state.index, f"block {block} of {session} can be found"
        for session in self.sessions:
            present = self.state.streams.get(session.request_id)
            mine = present and present.slot == session.slot
            assert mine or session.slot in self.state.resting_slots, f"the slot of {session}"
        for request_id, asked in self.asked.items():
            self._check_stream(asked, self.state.streams[request_id])
        assert self.state.index.blocks == self.cached, "the cache is not what was put in"

    def _check_stream(self, asked: Asked, stream: Stream) -> None:
        shared = asked.prompt // PAGE_TOKENS
        assert len(stream.prefill_table) == blocks_for(asked.prompt)
        assert stream.prefill_table[:shared] == stream.decode_table[:shared]
        last = asked.prompt + asked.max_new - 1 if asked.max_new else shared * PAGE_TOKENS
        assert len(stream.decode_table) == blocks_for(last), "no room for every step"
        assert len(set(stream.decode_table)) == len(stream.decode_table)
        if asked.tail and asked.max_new:
            assert asked.tail[0] in stream.blocks(), "the committed rows of the tail are given away"
            if not asked.attached:
                assert (stream.tail_source, stream.tail_rows) == asked.tail

    def check_empty(self) -> None:
        """Everybody has gone: every block is free or cached, every slot can be used."""
        pool = self.state.pool
        assert not pool.quarantined
        assert not pool.writers
        assert not self.state.resting_slots
        assert len(pool.free) + self.state.evictable() == pool.total
        assert set(pool.leases) == set(self.cached.values())

    # --- books ---

    def _cache(self, asked: Asked, table: list[int], tokens: int) -> list[tuple[int, bytes]]:
        """The first block of a key stays; a block that has a key already keeps it."""
        added = []
        for at, block in enumerate(table[: tokens // PAGE_TOKENS]):
            key = key_of(asked.family, at)
            if key not in self.cached and block not in self.cached.values():
                self.cached[key] = block
                added.append((block, key))
        return added

    def _evicted(self, blocks: set[int]) -> None:
        self.cached = {key: block for key, block in self.cached.items() if block not in blocks}

    def _snapshot(self) -> object:
        """All that `Overloaded` must leave alone: the order of use may change."""
        pool = copy.deepcopy(self.state.pool)
        return (
            pool.free, pool.leases, pool.writers, pool.quarantined,
            dict(self.state.index.blocks), copy.deepcopy(self.state.streams),
            copy.deepcopy(self.state.resting_slots),
        )  # fmt: skip


PREFILLS, DECODES = ("p0", "p1", "p2"), ("d0", "d1", "d2", "d3")
PROMPTS = (1, 63, 64, 65, 127, 128, 129, 192, 200, 256)
Choose = Callable[[Sequence[Any]], Any]


@dataclass
class Walk:
    """A world that goes from one possible event to the next; `choose` takes every decision."""

    world: World = field(default_factory=World)
    opened: int = 0
    story: list[str] = field(default_factory=list)

    def step(self, choose: Choose) -> None:
        """One event, and all that must hold after it."""
        act = choose(self.acts())
        chosen: list[str] = [act.__name__]
        self.story.append(act.__name__)

        def noting(options: Sequence[Any]) -> Any:
            chosen.append(str(choice := choose(options)))
            self.story[-1] = " ".join(chosen)
            return choice

        act(noting)
        self.world.check()

    def end(self) -> None:
        """Everything is released and everybody goes."""
        for request_id in list(self.world.asked):
            self.world.release(request_id, keep=True, stopped=False)
            self.world.check()
        for worker in (*PREFILLS, *DECODES):
            self.world.dies(worker)
        self.world.sweep()
        self.world.check()
        self.world.check_empty()

    def acts(self) -> list[Callable[[Choose], None]]:
        """What can happen now; twice what should happen more often."""
        acts: list[Callable[[Choose], None]] = [self.sweep]
        if len(self.world.asked) < 4:
            acts += [self.open] * 2
        if self.world.asked:
            acts += [self.publish, self.release, self.invalidate]
        if self.world.computing():
            acts += [self.compute] * 2 + [self.move_prefill]
        if self.world.decodable():
            acts += [self.decode, self.move_decode] * 2
        if self.world.zombies():
            acts += [self.stops]
        return acts

    def open(self, choose: Choose) -> None:
        """Sometimes an id again that a fenced worker still has something to do with."""
        self.opened += 1
        old = sorted({r for _, r in self.world.zombies()} - set(self.world.asked))
        self.world.open(
            choose([f"r{self.opened}", *old]), choose([0, 0, 0, 1]), choose(PROMPTS),
            choose([0, 1, 2, 64, 65, 130]), choose(PREFILLS), choose(DECODES),
            choose([False, False, False, True]),
        )  # fmt: skip

    def compute(self, choose: Choose) -> None:
        self.world.compute(choose(self.world.computing()), choose([64, 128, 192, 256, 257]))

    def decode(self, choose: Choose) -> None:
        request_id = choose(self.world.decodable())
        self.world.compute(request_id, 257)
        self.world.decode(request_id, choose([0, 1, 5, 63, 64, 65, 130]))

    def move_decode(self, choose: Choose) -> None:
        request_id = choose(self.world.decodable())
        present = self.world.asked[request_id].decode
        if present and len(self.world.dead) < 2 and choose([True, False]):
            self.world.dies(present.worker)
        self.world.move_decode(request_id, choose(DECODES))

    def move_prefill(self, choose: Choose) -> None:
        request_id = choose(self.world.computing())
        if not self.world.dead & set(PREFILLS) and choose([True, False]):
            self.world.dies(self.world.asked[request_id].prefill.worker)
        self.world.move_prefill(request_id, choose(PREFILLS))

    def publish(self, choose: Choose) -> None:
        self.world.publish(choose(sorted(self.world.asked)))

    def release(self, choose: Choose) -> None:
        request_id = choose(sorted(self.world.asked))
        self.world.release(request_id, choose([True, True, False]), choose([True, False]))

    def invalidate(self, choose: Choose) -> None:
        request_id = choose(sorted(self.world.asked))
        self.world.invalidate(request_id, choose([0, 1]))

    def stops(self, choose: Choose) -> None:
        self.world.stops(*choose(self.world.zombies()))

    def sweep(self, choose: Choose) -> None:
        self.world.sweep()
