"""Rebuilds the kv-store's state from what lies in the arena, after the store itself has died.

Memory is not trusted, only headers and records: an active record is a stream, a sealed group of pages
is a cached block, a page in quarantine stays there until its writer is gone.
"""

from __future__ import annotations

from collections import Counter

import numpy as np

from services.kv import arena as pages
from services.kv.arena import Arena
from services.kv.identity import block_keys
from services.kv.layout import PAGE_TOKENS, blocks_for
from services.kv.record import ACTIVE, NO_BLOCK, StreamRecord
from services.kv_store.index import PrefixIndex
from services.kv_store.pool import BlockPool, Quarantine
from services.kv_store.state import KvState, Stream

RESTING = 2  # a record slot whose writers may still be there


def rebuild(arena: Arena) -> KvState:
    """The state that the arena's headers and records describe."""
    blocks = arena.plan.blocks
    pool = BlockPool(blocks)
    state = KvState(pool, PrefixIndex(), arena.plan.streams)
    headers = arena.headers.reshape(arena.layout.groups, blocks)
    for slot in range(arena.plan.streams):
        record = StreamRecord(arena, slot)
        if record.number("state") == ACTIVE:
            stream = _stream(record, headers)
            state.streams[stream.request_id] = stream
        elif record.number("state") == RESTING:
            writers = {record.text("prefill_writer"), record.text("decode_writer")}
            state.resting_slots[slot] = writers - {""}
    _restore_leases(state, headers)
    _restore_index(state, headers)
    state.check_invariants()
    return state


def _stream(record: StreamRecord, headers: np.ndarray) -> Stream:  # type: ignore[type-arg]
    prompt, max_new = record.number("prompt_tokens"), record.number("max_new")
    prefill_blocks = blocks_for(prompt)
    decode_blocks = blocks_for(prompt + max_new - 1) if max_new else prompt // PAGE_TOKENS
    tail_source = record.number("tail_source")
    stream = Stream(
        record.text("request_id"), record.slot, prompt, max_new,
        epoch=record.commit()[0], attempt=record.first()[0],
        prefill_writer=record.text("prefill_writer"), decode_writer=record.text("decode_writer"),
        keys=block_keys(record.root, record.tokens[:prompt]),
        prefill_table=[int(b) for b in record.prefill_table[:prefill_blocks]],
        decode_table=[int(b) for b in record.decode_table[:decode_blocks]],
        cached_blocks=record.number("cached_tokens") // PAGE_TOKENS,
        tail_source=None if tail_source == NO_BLOCK else tail_source,
        tail_rows=record.number("tail_rows"),
    )  # fmt: skip
    mine = np.flatnonzero(
        (headers["owner"][0] == record.slot + 1) & (headers["state"][0] == pages.OPEN)
    )
    known = set(stream.blocks())
    stream.held = [int(b) for b in mine if int(b) not in known]
    if stream.tail_source is not None and stream.tail_source not in known:
        stream.held = [b for b in stream.held if b != stream.tail_source] + [stream.tail_source]
    return stream


def _restore_leases(state: KvState, headers: np.ndarray) -> None:  # type: ignore[type-arg]
    pool = state.pool
    pool.leases = dict(Counter(b for s in state.streams.values() for b in s.blocks()))
    for stream in state.streams.values():
        for block in stream.blocks():
            if (headers["state"][:, block] != pages.SEALED).any():
                prefills = block in stream.prefill_table
                pool.writers[block] = stream.prefill_writer if prefills else stream.decode_writer
    held_back = np.flatnonzero((headers["state"] == pages.QUARANTINED).any(axis=0))
    for number in held_back.tolist():
        if number not in pool.leases:
            writer = headers["key"][0, number].tobytes().hex()
            pool.quarantined[number] = Quarantine(writer, "")
    pool.free = set(range(pool.total)) - set(pool.leases) - set(pool.quarantined)


def _restore_index(state: KvState, headers: np.ndarray) -> None:  # type: ignore[type-arg]
    """A block is cached when all its pages are sealed under one key with intact checksums."""
    pool = state.pool
    sealed = (headers["state"] == pages.SEALED).all(axis=0)
    same = (headers["key"] == headers["key"][0]).all(axis=0)
    whole = (headers["tokens"] == PAGE_TOKENS).all(axis=0)
    candidates = np.flatnonzero(sealed & same & whole)
    for block in candidates[np.argsort(headers["stamp"][0, candidates], kind="stable")]:
        number = int(block)
        if number in pool.quarantined:
            continue
        if not state.index.add(headers["key"][0, block].tobytes(), number):
            continue
        pool.free.discard(number)
        pool.leases[number] = pool.leases.get(number, 0) + 1
        pool.writers.pop(number, None)
