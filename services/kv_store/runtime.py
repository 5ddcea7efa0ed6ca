"""The kv-store at work: carries out what `state.py` decides, in the arena's headers and records."""

from __future__ import annotations

import fcntl
import os
import shutil
import time
import uuid
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from baton.v1 import cluster_pb2, store_pb2
from services.engine.identity import ModelIdentity
from services.kv import arena as pages
from services.kv import locks
from services.kv.arena import Arena, create_arena, plan_arena
from services.kv.identity import block_keys, root_key
from services.kv.layout import PAGE_TOKENS
from services.kv.record import FENCED_MAX, FREE, NO_BLOCK, RESTING, StreamRecord, record_dtype
from services.kv_store.config import KvStoreConfig
from services.kv_store.index import PrefixIndex
from services.kv_store.pool import BlockPool
from services.kv_store.recover import rebuild
from services.kv_store.state import MAX_EPOCH, KvState, Stream
from services.ops import log
from services.ops.errors import ConfigError, InvalidRequest
from services.ops.failpoints import Failpoints

_logger = log.get("kv_store")


class KvStore:
    """One arena and the state over it. All calls come from one thread."""

    def __init__(self, config: KvStoreConfig, identity: ModelIdentity) -> None:
        self.config, self.identity = config, identity
        self.failpoints = Failpoints(config.failpoints, config.name)
        directory = Path(config.arena_dir)
        directory.mkdir(parents=True, exist_ok=True)
        self._own_lock = self._lock_directory(directory)
        self.arena, self.state = self._attach_or_create(directory)
        self.store_id = self.arena.plan.store_id

    @staticmethod
    def _lock_directory(directory: Path) -> int:
        fd = os.open(directory / "store.lock", os.O_RDWR | os.O_CREAT, 0o660)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"arena_dir: another kv-store owns {directory}") from None
        return fd

    def _attach_or_create(self, directory: Path) -> tuple[Arena, KvState]:
        """Goes on with the arena that is there, or makes a new one when it is another model's."""
        layout, max_context = self.identity.layout, self.identity.config.max_context
        plan = plan_arena(
            layout, arena_bytes=self.config.arena_bytes, streams=self.config.streams_max,
            record_bytes=record_dtype(layout, max_context).itemsize, max_context=max_context,
            fingerprint=self.identity.fingerprint, store_id=uuid.uuid4().hex,
        )  # fmt: skip
        if (directory / "arena").exists():
            present = Arena(directory)
            same = (present.plan.layout, present.plan.fingerprint, present.plan.blocks)
            if same == (plan.layout, plan.fingerprint, plan.blocks):
                state = rebuild(present)
                _logger.info(
                    "arena rebuilt", streams=len(state.streams), cached=len(state.index),
                    quarantined=len(state.pool.quarantined),
                )  # fmt: skip
                return present, state
            _logger.warning("arena of another model replaced", fingerprint=present.plan.fingerprint)
        arena = create_arena(directory, plan)
        return arena, KvState(BlockPool(plan.blocks), PrefixIndex(), plan.streams)

    # --- requests ---

    def open(self, request: store_pb2.OpenStreamRequest) -> store_pb2.OpenStreamResponse:
        """Leases pages for a stream and writes its record. Idempotent for the same attempt."""
        self.failpoints.refresh()
        prompt = len(request.token_ids)
        if not prompt or prompt + request.max_new_tokens > self.arena.plan.max_context:
            raise InvalidRequest(
                f"token_ids: {prompt} tokens and {request.max_new_tokens} new ones do not fit a "
                f"context of {self.arena.plan.max_context}"
            )
        known = self.state.streams.get(request.request_id)
        if known and (known.attempt, known.epoch) == (request.attempt, request.epoch):
            return store_pb2.OpenStreamResponse(
                slot=known.slot, cached_tokens=known.cached_blocks * PAGE_TOKENS
            )
        tokens = np.array(request.token_ids, np.int32)
        root = root_key(self.identity.fingerprint, request.tenant)
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
        return store_pb2.OpenStreamResponse(
            slot=stream.slot, cached_tokens=stream.cached_blocks * PAGE_TOKENS
        )

    def reassign(self, request: store_pb2.ReassignRequest) -> store_pb2.ReassignResponse:
        """Fences the present writer, then gives its stream to `request.writer`."""
        self.failpoints.refresh()
        stream = self.state.stream(request.request_id)
        prefill = request.role == store_pb2.WRITER_ROLE_PREFILL
        self.state.check_epoch(stream, request.epoch, prefill=prefill)
        record = StreamRecord(self.arena, stream.slot)
        old_writer = stream.prefill_writer if prefill else stream.decode_writer
        move = self._reassign_prefill if prefill else self._reassign_decode
        committed, lost = move(stream, record, request)
        self._write_plan(stream, record)
        self._write_headers(stream)
        return store_pb2.ReassignResponse(
            slot=stream.slot, committed=committed, previous_gone=not self._may_write(old_writer),
            quarantined_pages=len(lost) * self.arena.layout.groups,
        )  # fmt: skip

    def _reassign_decode(
        self, stream: Stream, record: StreamRecord, request: store_pb2.ReassignRequest
    ) -> tuple[int, list[int]]:
        """The fence comes first: what is committed after it is nobody's. Whether the old epoch had
        its own tail is asked after it too, of the epoch the tables were made for: a store that died
        between fence and tables, or found no room, is called again with a later epoch."""
        fenced = "fence" not in self.config.unsafe
        committed = record.fence(request.epoch) if fenced else record.commit()[1]
        self.failpoints.hit("store.fenced")
        lost = self.state.reassign_decode(
            request.request_id, epoch=request.epoch, writer=request.writer, committed=committed,
            attached=record.attached_epoch() >= stream.table_epoch, may_write=self._may_write,
        )  # fmt: skip
        return committed, lost

    def _reassign_prefill(
        self, stream: Stream, record: StreamRecord, request: store_pb2.ReassignRequest
    ) -> tuple[int, list[int]]:
        if record.first()[1]:
            return stream.prompt_tokens, []  # it had finished: nothing is left to compute
        start = self.state.restart_at(stream, record.ready_tokens())
        if not record.fence_prefill(request.epoch, start):
            return stream.prompt_tokens, []
        lost = self.state.reassign_prefill(
            request.request_id, attempt=request.epoch, writer=request.writer, start=start,
            may_write=self._may_write,
        )  # fmt: skip
        return start, lost

    def publish(self, request_id: str) -> int:
        """Shares the prompt's complete blocks; before prefill is done, nothing."""
        stream = self.state.stream(request_id)
        record = StreamRecord(self.arena, stream.slot)
        ready = record.ready_tokens() if record.first()[1] else 0
        return len(self.state.publish(request_id, ready))

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
        """Ends a stream; False when it was not open."""
        if request.request_id not in self.state.streams:
            return False
        stream = self.state.stream(request.request_id)
        record = StreamRecord(self.arena, stream.slot)
        keys = self._complete_keys(stream, record) if request.keep_blocks else []
        live = set(request.live_writers) | stream.fenced
        record.close()
        self.state.release(
            request.request_id, keys=keys,
            may_write=lambda writer: writer in live and self._may_write(writer),
        )  # fmt: skip
        self._write_headers(stream)
        waiting = self.state.resting_slots.get(stream.slot, set())
        record.write_plan(fenced=_fenced(writer for _, writer in waiting))
        record.set_state(RESTING if waiting else FREE)
        return True

    def _complete_keys(self, stream: Stream, record: StreamRecord) -> list[bytes]:
        """Keys of the blocks, prompt and generated, whose every row has been committed."""
        complete = record.ready_tokens()
        if stream.max_new and record.first()[1] and complete == stream.prompt_tokens:
            complete += record.commit()[1]
        return block_keys(record.root, record.tokens[: min(complete, len(record.tokens) - 1)])

    def reconcile(self, keep: Sequence[str], epoch: int = MAX_EPOCH) -> int:
        """Releases the streams that nobody remembers; those opened after `epoch` are not meant."""
        streams = self.state.streams.values()
        gone = {s.request_id for s in streams if max(s.epoch, s.attempt) <= epoch} - set(keep)
        for request_id in gone:
            stream = self.state.stream(request_id)
            self.release(
                store_pb2.ReleaseRequest(
                    request_id=request_id, keep_blocks=True, live_writers=stream.writers()
                )
            )
        return len(gone)

    def invalidate(self, request_id: str, blocks: Sequence[int]) -> int:
        """Takes blocks out of the cache, for good: a rebuild does not find them whole either."""
        stream = self.state.stream(request_id)
        table = stream.decode_table or stream.prefill_table
        bad = [table[b] for b in blocks if b < len(table)]
        self.state.invalidate(bad)
        headers = self.arena.headers.reshape(self.arena.layout.groups, self.arena.plan.blocks)
        headers["tokens"][:, bad] = 0
        self._write_headers(stream)
        return len(bad)

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
        """Frees what was waiting for a writer that is gone now, has `stopped` or is `idle`."""
        nothing = not self.state.pool.quarantined and not self.state.resting_slots
        if nothing and stopped is None and idle is None:
            return 0
        before = {s.slot: set(s.fenced) for s in self.state.streams.values()}
        before |= {slot: {w for _, w in who} for slot, who in self.state.resting_slots.items()}
        blocks, slots = self.state.sweep(self._may_write, stopped, idle, epoch)
        self._write_fenced(before)
        self._write_headers(None)
        for slot in slots:
            StreamRecord(self.arena, slot).set_state(FREE)
        return len(blocks) * self.arena.layout.groups

    def _write_fenced(self, before: dict[int, set[str]]) -> None:
        """Brings the records of those whose waiting has changed up to the state."""
        after = {s.slot: s.fenced for s in self.state.streams.values()}
        after |= {slot: {w for _, w in who} for slot, who in self.state.resting_slots.items()}
        for slot, writers in after.items():
            if writers != before[slot]:
                StreamRecord(self.arena, slot).write_plan(fenced=_fenced(writers))

    def _may_write(self, writer: str) -> bool:
        return bool(writer) and locks.is_held(self.arena.directory, writer)

    # --- the arena's copy of the state ---

    def _write_plan(self, stream: Stream, record: StreamRecord) -> None:
        record.write_plan(
            prefill_writer=stream.prefill_writer.encode(),
            decode_writer=stream.decode_writer.encode(), table_epoch=stream.table_epoch,
            cached_tokens=stream.cached_blocks * PAGE_TOKENS, tail_rows=stream.tail_rows,
            tail_source=NO_BLOCK if stream.tail_source is None else stream.tail_source,
            prefill_table=stream.prefill_table, decode_table=stream.decode_table,
            fenced=_fenced(stream.fenced),
        )  # fmt: skip

    def _write_headers(self, stream: Stream | None) -> None:
        """Brings the headers of all changed blocks up to the pool's state."""
        pool = self.state.pool
        changed, taken = pool.drain_changes()
        headers = self.arena.headers.reshape(self.arena.layout.groups, self.arena.plan.blocks)
        for block in changed:
            pages_of_block = headers[:, block]
            if block in pool.quarantined:
                pages_of_block["writer"] = _writer_key(pool.quarantined[block].writer)
                pages_of_block["quarantined"] = 1
            elif block in pool.leases and block not in taken:
                pages_of_block["writer"] = _writer_key(pool.writers.get(block, ""))
            elif block in taken:
                assert stream is not None
                pages_of_block["state"] = pages.OPEN  # first: what follows belongs to it
                pages_of_block["owner"] = stream.slot + 1
                pages_of_block["writer"] = _writer_key(pool.writers.get(block, ""))
                pages_of_block["quarantined"] = 0
                pages_of_block["epoch"] = pool.epochs.get(block, 0)
                pages_of_block["tokens"] = 0
                pages_of_block["stamp"] = time.time_ns()
            elif block in pool.free:
                pages_of_block["owner"] = 0
                pages_of_block["quarantined"] = 0
                pages_of_block["state"] = pages.FREE

    def pages(self, address: str) -> cluster_pb2.StorePages:
        pool, groups = self.state.pool, self.arena.layout.groups
        held = {b for s in self.state.streams.values() for b in s.blocks()}
        return cluster_pb2.StorePages(
            store_id=self.store_id, address=address, pid=os.getpid(),
            page_bytes=self.arena.layout.page_bytes, pages_total=pool.total * groups,
            pages_free=len(pool.free) * groups, pages_open=len(pool.writers) * groups,
            pages_sealed=len(held - set(pool.writers)) * groups,
            pages_cached=len(set(pool.leases) - held) * groups,
            pages_quarantined=len(pool.quarantined) * groups,
            streams=len(self.state.streams), reachable=True,
        )  # fmt: skip

    def remove_arena(self) -> None:
        """Removes the arena and its directory; only for a cluster that is going down for good."""
        shutil.rmtree(self.arena.directory, ignore_errors=True)


def _fenced(writers: Iterable[str]) -> list[bytes]:
    names = sorted(writers)[-FENCED_MAX:]
    return [name.encode() for name in names] + [b""] * (FENCED_MAX - len(names))


def _writer_key(writer: str) -> np.void:
    return np.void(bytes.fromhex(writer) if len(writer) == 32 else b"\0" * 16)
