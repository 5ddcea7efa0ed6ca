"""Flipping single bytes of pages: the right bytes, one at a time, and known for what they are."""

from __future__ import annotations

from pathlib import Path
from random import Random

import numpy as np
import pytest

from baton.chaos.flip import (
    INERT_FIELDS,
    SEAL_FIELDS,
    Held,
    announced,
    cached,
    committed,
    find_stream,
    flip,
    flip_file,
)
from services.kv.arena import SEALED, Arena
from services.kv.identity import block_keys
from services.kv.layout import PAGE_TOKENS
from services.kv.verify import verify_rows
from services.ops.errors import CorruptKv
from tests.support.arenas import (
    ROOT,
    fill_page,
    identity_of,
    open_record,
    small_arena,
    some_tokens,
    stamp,
)

TOKENS = some_tokens(2 * PAGE_TOKENS)


@pytest.fixture
def arena(tmp_path: Path) -> Arena:
    """Two sealed blocks, 0 and 1, of TOKENS."""
    arena = small_arena(tmp_path / "arena")
    identity = identity_of(TOKENS)
    for block in range(2):
        seeds = identity.seeds[block * PAGE_TOKENS : (block + 1) * PAGE_TOKENS]
        for group in range(arena.layout.groups):
            page = arena.page_id(block, group)
            fill_page(arena, page, seed=page)
            stamp(arena, page, seeds, group)
            arena.native.seal(page, group, PAGE_TOKENS, identity.key(block))
    return arena


def content(arena: Arena) -> np.ndarray:
    return np.frombuffer(arena.buffer, np.uint8).copy()


def intact(arena: Arena, blocks: int = 2) -> bool:
    try:
        for group in range(arena.layout.groups):
            table = np.arange(blocks, dtype=np.uint32)
            verify_rows(arena, table, identity_of(TOKENS), group, 0, blocks * PAGE_TOKENS)
    except CorruptKv:
        return False
    return True


def test_one_flip_changes_one_byte(arena: Arena) -> None:
    """Of the block that was meant, wherever it is."""
    rng = Random(1)
    parts = set()
    plain = arena.buffer[:]
    for _ in range(300):
        arena.buffer[:] = plain
        before = content(arena)
        done = flip(arena, Held(1, PAGE_TOKENS), rng)
        changed = np.flatnonzero(before != content(arena))
        assert len(changed) == 1
        assert done.page in [arena.page_id(1, group) for group in range(arena.layout.groups)]
        parts.add(done.part)
    assert parts == {"payload", "row_crc", *SEAL_FIELDS, *INERT_FIELDS}


def test_every_flip_in_a_row_is_noticed(arena: Arena) -> None:
    """Those of payload and row checksums by any reader of the rows; flips of bytes that nobody reads
    leave the rows intact."""
    rng = Random(2)
    plain = arena.buffer[:]
    for _ in range(200):
        done = flip(arena, Held(rng.randrange(2), PAGE_TOKENS), rng)
        if done.part in ("payload", "row_crc"):
            assert done.matters
            assert not intact(arena), done
        elif not done.matters:
            assert intact(arena), done
        arena.buffer[:] = plain


def test_rows_that_nobody_reads_are_left_alone(arena: Arena) -> None:
    """In an open tail only committed rows are flipped."""
    rng = Random(3)
    pages = [arena.page_id(0, group) for group in range(arena.layout.groups)]
    before = [arena.page(page).copy() for page in pages]
    for _ in range(100):
        flip(arena, Held(0, 5), rng)
    for page, was in zip(pages, before, strict=True):
        changed = (arena.page(page) != was).nonzero()[-2]  # [layer, K/V, head, row, ...]
        assert len(changed)
        assert max(changed) < 5


def test_streams_and_their_rows_are_found(arena: Arena) -> None:
    """The prompt's blocks at the hand-over; with the committed ones of decode, the open tail too."""
    record = open_record(arena, 2, prompt=100)
    record.fixed["request_id"] = b"me"
    record.write_plan(prefill_table=[3, 4], decode_table=[3, 5, 6])
    assert find_stream(arena, "nobody") is None
    found = find_stream(arena, "me")
    assert found is not None
    assert announced(found) == [Held(3, 64), Held(4, 36)]
    for step in range(30):
        record.advance(5, step + 1)
    assert committed(found) == [Held(3, 64), Held(5, 64), Held(6, 2)]


def test_cached_blocks_are_found_by_their_keys(arena: Arena) -> None:
    """As the store's index finds them: not the block that holds the prompt's last token, and none
    behind one that is missing."""
    keys = block_keys(ROOT, TOKENS)
    assert (arena.headers["key"][:2] == np.array([np.void(key) for key in keys])).all()
    assert (arena.headers["state"][:2] == SEALED).all()
    assert cached(arena, "tenant", [*TOKENS.tolist(), 7]) == [Held(0, 64), Held(1, 64)]
    assert cached(arena, "tenant", TOKENS.tolist()) == [Held(0, 64)]
    assert cached(arena, "another", TOKENS.tolist()) == []
    arena.headers["key"][0] = np.void(bytes(16))
    assert cached(arena, "tenant", [*TOKENS.tolist(), 7]) == []


def test_one_byte_of_a_file_changes(tmp_path: Path) -> None:
    """Head, content and checksum are all hit, and the part it names is the one that changed."""
    path, plain, parts = tmp_path / "block.kv", bytes(range(256)) * 2, set()
    for seed in range(60):
        path.write_bytes(plain)
        done = flip_file(path, Random(seed))
        now = path.read_bytes()
        [changed] = [n for n, byte in enumerate(plain) if now[n] != byte]
        begin = {"file_head": 0, "file_content": 64, "file_checksum": 508}[done.part]
        assert changed == begin + done.offset
        parts.add(done.part)
    assert parts == {"file_head", "file_content", "file_checksum"}
