"""Rebuilds the kv-store's state from what lies in the arena, after the store itself has died.

Memory is not trusted, only headers and records: an active record is a stream, a sealed group of pages
is a cached block, a page in quarantine stays there until its writer is gone. The store may have died
between any two writes: tables are replaced in one step, before the headers, so what a header says of
a block counts only where no table holds it.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
from numpy.typing import NDArray

from services.kv import arena as pages
from services.kv.arena import Arena
from services.kv.identity import block_keys
from services.kv.layout import PAGE_TOKENS, blocks_for
from services.kv.record import ACTIVE, NO_BLOCK, RESTING, StreamRecord
from services.kv_store.index import PrefixIndex
from services.kv_store.pool import BlockPool, Quarantine
from services.kv_store.state import KvState, Stream

Headers = NDArray[np.void]  # [group, block]


def rebuild(arena: Arena) -> KvState:
    """The state that the arena's headers and records describe."""
    pool = BlockPool(arena.plan.blocks)
    state = KvState(pool, PrefixIndex(), arena.plan.streams)
    headers: Headers = arena.headers.reshape(arena.layout.groups, arena.plan.blocks)
    for slot in range(arena.plan.streams):
        record = StreamRecord(arena, slot)
        if record.number("state") == ACTIVE:
            stream = _stream(record, headers)
            state.streams[stream.request_id] = stream
        elif record.number("state") == RESTING:
            request_id = record.text("request_id")
            state.resting_slots[slot] = {(request_id, writer) for writer in _fenced(record)}
    _restore_leases(state, headers)
    _restore_quarantine(arena, state, headers)
    pool.free = set(range(pool.total)) - set(pool.leases) - set(pool.quarantined)
    _restore_index(arena, state, headers)
    state.check_invariants()
    return state


def _stream(record: StreamRecord, headers: Headers) -> Stream:
    plan = record.plan()
    prompt, max_new = record.number("prompt_tokens"), record.number("max_new")
    decode_blocks = blocks_for(prompt + max_new - 1) if max_new else prompt // PAGE_TOKENS
    tail_source = int(plan["tail_source"])
    stream = Stream(
        record.text("request_id"), record.slot, prompt, max_new,
        epoch=record.commit()[0], attempt=record.first()[0],
        prefill_writer=record.text("prefill_writer"), decode_writer=record.text("decode_writer"),
        keys=block_keys(record.root, record.tokens[:prompt]),
        prefill_table=plan["prefill_table"][: blocks_for(prompt)].tolist(),
        decode_table=plan["decode_table"][:decode_blocks].tolist(),
        cached_blocks=int(plan["cached_tokens"]) // PAGE_TOKENS,
        tail_source=None if tail_source == NO_BLOCK else tail_source,
        tail_rows=int(plan["tail_rows"]), table_epoch=int(plan["table_epoch"]),
        fenced=_fenced(record),
    )  # fmt: skip
    known = set(stream.blocks())
    mine = (headers["owner"][0] == record.slot + 1) & (headers["state"][0] == pages.OPEN)
    mine &= (headers["quarantined"] == 0).all(axis=0)
    stream.held = [block for block in np.flatnonzero(mine).tolist() if block not in known]
    return stream


def _fenced(record: StreamRecord) -> set[str]:
    return {bytes(name).rstrip(b"\0").decode() for name in record.plan()["fenced"]} - {""}


def _restore_leases(state: KvState, headers: Headers) -> None:
    pool = state.pool
    pool.leases = dict(Counter(b for s in state.streams.values() for b in s.blocks()))
    pool.epochs = {block: int(headers["epoch"][0, block]) for block in pool.leases}
    for stream in state.streams.values():
        for block in stream.blocks():
            if (headers["state"][:, block] == pages.OPEN).all():
                pool.writers[block] = _writer(headers, block)
            elif (headers["state"][:, block] != pages.SEALED).any():
                prefills = block in stream.prefill_table
                pool.writers[block] = stream.prefill_writer if prefills else stream.decode_writer


def _writer(headers: Headers, block: int) -> str:
    writer = headers["writer"][0, block].tobytes()
    return writer.hex() if any(writer) else ""


def _restore_quarantine(arena: Arena, state: KvState, headers: Headers) -> None:
    held_back = (headers["quarantined"] == 1).any(axis=0)
    for block in np.flatnonzero(held_back).tolist():
        if block in state.pool.leases:
            continue
        group = int(np.flatnonzero(headers["quarantined"][:, block])[0])
        writer = headers["writer"][group, block].tobytes().hex()
        owner = int(headers["owner"][group, block]) - 1
        request_id = StreamRecord(arena, owner).text("request_id") if owner >= 0 else ""
        epoch = int(headers["epoch"][group, block])
        state.pool.quarantined[block] = Quarantine(writer, request_id, epoch)


def _restore_index(arena: Arena, state: KvState, headers: Headers) -> None:
    """A block is cached when all its pages are sealed under one key with an intact checksum, and no
    stream is still at work on it."""
    pool = state.pool
    working = {b for s in state.streams.values() for b in s.blocks()}
    for stream in state.streams.values():
        done = StreamRecord(arena, stream.slot).first()[1]  # prefill writes no more
        working -= set(
            stream.prefill_table[: stream.prompt_blocks if done else stream.cached_blocks]
        )
    sealed = (headers["state"] == pages.SEALED).all(axis=0)
    same = (headers["key"] == headers["key"][0]).all(axis=0)
    whole = (headers["tokens"] == PAGE_TOKENS).all(axis=0)
    candidates = np.flatnonzero(sealed & same & whole)
    oldest_first = candidates[np.argsort(headers["stamp"][0, candidates], kind="stable")].tolist()
    # Of two blocks under one key, the one that no stream holds was the cached one.
    for block in sorted(oldest_first, key=lambda block: block in pool.leases):
        if block in pool.quarantined or block in working or not _intact(arena, headers, block):
            continue
        if state.index.add(headers["key"][0, block].tobytes(), block):
            pool.free.discard(block)
            pool.leases[block] = pool.leases.get(block, 0) + 1
            pool.writers.pop(block, None)


def _intact(arena: Arena, headers: Headers, block: int) -> bool:
    return all(
        arena.native.seal_checksum(arena.page_id(block, group), PAGE_TOKENS)
        == headers["checksum"][group, block]
        for group in range(arena.layout.groups)
    )
