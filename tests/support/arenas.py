"""Small arenas in real files, and rows of KV that look like a worker's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from services.kv.arena import Arena, create_arena, plan_arena
from services.kv.identity import RowIdentity, fingerprint, root_key
from services.kv.layout import KvLayout
from services.kv.record import StreamRecord, record_dtype

# Three layers in groups of two: the last group is shorter than its pages.
LAYOUT = KvLayout(layers=3, layers_per_group=2, kv_heads=2, head_dim=16, kv_dtype="bf16")
MAX_CONTEXT = 512
FINGERPRINT = fingerprint("weights", LAYOUT.describe(), "raw", "cpu", "cpu")
ROOT = root_key(FINGERPRINT, "tenant")


def small_arena(directory: Path, *, layout: KvLayout = LAYOUT, arena_bytes: int = 1 << 19) -> Arena:
    """A fresh arena of a few blocks, four stream records and a context of 512 tokens."""
    plan = plan_arena(
        layout, arena_bytes=arena_bytes, streams=4,
        record_bytes=record_dtype(layout, MAX_CONTEXT).itemsize, max_context=MAX_CONTEXT,
        fingerprint=FINGERPRINT, store_id="store",
    )  # fmt: skip
    return create_arena(directory, plan)


def open_record(
    arena: Arena, slot: int = 0, *, prompt: int = 100, epoch: int = 5, attempt: int = 4,
    cached: int = 0,
) -> StreamRecord:  # fmt: skip
    """A record as the store leaves it when it has opened a stream."""
    record = StreamRecord(arena, slot)
    record.fixed["prompt_tokens"] = prompt
    record.open(epoch, attempt, cached)
    return record


def identity_of(tokens: NDArray[np.int32], root: bytes = ROOT) -> RowIdentity:
    return RowIdentity(root, tokens, len(tokens))


def some_tokens(count: int, seed: int = 1) -> NDArray[np.int32]:
    return np.random.default_rng(seed).integers(0, 4096, count).astype(np.int32)


def fill_page(arena: Arena, page: int, seed: int = 2) -> None:
    """Random K and V in the whole page."""
    view = arena.page(page)
    raw = np.random.default_rng(seed).integers(0, 256, view.nbytes, np.uint8)
    view[...] = raw.view(view.dtype).reshape(view.shape)


def stamp(
    arena: Arena, page: int, seeds: NDArray[np.uint32], group: int, first_row: int = 0
) -> None:
    """Checksums of the rows that `seeds` belong to."""
    rows = np.arange(first_row, first_row + len(seeds), dtype=np.int32)
    arena.native.stamp_rows(np.full(len(rows), page, np.uint32), rows, seeds, group)


def bad_row(
    arena: Arena, page: int, seeds: NDArray[np.uint32], group: int, first_row: int = 0
) -> int:
    """The first row that fails verification, or -1."""
    rows = np.arange(first_row, first_row + len(seeds), dtype=np.int32)
    ids = np.full(len(rows), page, np.uint32)
    bad = int(arena.native.verify_rows(ids, rows, seeds, group))
    return bad if bad < 0 else first_row + bad


def write_rows(
    arena: Arena, block: int, group: int, seeds: NDArray[np.uint32], first_row: int = 0
) -> None:
    """Rows of one page that depend on their seeds alone, with their checksums: every worker writes
    the same K and V for the same tokens."""
    page, end = arena.page_id(block, group), first_row + len(seeds)
    values = (seeds & np.uint32(0xFFFF)).astype(arena.layout.dtype)
    arena.page(page)[:, :, :, first_row:end] = values[:, None]
    stamp(arena, page, seeds, group, first_row)
