"""Rebuilds the kv-store's state from what lies in the arena, after the store itself has died.

Memory is not trusted, only headers and records: an active record is a stream, a sealed group of pages
is a cached block, a page in quarantine stays there until its writer is gone. The store may have died
between any two writes: tables are replaced in one step, before the headers, so what a header says of
a block counts only where no table holds it. A header whose checksum does not fit says nothing: its
block is never taken for cached, and held back while anybody who may write it is there.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
from numpy.typing import NDArray

from services.kv import arena as pages
from services.kv.arena import PAGE_MAGIC, Arena, own_crcs
from services.kv.identity import block_keys
from services.kv.layout import PAGE_TOKENS, blocks_for
from services.kv.record import ACTIVE, NO_BLOCK, RESTING, StreamRecord
from services.kv_store.index import PrefixIndex
from services.kv_store.pool import ANYBODY, BlockPool, Quarantine
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
            waiting = _fenced(record).items()
            state.resting_slots[slot] = {(request_id, writer): since for writer, since in waiting}
    state.torn = set(np.flatnonzero(torn_blocks(arena)).tolist())
    _restore_leases(arena, state, headers)
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
        table_attempt=int(plan["table_attempt"]),
        fenced=_fenced(record), prefill_start=int(plan["prefill_start"]),
        repairs={
            index: int(plan["repair_source"][index]) - 1
            for index in np.flatnonzero(plan["repair_source"]).tolist()
        },
    )  # fmt: skip
    known = set(stream.blocks())
    mine = (headers["owner"] == record.slot + 1) & (headers["lease"] == 1)
    mine &= headers["quarantined"] == 0
    held = [*stream.repairs.values(), *np.flatnonzero(mine.all(axis=0)).tolist()]
    stream.held = [block for block in dict.fromkeys(held) if block not in known]
    return stream


def _fenced(record: StreamRecord) -> dict[str, int]:
    plan = record.plan()
    names = [bytes(name).rstrip(b"\0").decode() for name in plan["fenced"]]
    epochs = plan["fenced_epochs"].tolist()
    return {name: since for name, since in zip(names, epochs, strict=True) if name}


def _restore_leases(arena: Arena, state: KvState, headers: Headers) -> None:
    """A sealed block has no writer, unless it was sealed beyond what has been committed: by a writer
    that has been fenced and may do so again."""
    pool = state.pool
    pool.leases = dict(Counter(b for s in state.streams.values() for b in s.blocks()))
    pool.epochs = {block: int(headers["epoch"][0, block]) for block in pool.leases}
    for stream in state.streams.values():
        unfinished = _unfinished(stream, StreamRecord(arena, stream.slot))
        for block in stream.blocks():
            sealed = (headers["state"][:, block] == pages.SEALED).all()
            if sealed and block not in unfinished:
                continue
            if block in stream.held and (headers["owner"][:, block] != stream.slot + 1).any():
                continue  # a damaged one that had been shared
            told = (headers["owner"][:, block] == stream.slot + 1).all() and block not in state.torn
            prefills = block in stream.prefill_table
            present = stream.prefill_writer if prefills else stream.decode_writer
            pool.writers[block] = _writer(headers, block) if told else present


def _unfinished(stream: Stream, record: StreamRecord) -> set[int]:
    """Blocks that somebody has, or had, rows to write in."""
    end = (stream.prompt_tokens + record.commit()[1]) // PAGE_TOKENS
    tail = set() if stream.tail_source is None else {stream.tail_source}
    ready = stream.prompt_tokens if record.first()[1] else record.ready_tokens()
    prompt = stream.prefill_table[ready // PAGE_TOKENS :]
    return {*stream.decode_table[end:], *stream.held, *tail, *prompt}


def _writer(headers: Headers, block: int) -> str:
    writer = headers["writer"][0, block].tobytes()
    return writer.hex() if any(writer) else ""


def _restore_quarantine(arena: Arena, state: KvState, headers: Headers) -> None:
    for block in state.torn - set(state.pool.leases):
        state.pool.quarantined[block] = Quarantine(ANYBODY, "")
    held_back = (headers["quarantined"] == 1).any(axis=0)
    for block in np.flatnonzero(held_back).tolist():
        if block in state.pool.leases or block in state.torn:
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
    leased = (headers["lease"] == 1).all(axis=0)
    candidates = np.flatnonzero(sealed & same & whole & leased)
    oldest_first = candidates[np.argsort(headers["stamp"][0, candidates], kind="stable")].tolist()
    # Of two blocks under one key, the one that no stream holds was the cached one.
    for block in sorted(oldest_first, key=lambda block: block in pool.leases):
        if {block} & (state.torn | set(pool.quarantined) | working) or not intact(arena, block):
            continue
        if state.index.add(headers["key"][0, block].tobytes(), block):
            pool.free.discard(block)
            pool.leases[block] = pool.leases.get(block, 0) + 1
            pool.finish_writing(block)


def intact(arena: Arena, block: int) -> bool:
    """Whether all of a sealed block's row checksums are those that were sealed."""
    checksums = arena.headers["checksum"].reshape(arena.layout.groups, arena.plan.blocks)
    return all(
        arena.native.seal_checksum(arena.page_id(block, group), PAGE_TOKENS)
        == checksums[group, block]
        for group in range(arena.layout.groups)
    )


def torn_blocks(arena: Arena) -> NDArray[np.bool_]:
    """bool[blocks]: where the store's line of any page does not fit its checksum, or its place."""
    own = arena.own_headers
    ids = np.arange(arena.plan.pages)
    good = own["own_crc"] == own_crcs(own)
    good &= own["magic"] == PAGE_MAGIC
    good &= own["group"] * arena.plan.blocks + own["block"] == ids
    bad: NDArray[np.bool_] = ~good.reshape(arena.layout.groups, arena.plan.blocks).all(axis=0)
    return bad
