"""The kv-store at work: carries out what `state.py` decides, in the arena's headers and records."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from baton.v1 import store_pb2
from services.engine.identity import ModelIdentity
from services.kv import locks
from services.kv.arena import SEALED
from services.kv.identity import block_keys, root_key
from services.kv.layout import PAGE_TOKENS
from services.kv.record import FREE, RESTING, StreamRecord
from services.kv.verify import sealed
from services.kv_store import pinfile
from services.kv_store.attach import attach_or_create
from services.kv_store.config import KvStoreConfig
from services.kv_store.disk import DiskTier
from services.kv_store.headers import HeaderBook
from services.kv_store.leases import LeaseTable
from services.kv_store.plans import write_fenced, write_plan
from services.kv_store.pool import ANYBODY
from services.kv_store.recover import intact
from services.kv_store.state import MAX_EPOCH, Stream
from services.ops import log
from services.ops.errors import InvalidRequest, StaleEpoch
from services.ops.failpoints import Failpoints
from services.ops.private import own_directory

_logger = log.get("kv_store")
AWAITED_MAX = 256  # that one answer names; the others follow when these have spoken
LEASE_STEPS = 8  # of a lease: no look at the clock lets more than one of them pass


@dataclass
class StoreCounts:
    """What the store has met since it started; for `baton status`."""

    corrupt_cached: int = 0  # cached blocks that were found damaged, and dropped
    headers_repaired: int = 0  # of blocks, found damaged at a start; of pages, afterwards
    leases_expired: int = 0  # streams that nobody renewed


class KvStore:
    """One arena and the state over it. All calls come from one thread."""

    def __init__(
        self, config: KvStoreConfig, identity: ModelIdentity,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self.config, self.identity, self.clock = config, identity, clock
        self.counts = StoreCounts()
        self.failpoints = Failpoints(config.failpoints, config.name)
        directory = Path(config.arena_dir)
        self._own_lock = own_directory(directory, "arena_dir")
        locks.prepare(directory)
        self._before = locks.all_held(directory)  # whom the store before this one may have met
        self.arena, self.state = attach_or_create(directory, config, identity)
        self.book = HeaderBook(self.arena)
        self.counts.headers_repaired += self.book.adopt(self.state)
        self.store_id = self.arena.plan.store_id
        self.state.pins = pinfile.load(self._pin_path, identity.fingerprint, self._pins_max())
        lease_s = config.lease_ms / 1e3
        self.leases = LeaseTable(lease_s, step_s=lease_s / LEASE_STEPS)
        self.leases.tick(clock())
        for request_id in self.state.streams:
            self.leases.grant(request_id)
        self.disk: DiskTier | None = None  # to be reported on, and so is the stream's endpoint:
        self.corrupt_messages: Callable[[], int] = lambda: 0

    # --- requests ---

    def open(self, request: store_pb2.OpenStreamRequest) -> store_pb2.OpenStreamResponse:
        """Leases pages for a stream and writes its record. Idempotent for the same attempt."""
        self.failpoints.refresh()
        self.state.index.now = self.clock()
        self.leases.tick(self.clock())
        prompt = len(request.token_ids)
        if not prompt or prompt + request.max_new_tokens > self.arena.plan.max_context:
            raise InvalidRequest(
                f"token_ids: {prompt} tokens and {request.max_new_tokens} new ones do not fit a "
                f"context of {self.arena.plan.max_context}"
            )
        known = self.state.streams.get(request.request_id)
        if known and (known.attempt, known.epoch) == (request.attempt, request.epoch):
            self.leases.grant(request.request_id)
            return store_pb2.OpenStreamResponse(
                slot=known.slot, cached_tokens=known.cached_blocks * PAGE_TOKENS
            )
        tokens = np.array(request.token_ids, np.int32)
        root = self._root(request.tenant)
        stream, _ = self.state.open(
            request.request_id, keys=block_keys(root, tokens), prompt_tokens=prompt,
            max_new=request.max_new_tokens, epoch=request.epoch, attempt=request.attempt,
            prefill_writer=request.prefill_writer, decode_writer=request.decode_writer,
            bypass_cache=request.bypass_cache,
        )  # fmt: skip
        self._write_headers(stream)
        record = StreamRecord(self.arena, stream.slot)
        record.tokens[:prompt] = tokens
        fixed = record.fixed
        fixed["request_id"] = stream.request_id.encode()
        fixed["prompt_tokens"] = prompt
        fixed["max_new"] = stream.max_new
        fixed["root"] = np.void(root)
        fixed["first_index"] = request.first_index
        fixed["tenant"] = request.tenant.encode()
        fixed["generation"] = int(fixed["generation"]) + 1 & 0xFFFFFFFF
        self._write_plan(stream, record)
        record.open(stream.epoch, stream.attempt, stream.cached_blocks * PAGE_TOKENS)
        self.leases.grant(stream.request_id)
        return store_pb2.OpenStreamResponse(
            slot=stream.slot, cached_tokens=stream.cached_blocks * PAGE_TOKENS
        )

    def _root(self, tenant: str) -> bytes:
        return root_key(self.identity.fingerprint, tenant)

    def prompt_keys(self, request: store_pb2.OpenStreamRequest) -> list[bytes]:
        """The keys of the blocks that a prefix hit can give it: its last token is always computed."""
        return block_keys(self._root(request.tenant), list(request.token_ids)[:-1])

    def reassign(self, request: store_pb2.ReassignRequest) -> store_pb2.ReassignResponse:
        """Fences the present writer, then gives its stream to `request.writer`."""
        self.failpoints.refresh()
        stream = self.state.stream(request.request_id)
        prefill = request.role == store_pb2.WRITER_ROLE_PREFILL
        record = StreamRecord(self.arena, stream.slot)
        if self._is_done(stream, request, prefill=prefill):
            return self._reassigned_before(stream, record, prefill=prefill)
        begun = not prefill and request.epoch == stream.epoch > stream.table_epoch
        if not begun:  # by a store that died between fence and tables
            self.state.check_epoch(stream, request.epoch, prefill=prefill)
        old_writer = stream.prefill_writer if prefill else stream.decode_writer
        move = self._reassign_prefill if prefill else self._reassign_decode
        committed, lost = move(stream, record, request)
        self._write_plan(stream, record)
        self._write_headers(stream)
        self._disown(stream.repairs.values())
        return store_pb2.ReassignResponse(
            slot=stream.slot, committed=committed, previous_gone=not self._may_write(old_writer),
            quarantined_pages=len(lost) * self.arena.layout.groups,
        )  # fmt: skip

    @staticmethod
    def _is_done(stream: Stream, request: store_pb2.ReassignRequest, *, prefill: bool) -> bool:
        """Whether this very call has been carried out before: its answer was lost."""
        if prefill:
            return (stream.attempt, stream.prefill_writer) == (request.epoch, request.writer)
        tables = stream.table_epoch == request.epoch
        return tables and stream.decode_writer == request.writer

    def _reassigned_before(
        self, stream: Stream, record: StreamRecord, *, prefill: bool
    ) -> store_pb2.ReassignResponse:
        committed = record.commit()[1]
        if prefill:
            committed = stream.prompt_tokens if record.first()[1] else record.ready_tokens()
        gone = not any(self._may_write(writer) for writer in stream.fenced)
        return store_pb2.ReassignResponse(slot=stream.slot, committed=committed, previous_gone=gone)

    def _reassign_decode(
        self, stream: Stream, record: StreamRecord, request: store_pb2.ReassignRequest
    ) -> tuple[int, list[int]]:
        """The fence comes before everything but a look at the room: what is committed after it is
        nobody's. Whether the old epoch had its own tail is asked after it too, of the epoch the tables
        were made for: a store that died between fence and tables is called again, with this epoch or a
        later one."""
        present, committed = record.commit()
        if request.epoch < present:
            raise StaleEpoch(f"epoch: {request.epoch} is older than {present}")
        attached = record.attached_epoch() >= stream.table_epoch
        asked = len(self.state.repairs(stream, request.repair_blocks, self._filled))
        self.state.check_decode_room(
            stream, committed, asked, attached=attached, may_write=self._may_write
        )
        if request.epoch > present and "fence" not in self.config.unsafe:
            committed = record.fence(request.epoch)
        self.failpoints.hit("store.fenced")
        lost = self.state.reassign_decode(
            request.request_id, epoch=request.epoch, writer=request.writer, committed=committed,
            attached=record.attached_epoch() >= stream.table_epoch, may_write=self._may_write,
            repair=request.repair_blocks, filled=self._filled,
        )  # fmt: skip
        return committed, lost

    def _reassign_prefill(
        self, stream: Stream, record: StreamRecord, request: store_pb2.ReassignRequest
    ) -> tuple[int, list[int]]:
        if record.first()[1]:
            return stream.prompt_tokens, []  # it had finished: nothing is left to compute
        ready = record.ready_tokens()
        if request.HasField("resume_at"):
            ready = min(ready, request.resume_at)
        start = self.state.restart_at(stream, ready)
        damaged = self.state.repairs(stream, request.repair_blocks, self._filled)
        sound = min([start, *(index * PAGE_TOKENS for index in damaged)])
        inherited = sum(index * PAGE_TOKENS < start for index in damaged)
        self.state.check_prefill_room(stream, start, inherited, may_write=self._may_write)
        if not record.fence_prefill(request.epoch, sound):
            return stream.prompt_tokens, []
        lost = self.state.reassign_prefill(
            request.request_id, attempt=request.epoch, writer=request.writer, start=start,
            may_write=self._may_write, repair=request.repair_blocks, filled=self._filled,
        )  # fmt: skip
        return start, lost

    def publish(self, request_id: str) -> int:
        """Shares the prompt's complete blocks; before prefill is done, nothing."""
        self.state.index.now = self.clock()
        stream = self.state.stream(request_id)
        record = StreamRecord(self.arena, stream.slot)
        if not record.first()[1]:
            return 0
        ready = self._sound(stream, record, record.ready_tokens())
        published = self.state.publish(request_id, ready)
        self._write_plan(stream, record)
        self._write_headers(stream)
        return len(published)

    # --- copies to and from other tiers ---

    def begin_fill(self, count: int, keep: Sequence[int]) -> list[int]:
        """Blocks to be filled from another tier, at most `count`; those in `keep` stay where they are.
        `end_fill` must follow, once nobody writes them any more."""
        self.state.begin_copy(keep)
        blocks = self.state.begin_fill(count)
        self._write_headers(None)
        return blocks

    def end_fill(self, keys: Sequence[bytes], blocks: Sequence[int], kept: Sequence[int]) -> None:
        """The leading blocks are sealed under these keys, and can be found."""
        self.state.index.now = self.clock()
        self.state.end_fill(keys, blocks)
        self.state.end_copy(kept)
        self._write_headers(None)

    def begin_copy(self, block: int) -> bool:
        """Holds a cached block for a reader; False when it turns out to be damaged, and is dropped."""
        if not self.whole(block):
            self.drop_corrupt(block)
            return False
        self.state.begin_copy([block])
        return True

    def end_copy(self, block: int) -> None:
        self.state.end_copy([block])
        self._write_headers(None)

    def whole(self, block: int) -> bool:
        """Whether a cached block still is what its key says, as far as its headers tell."""
        parts = self.arena.headers[block :: self.arena.plan.blocks]
        key = self.state.index.keys[block]
        sealed = (parts["state"] == SEALED) & (parts["tokens"] == PAGE_TOKENS)
        same = all(part.tobytes() == key for part in parts["key"])
        return bool(sealed.all()) and same and intact(self.arena, block)

    def drop_corrupt(self, block: int) -> None:
        self.counts.corrupt_cached += 1
        _logger.warning("corrupt block dropped from the cache", block=block)
        self._forget([block])

    def _forget(self, blocks: Sequence[int]) -> None:
        """Takes blocks out of the cache, for good: a rebuild does not find them whole either."""
        self.state.invalidate(list(blocks))
        self._disown(blocks)
        self._write_headers(None)

    def read(self, request_id: str) -> store_pb2.ReadStreamResponse:
        stream = self.state.stream(request_id)
        record = StreamRecord(self.arena, stream.slot)
        epoch, steps = record.commit()
        attempt, has_first = record.first()
        known = steps + 1 if has_first else 0
        generated = slice(stream.prompt_tokens, stream.prompt_tokens + known)
        return store_pb2.ReadStreamResponse(
            epoch=epoch, attempt=attempt, committed=steps, prompt_tokens=stream.prompt_tokens,
            ready_tokens=record.ready_tokens(), first_index=record.number("first_index"),
            token_ids=record.tokens[generated].tolist(),
            logprobs=record.logprobs[generated].tolist(), slot=stream.slot,
            prefill_writer=stream.prefill_writer,
            decode_writer=stream.decode_writer if stream.table_epoch == epoch else "",
        )  # fmt: skip

    def release(self, request: store_pb2.ReleaseRequest) -> bool:
        """Ends a stream; False when it was not open, or has been opened again since this was said."""
        stream = self.state.streams.get(request.request_id)
        if stream is None or max(stream.epoch, stream.attempt) > (request.epoch or MAX_EPOCH):
            return False
        self.state.index.now = self.clock()
        record = StreamRecord(self.arena, stream.slot)
        keys = self._complete_keys(stream, record) if request.keep_blocks else []
        live = {*request.live_writers, *stream.fenced}
        if request.writers_unknown:
            live = {*stream.writers()}
        record.close()
        self.state.release(
            request.request_id, keys=keys,
            may_write=lambda writer: writer in live and self._may_write(writer),
        )  # fmt: skip
        self._write_headers(stream)
        waiting = self.state.resting_slots.get(stream.slot, {})
        write_fenced(record, {w: since for (_, w), since in waiting.items()})
        record.set_state(RESTING if waiting else FREE)
        self.leases.end(request.request_id)
        return True

    def renew(self, request_ids: Sequence[str]) -> list[str]:
        """Extends the leases of these streams; gives those that are not open."""
        self.leases.tick(self.clock())
        return self.leases.renew(request_ids)

    def renewed(self, request: store_pb2.RenewRequest) -> store_pb2.RenewResponse:
        """And whom this store waits for: a word of theirs may have been lost, or have come too early."""
        reply = store_pb2.RenewResponse(unknown=self.renew(request.request_ids))
        for (request_id, writer), epoch in [*self.state.awaited().items()][:AWAITED_MAX]:
            reply.awaited.add(request_id=request_id, writer=writer, epoch=epoch)
        return reply

    def _expire(self) -> None:
        """Releases the streams that nobody has renewed, as if nobody remembered them."""
        self.leases.tick(self.clock())
        if "lease" in self.config.unsafe:
            return  # control: what nobody renews is kept for ever
        for request_id in self.leases.expired():
            self.counts.leases_expired += 1
            _logger.warning("lease expired", request_id=request_id)
            self._abandon(request_id)

    def _abandon(self, request_id: str) -> None:
        """Its workers are not known to have stopped; its complete blocks stay cached."""
        live = self.state.stream(request_id).writers()
        self.release(
            store_pb2.ReleaseRequest(request_id=request_id, keep_blocks=True, live_writers=live)
        )

    def _complete_keys(self, stream: Stream, record: StreamRecord) -> list[bytes]:
        """Keys of the blocks, prompt and generated, whose every row has been committed.

        Generated ones only where prefill would compute the same bits: else a later prompt's tokens
        would depend on whether it found them.
        """
        complete = record.ready_tokens()
        generated = stream.max_new and record.first()[1] and self.arena.plan.one_class
        if generated and complete == stream.prompt_tokens:
            complete += record.commit()[1]
        complete = self._sound(stream, record, complete)
        return block_keys(record.root, record.tokens[: min(complete, len(record.tokens) - 1)])

    def _sound(self, stream: Stream, record: StreamRecord, tokens: int) -> int:
        """How many of the first `tokens` tokens come before anything that is still to be repaired."""
        attached = record.attached_epoch() >= stream.table_epoch
        left = self.state.repairs(stream, (), self._filled, attached=attached)
        return min([tokens, *(index * PAGE_TOKENS for index in left)])

    def reconcile(self, keep: Sequence[str], epoch: int = MAX_EPOCH) -> int:
        """Releases the streams that nobody remembers; those opened after `epoch` are not meant."""
        streams = self.state.streams.values()
        gone = {s.request_id for s in streams if max(s.epoch, s.attempt) <= epoch} - set(keep)
        for request_id in gone:
            self._abandon(request_id)
        return len(gone)

    # --- pins ---

    @property
    def _pin_path(self) -> Path:
        return Path(self.config.disk_dir or self.config.arena_dir) / "pins.json"

    def _pins_max(self) -> int:
        """How many blocks may be pinned."""
        layout, total = self.arena.layout, self.arena.plan.blocks
        block_bytes = layout.groups * layout.page_bytes
        return min(self.config.pins_max_bytes // block_bytes or total // 4, total)

    def pin(self, request: store_pb2.PinRequest) -> list[bytes]:
        """Keeps a prefix from being evicted; gives the keys of its blocks. Raises InvalidRequest,
        Overloaded."""
        keys = block_keys(self._root(request.tenant), list(request.token_ids))
        if not keys:
            raise InvalidRequest(f"token_ids: less than one block of {PAGE_TOKENS} tokens")
        self.state.pins.pin(request.name, keys)
        self._save_pins()
        return keys

    def unpin(self, name: str) -> bool:
        found = self.state.pins.unpin(name)
        self._save_pins()
        return found

    def _save_pins(self) -> None:
        try:
            pinfile.save(self._pin_path, self.identity.fingerprint, self.state.pins)
        except OSError as error:
            _logger.warning("pins not saved", reason=str(error))

    # --- what is held back or damaged ---

    def invalidate(self, request_id: str, blocks: Sequence[int]) -> int:
        """Takes a stream's blocks out of the cache: they failed verification."""
        stream = self.state.stream(request_id)
        table = stream.decode_table or stream.prefill_table
        bad = [table[b] for b in blocks if b < len(table)]
        self._forget(bad)
        return len(bad)

    def _disown(self, blocks: Iterable[int]) -> None:
        """A store that starts anew does not take these for cached ones either."""
        headers = self.arena.headers.reshape(self.arena.layout.groups, self.arena.plan.blocks)
        headers["tokens"][:, list(blocks)] = 0

    def retire(self, request: store_pb2.RetireRequest) -> int:
        """A writer lets go of one request, or of all but those it still works on."""
        epoch = request.epoch or MAX_EPOCH
        if request.request_id:
            return self.sweep(stopped=(request.request_id, request.writer), epoch=epoch)
        return self.sweep(idle=(request.writer, frozenset(request.still_running)), epoch=epoch)

    def sweep(
        self, stopped: tuple[str, str] | None = None,
        idle: tuple[str, frozenset[str]] | None = None, epoch: int = MAX_EPOCH,
    ) -> int:  # fmt: skip
        """Ends streams whose lease has run out, and frees what was waiting for a writer that is gone
        now, has `stopped` or is `idle`."""
        self._expire()
        if "quarantine" in self.config.unsafe:
            return 0  # control: what waits for a writer waits for ever
        nothing = not self.state.pool.quarantined and not self.state.resting_slots
        if nothing and stopped is None and idle is None:
            return 0
        before = self._waited_for()
        blocks, slots = self.state.sweep(self._may_write, stopped, idle, epoch)
        self._write_fenced(before)
        self._write_headers(None)
        for slot in slots:
            StreamRecord(self.arena, slot).set_state(FREE)
        return len(blocks) * self.arena.layout.groups

    def _waited_for(self) -> dict[int, dict[str, int]]:
        """slot -> writers that have not said Stopped, and the last epoch of each."""
        fenced = {s.slot: dict(s.fenced) for s in self.state.streams.values()}
        resting = self.state.resting_slots.items()
        return fenced | {slot: {w: since for (_, w), since in who.items()} for slot, who in resting}

    def _write_fenced(self, before: dict[int, dict[str, int]]) -> None:
        """Brings the records of those whose waiting has changed up to the state."""
        for slot, writers in self._waited_for().items():
            if writers != before[slot]:
                write_fenced(StreamRecord(self.arena, slot), writers)

    def _filled(self, block: int) -> bool:
        return sealed(self.arena, block)

    def _may_write(self, writer: str) -> bool:
        if writer == ANYBODY:
            return any(locks.is_held(self.arena.directory, name) for name in self._before)
        return bool(writer) and locks.is_held(self.arena.directory, writer)

    # --- the arena's copy of the state ---

    def _write_plan(self, stream: Stream, record: StreamRecord) -> None:
        write_plan(stream, record, self.arena.plan.max_blocks)

    def _write_headers(self, stream: Stream | None) -> None:
        """Brings the headers of all changed blocks up to the state; those that have been leased have
        been so for `stream`."""
        self.book.follow(self.state, owner=0 if stream is None else stream.slot + 1)

    def remove_arena(self) -> None:
        """Removes the arena and its directory; only for a cluster that is going down for good."""
        shutil.rmtree(self.arena.directory, ignore_errors=True)
