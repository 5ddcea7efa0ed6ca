"""A kv-store with its arena, real lock files, and workers that write real rows into real pages.

As in `kv_world`, the world keeps its own books. Here it also plays the workers, the fenced ones that
wake up included, and looks at the bytes: every committed row, every token and every cached block must
be what its stream's tokens say. All requests of one family have the same endless text, so any worker
that computes a position computes the same.
"""

from __future__ import annotations

from asyncio import Task
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from baton.v1 import control_pb2, store_pb2
from services.decode.stream import DecodeStream
from services.kv.arena import Arena
from services.kv.layout import PAGE_TOKENS, blocks_for
from services.kv.record import StreamRecord
from services.kv_store.runtime import KvStore
from services.kv_store.state import KvState
from services.ops.errors import Overloaded, StaleEpoch
from tests.support import arenas
from tests.support.store_actors import (
    GROUPS,
    Decoding,
    Prefilling,
    Worker,
    end_store,
    new_store,
    places,
    text,
    tokens_of,
)
from tests.support.store_tiers import StoreTiers


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
class StoreWorld:
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

    def __post_init__(self) -> None:
        self._start_store()
        self.arena = Arena(self.directory)

    def _start_store(self) -> None:
        self.store = new_store(self.directory, clock=lambda: self.now, one_class=self.one_class)
        self.renewed |= dict.fromkeys(self.store.state.streams, self.lease_now)
        if self.disk_blocks:
            self.tiers = StoreTiers(self.store, self.directory / "disk", self.disk_blocks)

    def _end_store(self) -> None:
        self.opening.clear()
        if self.tiers:
            self.tiers.die()
        end_store(self.store)

    def close(self) -> None:
        for worker in self.workers.values():
            worker.die()
        self._end_store()

    def __enter__(self) -> StoreWorld:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- who is there ---

    def worker(self, name: str) -> Worker:
        """The living worker of this name; one that has died is followed by another."""
        if name not in self.workers or not self.workers[name].alive:
            number = 1 + max((w.number for w in self.workers.values()), default=0)
            gone = self.workers.pop(name, None)
            if gone:
                self.workers[f"{name}/{gone.number}"] = gone
            self.workers[name] = Worker(name, number, self.directory)
        return self.workers[name]

    def next_epoch(self) -> int:
        self.epoch += 1
        return self.epoch

    def _begin(
        self, worker: Worker, request_id: str, slot: int, role: Prefilling | Decoding
    ) -> Session:
        session = Session(worker, request_id, slot, role)
        if worker.alive:
            self.sessions.append(session)
        return session

    def _by_id(self, worker_id: str) -> Worker:
        return next(w for w in self.workers.values() if w.id == worker_id)

    def _end(self, session: Session | None) -> None:
        if session is not None:
            self.sessions = [s for s in self.sessions if s is not session]

    def present(self, session: Session | None) -> bool:
        return any(s is session for s in self.sessions)

    def zombies(self) -> list[Session]:
        return [s for s in self.sessions if s.fenced]

    # --- what happens ---

    def open(
        self, family: int, prompt: int, max_new: int, prefill: str = "p0", decode: str = "d0"
    ) -> str:
        """The new request's id. Raises Overloaded."""
        request = self.wish(family, prompt, max_new, prefill, decode)
        reply = self.tiers.open(request) if self.tiers else self.store.open(request)
        self._opened(request, reply, family)
        return str(request.request_id)

    def begin_open(
        self, family: int, prompt: int, max_new: int, prefill: str = "p0", decode: str = "d0"
    ) -> None:
        """Asks for a stream, which is opened once its prefix has come from disk."""
        assert self.tiers
        request = self.wish(family, prompt, max_new, prefill, decode)
        self.opening.append((self.tiers.begin_open(request), request, family))
        self.arrive()

    def arrive(self) -> None:
        """What has been opened meanwhile, or refused for lack of room, is known."""
        done = [entry for entry in self.opening if entry[0].done()]
        self.opening = [entry for entry in self.opening if not entry[0].done()]
        for task, request, family in done:
            if not isinstance(task.exception(), Overloaded):
                self._opened(request, task.result(), family)

    def _opened(
        self, request: store_pb2.OpenStreamRequest, reply: store_pb2.OpenStreamResponse,
        family: int,
    ) -> None:  # fmt: skip
        """Its workers begin, those that are still there."""
        request_id, prompt = str(request.request_id), len(request.token_ids)
        self.renewed[request_id] = self.lease_now
        max_new = request.max_new_tokens
        role = Prefilling(self.arena, reply.slot, family, prompt, request.attempt)
        assert role.at == reply.cached_tokens
        self.asked[request_id] = Asked(
            family, prompt, max_new,
            self._begin(self._by_id(request.prefill_writer), request_id, reply.slot, role), None,
        )  # fmt: skip
        if max_new:
            decode = self._by_id(request.decode_writer)
            self._prepare(request_id, decode, reply.slot, request.epoch)

    def wish(
        self, family: int, prompt: int, max_new: int, prefill: str = "p0", decode: str = "d0"
    ) -> store_pb2.OpenStreamRequest:
        """What its store is told of a new request."""
        self.opened += 1
        return store_pb2.OpenStreamRequest(
            request_id=f"r{self.opened}", token_ids=tokens_of(family, prompt).tolist(),
            max_new_tokens=max_new, epoch=self.next_epoch(), attempt=self.next_epoch(),
            prefill_writer=self.worker(prefill).id,
            decode_writer=self.worker(decode).id if max_new else "",
        )  # fmt: skip

    def _prepare(self, request_id: str, worker: Worker, slot: int, epoch: int) -> None:
        asked, stream = self.asked[request_id], self.store.state.streams[request_id]
        command = control_pb2.PrepareDecode(
            request_id=request_id, slot=slot, epoch=epoch,
            sampling=control_pb2.ResolvedSampling(max_tokens=asked.max_new, top_p=1.0),
        )  # fmt: skip
        own = stream.decode_table[(asked.prompt + asked.steps) // PAGE_TOKENS :]
        decoding = Decoding(DecodeStream(command, self.arena), asked.family, left=set(own))
        asked.decode = self._begin(worker, request_id, slot, decoding)

    def compute(self, request_id: str, upto: int) -> None:
        """Prefill goes on; past the prompt's end it samples the first token."""
        asked = self.asked[request_id]
        role = asked.prefill.role
        assert isinstance(role, Prefilling)
        if asked.first or asked.prefill.fenced or not self.present(asked.prefill):
            return
        assert role.compute(upto), "the present prefill has been fenced"
        if upto > asked.prompt:
            assert role.first(), "the present prefill has been fenced"
            asked.first = True

    def decode(self, request_id: str, steps: int) -> None:
        asked = self.asked[request_id]
        if not asked.decode or not self.present(asked.decode) or asked.decode.fenced:
            return
        role = asked.decode.role
        assert isinstance(role, Decoding)
        if not role.attach():
            return
        for _ in range(min(steps, asked.max_new - 1 - asked.steps)):
            assert role.step(), "the present decode has been fenced"
            asked.steps += 1
        assert role.stream.steps == asked.steps

    def move_decode(self, request_id: str, name: str) -> None:
        """Raises Overloaded; then nobody has been fenced."""
        asked, epoch = self.asked[request_id], self.next_epoch()
        with self._fenced(asked.decode):
            reply = self.store.reassign(
                store_pb2.ReassignRequest(
                    request_id=request_id, role=store_pb2.WRITER_ROLE_DECODE, epoch=epoch,
                    writer=self.worker(name).id,
                )
            )  # fmt: skip
        assert reply.committed == asked.steps
        self._prepare(request_id, self.worker(name), reply.slot, epoch)

    @contextmanager
    def _fenced(self, session: Session | None) -> Iterator[None]:
        """What happens inside fences it, unless there is no room."""
        before = session.fenced if session else False
        if session:
            session.fenced = True
        try:
            yield
        except Overloaded:
            if session:
                session.fenced = before
            raise

    def move_prefill(self, request_id: str, name: str) -> None:
        """Raises Overloaded; then nobody has been fenced."""
        asked, attempt = self.asked[request_id], self.next_epoch()
        with self._fenced(None if asked.first else asked.prefill):  # a finished one stays as it is
            reply = self.store.reassign(
                store_pb2.ReassignRequest(
                    request_id=request_id, role=store_pb2.WRITER_ROLE_PREFILL, epoch=attempt,
                    writer=self.worker(name).id,
                )
            )  # fmt: skip
        if asked.first:
            return
        role = Prefilling(self.arena, reply.slot, asked.family, asked.prompt, attempt)
        assert role.at == reply.committed
        asked.prefill = self._begin(self.worker(name), request_id, reply.slot, role)

    def publish(self, request_id: str) -> None:
        asked = self.asked[request_id]
        if asked.first:
            self._end(asked.prefill)
            self.store.publish(request_id)
            asked.published = True

    def release(self, request_id: str, *, keep: bool = True, stopped: bool = True) -> None:
        """As the scheduler does: it lists those of the present workers that have not stopped."""
        self.store.release(self.forget(request_id, keep=keep, stopped=stopped))

    def forget(
        self, request_id: str, *, keep: bool = True, stopped: bool = True
    ) -> store_pb2.ReleaseRequest:
        """The request is no longer asked for; what its store is to be told."""
        asked = self.asked.pop(request_id)
        present = [s for s in (asked.prefill, asked.decode) if s is not None]
        for session in present:
            if stopped and not session.fenced:
                self._end(session)
            session.fenced = True
        live = [s.worker.id for s in present if self.present(s)]
        return store_pb2.ReleaseRequest(request_id=request_id, keep_blocks=keep, live_writers=live)

    def invalidate(self, request_id: str, block: int) -> None:
        self.store.invalidate(request_id, [block])

    def stops(self, session: Session) -> None:
        """Its worker says Stopped for this request: for all that it had been fenced from."""
        said = (session.request_id, session.worker.id)
        for other in self.zombies():
            if (other.request_id, other.worker.id) == said:
                self._end(other)
        self.store.sweep(said)

    def dies(self, worker: Worker) -> None:
        worker.die()
        self.sessions = [s for s in self.sessions if s.worker is not worker]

    def wakes(self, session: Session) -> None:
        """A fenced worker goes on as if nothing had happened: it writes one row or one token where it
        thinks that it may, and is told that it may not."""
        role = session.role
        if isinstance(role, Decoding):
            try:
                went_on = (
                    role.attach() and role.stream.steps < role.stream.max_new - 1 and role.step()
                )
            except StaleEpoch:
                went_on = False
        else:
            went_on = role.at < role.prompt and role.compute(role.at + 1)
            went_on = went_on or role.first()
        assert not went_on, f"{session} has been fenced and went on"

    def passes(self, seconds: float) -> None:
        """Time, in which the store looks at the clock every eighth of a second."""
        for _ in range(round(seconds * 8)):
            self.now += 0.125
            self.lease_now += 0.125
            self.store.sweep()
        gone = [r for r in self.asked if self.lease_now - self.renewed[r] >= LEASE_S]
        for request_id in gone:
            self.forget(request_id, stopped=False)
        assert set(self.store.state.streams) == set(self.asked), "leases"

    def stands_still(self, seconds: float) -> None:
        """The store is stopped for so long: no lease runs meanwhile, but for a first moment."""
        self.now += seconds
        self.lease_now += min(seconds, LEASE_S / 8)
        self.store.sweep()
        self.passes(0)

    def renew(self) -> None:
        """The scheduler is there, and wants all it has asked for."""
        assert self.store.renew([*self.asked, "nobody's"]) == ["nobody's"]
        self.renewed |= dict.fromkeys(self.asked, self.lease_now)

    def pin(self, name: str, family: int, blocks: int) -> None:
        """Raises Overloaded."""
        tokens = tokens_of(family, blocks * PAGE_TOKENS).tolist()
        request = store_pb2.PinRequest(name=name, token_ids=tokens)
        self.pins[name] = self.store.pin(request)

    def unpin(self, name: str) -> None:
        assert self.store.unpin(name) == (self.pins.pop(name, None) is not None)

    def _check_pins(self) -> None:
        """What was cached and is pinned is still cached."""
        pinned = {key for keys in self.pins.values() for key in keys}
        cached = set(self.store.state.index.blocks)
        assert self.kept & pinned <= cached, "a pinned block was evicted"
        self.kept = pinned & cached
        assert {n: list(k) for n, k in self.store.state.pins.names.items()} == self.pins

    def restart(self) -> None:
        """The store dies and starts again; what it knows must be what it knew."""
        lost = self.store.state
        self.begin_anew()
        self.same(lost, self.store.state)

    def begin_anew(self) -> None:
        self._end_store()
        self._start_store()

    def begin_from_nothing(self) -> None:
        """The machine starts again: the arena is gone, and so is everybody."""
        for worker in self.workers.values():
            self.dies(worker)
        self._end_store()
        self.asked.clear()
        self.kept.clear()
        (self.directory / "arena").unlink()
        self._start_store()
        self.arena = Arena(self.directory)

    # --- what must hold ---

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

    def end(self) -> None:
        """Everything is released and everybody goes: nothing is left but the cache."""
        for name in list(self.pins):
            self.unpin(name)
        for request_id in list(self.asked):
            self.release(request_id, stopped=False)
            self.check()
        if self.tiers:
            self.tiers.settle()
            self.arrive()
            assert not self.opening
        for request_id in list(self.asked):
            self.release(request_id, stopped=False)
        self.store.reconcile([])
        for worker in self.workers.values():
            self.dies(worker)
        self.store.sweep()
        self.check()
        self.check_empty()


LEASE_S = 10.0
STREAM_FIELDS = (
    "slot", "prompt_tokens", "max_new", "prefill_writer", "decode_writer", "keys", "prefill_table",
    "decode_table", "cached_blocks", "tail_source", "tail_rows", "table_epoch", "table_attempt",
)  # fmt: skip


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
