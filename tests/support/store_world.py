"""A kv-store with its arena, real lock files, and workers that write real rows into real pages.

As in `kv_world`, the world keeps its own books. Here it also plays the workers, the fenced ones that
wake up included, and looks at the bytes: every committed row, every token and every cached block must
be what its stream's tokens say. All requests of one family have the same endless text, so any worker
that computes a position computes the same.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from baton.v1 import control_pb2, store_pb2
from services.decode.stream import DecodeStream
from services.kv.arena import Arena
from services.kv.layout import PAGE_TOKENS, blocks_for
from services.kv.record import StreamRecord
from services.kv_store.runtime import KvStore
from services.kv_store.state import KvState
from services.ops.errors import StaleEpoch
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
    store: KvStore = field(init=False)
    arena: Arena = field(init=False)
    workers: dict[str, Worker] = field(default_factory=dict)
    asked: dict[str, Asked] = field(default_factory=dict)
    sessions: list[Session] = field(default_factory=list)
    epoch: int = 10
    opened: int = 0

    def __post_init__(self) -> None:
        self.store = new_store(self.directory)
        self.arena = Arena(self.directory)

    def close(self) -> None:
        for worker in self.workers.values():
            worker.die()
        end_store(self.store)

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

    def _begin(self, name: str, request_id: str, slot: int, role: Prefilling | Decoding) -> Session:
        session = Session(self.worker(name), request_id, slot, role)
        self.sessions.append(session)
        return session

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
        reply, request_id = self.store.open(request), request.request_id
        role = Prefilling(self.arena, reply.slot, family, prompt, request.attempt)
        assert role.at == reply.cached_tokens
        self.asked[request_id] = Asked(
            family, prompt, max_new, self._begin(prefill, request_id, reply.slot, role), None
        )
        if max_new:
            self._prepare(request_id, decode, reply.slot, request.epoch)
        return str(request_id)

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

    def _prepare(self, request_id: str, name: str, slot: int, epoch: int) -> None:
        asked, stream = self.asked[request_id], self.store.state.streams[request_id]
        command = control_pb2.PrepareDecode(
            request_id=request_id, slot=slot, epoch=epoch,
            sampling=control_pb2.ResolvedSampling(max_tokens=asked.max_new, top_p=1.0),
        )  # fmt: skip
        own = stream.decode_table[(asked.prompt + asked.steps) // PAGE_TOKENS :]
        decoding = Decoding(DecodeStream(command, self.arena), asked.family, left=set(own))
        asked.decode = self._begin(name, request_id, slot, decoding)

    def compute(self, request_id: str, upto: int) -> None:
        """Prefill goes on; past the prompt's end it samples the first token."""
        asked = self.asked[request_id]
        role = asked.prefill.role
        assert isinstance(role, Prefilling)
        if asked.first or not self.present(asked.prefill):
            return
        assert role.compute(upto), "the present prefill has been fenced"
        if upto > asked.prompt:
            assert role.first(), "the present prefill has been fenced"
            asked.first = True

    def decode(self, request_id: str, steps: int) -> None:
        asked = self.asked[request_id]
        if not asked.decode or not self.present(asked.decode):
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
        """Raises Overloaded, after the fence."""
        asked, epoch = self.asked[request_id], self.next_epoch()
        if asked.decode:
            asked.decode.fenced = True
        reply = self.store.reassign(
            store_pb2.ReassignRequest(
                request_id=request_id, role=store_pb2.WRITER_ROLE_DECODE, epoch=epoch,
                writer=self.worker(name).id,
            )
        )  # fmt: skip
        assert reply.committed == asked.steps
        self._prepare(request_id, name, reply.slot, epoch)

    def move_prefill(self, request_id: str, name: str) -> None:
        """Raises Overloaded, after the fence."""
        asked, attempt = self.asked[request_id], self.next_epoch()
        asked.prefill.fenced = not asked.first  # one that has finished stays as it is
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
        asked.prefill = self._begin(name, request_id, reply.slot, role)

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

    def restart(self) -> None:
        """The store dies and starts again; what it knows must be what it knew."""
        lost = self.store.state
        self.begin_anew()
        self.same(lost, self.store.state)

    def begin_anew(self) -> None:
        end_store(self.store)
        self.store = new_store(self.directory)

    # --- what must hold ---

    def check(self) -> None:
        state = self.store.state
        state.check_invariants()
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
            assert set(other.blocks()) == set(stream.blocks()), f"{request_id}: blocks"
            fenced = (other.fenced & alive, stream.fenced & alive)
            assert fenced[0] == fenced[1], f"{request_id}: fenced are {fenced[0]}, were {fenced[1]}"
        assert found.pool.free == lost.pool.free, "free blocks"
        assert found.pool.quarantined == lost.pool.quarantined, "quarantine"
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
        assert len(pool.free) + self.store.state.evictable() == pool.total
        assert set(pool.leases) == set(self.store.state.index.keys)

    def end(self) -> None:
        """Everything is released and everybody goes: nothing is left but the cache."""
        for request_id in list(self.asked):
            self.release(request_id, stopped=False)
            self.check()
        self.store.reconcile([])
        for worker in self.workers.values():
            self.dies(worker)
        self.store.sweep()
        self.check()
        self.check_empty()


STREAM_FIELDS = (
    "slot", "prompt_tokens", "max_new", "prefill_writer", "decode_writer", "keys", "prefill_table",
    "decode_table", "cached_blocks", "tail_source", "tail_rows", "table_epoch",
)  # fmt: skip


def waiting(state: KvState, alive: set[str]) -> dict[int, set[tuple[str, str]]]:
    """Which slots rest for whom, the dead left out."""
    resting = {
        slot: {pair for pair in pairs if pair[1] in alive}
        for slot, pairs in state.resting_slots.items()
    }
    return {slot: pairs for slot, pairs in resting.items() if pairs}
