"""Row checksums are CRC32C as a library of its own computes it, whatever the shape of the rows and
however many are computed side by side."""

from __future__ import annotations

import functools
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from services import _native
from services.kv.arena import Arena
from services.kv.layout import PAGE_TOKENS, KvLayout
from tests.support import arenas

DEADLINE_S = 20.0


def group_seed(seed: int, group: int) -> int:
    """How arena.h tells the layer groups of one token apart."""
    return (seed ^ (group + 1) * 0x9E3779B1) & 0xFFFFFFFF


def expected(arena: Arena, page: int, row: int, seed: int, group: int) -> int:
    """One row's checksum by the library: the pieces of all layers and heads, in order."""
    view = arena.page(page)[: len(arena.layout.layers_of(group)), :, :, row]
    return int(google_crc32c.extend(group_seed(seed, group), view.tobytes()))


@pytest.mark.parametrize("kv_dtype", ["bf16", "f32"])
@pytest.mark.parametrize("head_dim", [1, 2, 16, 33, 48, 64, 96, 128])
def test_stamped_rows_are_crc32c(tmp_path: Path, head_dim: int, kv_dtype: str) -> None:
    """Rows shorter and longer than a cache line, and of every remainder."""
    layout = KvLayout(
        layers=3, layers_per_group=2, kv_heads=2, head_dim=head_dim, kv_dtype=kv_dtype
    )
    if layout.page_bytes % 64:
        pytest.skip("pages are whole cache lines")
    arena = arenas.small_arena(tmp_path, layout=layout, arena_bytes=4 << 20)
    draw = np.random.default_rng(head_dim)
    for group in range(layout.groups):
        for count in (1, 3, 4, 5, 64):
            page = arena.page_id(count % arena.plan.blocks, group)
            arenas.fill_page(arena, page, seed=count)
            seeds = draw.integers(0, 2**32, count, np.uint32)
            arenas.stamp(arena, page, seeds, group)
            stored = arena.headers["row_crc"][page, :count]
            rows = [expected(arena, page, row, int(seeds[row]), group) for row in range(count)]
            assert stored.tolist() == rows
            assert arenas.bad_row(arena, page, seeds, group) == -1


@given(st.data())
def test_rows_of_any_pages_in_any_order(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """A batch may mix pages and rows, as a decode's step does."""
    arena = _shared(tmp_path_factory)
    cells = [(page, row) for page in range(arena.plan.blocks) for row in range(PAGE_TOKENS)]
    chosen = data.draw(st.lists(st.sampled_from(cells), min_size=1, max_size=150, unique=True))
    pages = np.array([page for page, _ in chosen], np.uint32)
    rows = np.array([row for _, row in chosen], np.int32)
    seeds = np.arange(len(chosen), dtype=np.uint32) * np.uint32(2654435761)
    arena.native.stamp_rows(pages, rows, seeds, 0)
    stored = arena.headers["row_crc"][pages, rows].tolist()
    assert stored == [
        expected(arena, int(p), int(r), int(s), 0)
        for p, r, s in zip(pages, rows, seeds, strict=True)
    ]
    bad = data.draw(st.integers(0, len(chosen) - 1))
    for at in (bad, len(chosen) - 1):  # the first bad one is told, not the last
        arena.headers["row_crc"][pages[at], rows[at]] ^= 1
    first = bad if bad < len(chosen) - 1 else -1  # flipped twice, the last one is whole again
    assert arena.native.verify_rows(pages, rows, seeds, 0) == first


@given(st.data())
def test_tokens_of_a_block_table_are_its_rows(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """By table and position: the same checksums as by page and row, and the first bad token."""
    arena, group = _shared(tmp_path_factory), data.draw(st.integers(0, 1))
    blocks = np.array(data.draw(st.permutations(range(arena.plan.blocks))), np.uint32)
    end = data.draw(st.integers(1, len(blocks) * PAGE_TOKENS))
    begin = data.draw(st.integers(0, end - 1))
    positions = np.arange(begin, end, dtype=np.int32)
    seeds = np.arange(end - begin, dtype=np.uint32) * np.uint32(2654435761)
    arena.native.stamp_tokens(blocks, begin, seeds, group)
    pages = blocks[positions // PAGE_TOKENS] + np.uint32(group * arena.plan.blocks)
    assert arena.native.verify_rows(pages, positions % PAGE_TOKENS, seeds, group) == -1
    assert arena.native.verify_tokens(blocks, begin, seeds, group) == -1
    bad = data.draw(st.integers(begin, end - 1))
    arena.headers["row_crc"][pages[bad - begin], bad % PAGE_TOKENS] ^= 1
    assert arena.native.verify_tokens(blocks, begin, seeds, group) == bad


@pytest.mark.parametrize("method", ["stamp_tokens", "verify_tokens"])
@pytest.mark.parametrize(
    ("blocks", "begin", "count", "group"),
    [([0], 0, 65, 0), ([0], 64, 1, 0), ([0], -1, 1, 0), ([9999], 0, 1, 0), ([0], 0, 1, 2)],
)
def test_tokens_outside_the_arena_are_refused(
    tmp_path_factory: pytest.TempPathFactory, method: str, blocks: list[int], begin: int,
    count: int, group: int,
) -> None:  # fmt: skip
    """Position, block or group: an exception, and no row has been touched."""
    arena = _shared(tmp_path_factory)
    before = arena.headers.tobytes()
    with pytest.raises((IndexError, ValueError)):
        getattr(arena.native, method)(
            np.array(blocks, np.uint32), begin, np.zeros(count, np.uint32), group
        )
    assert arena.headers.tobytes() == before


_arenas: dict[str, Arena] = {}


def _shared(factory: pytest.TempPathFactory) -> Arena:
    """One arena for all examples of a property."""
    if "arena" not in _arenas:
        _arenas["arena"] = arena = arenas.small_arena(factory.mktemp("arena"))
        for page in range(arena.plan.pages):
            arenas.fill_page(arena, page, seed=page)
    return _arenas["arena"]


@given(st.binary(max_size=300), st.integers(0, 2**32 - 1))
def test_crc32c_is_the_librarys(data: bytes, seed: int) -> None:
    assert _native.crc32c(data, seed) == google_crc32c.extend(seed, data)


@pytest.mark.parametrize("size", [16383, 16384, 16385, 32768, 100_000, 1 << 20])
def test_long_buffers_are_crc32c(size: int) -> None:
    """Cut into pieces that are computed side by side, and joined."""
    data = np.random.default_rng(size).integers(0, 256, size + 3, np.uint8).tobytes()
    for offset in (0, 3):
        piece = memoryview(data)[offset : offset + size]
        for seed in (0, 0xDEADBEEF):
            assert _native.crc32c(piece, seed) == google_crc32c.extend(seed, piece.tobytes())


@pytest.fixture
def no_preemption() -> Iterator[None]:
    """The interpreter lock changes hands only where somebody lets go of it."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1000)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("no_preemption")
@pytest.mark.parametrize("method", ["stamp_rows", "verify_rows", "stamp_tokens", "verify_tokens"])
def test_long_calls_let_go_of_the_interpreter(tmp_path: Path, method: str) -> None:
    """Other threads go on while many rows are computed: announcements are taken, RPCs answered."""
    layout = KvLayout(layers=2, layers_per_group=2, kv_heads=4, head_dim=64, kv_dtype="bf16")
    arena = arenas.small_arena(tmp_path, layout=layout, arena_bytes=8 << 20)
    pages, rows, seeds = _every_row(arena)
    arena.native.stamp_rows(pages, rows, seeds, 0)
    arguments = (pages, rows, seeds) if method.endswith("rows") else (pages[::64].copy(), 0, seeds)
    call = functools.partial(getattr(arena.native, method), *arguments)
    gate, inside, seen = threading.Lock(), [True], list[bool]()
    gate.acquire()

    def other() -> None:
        with gate:
            seen.append(inside[0])

    thread = threading.Thread(target=other)
    thread.start()
    end = time.monotonic() + DEADLINE_S
    gate.release()
    while not seen and time.monotonic() < end:
        call(0)
    inside[0] = False
    thread.join()
    assert seen == [True]


def _every_row(arena: Arena) -> tuple[NDArray[np.uint32], NDArray[np.int32], NDArray[np.uint32]]:
    """Page, row and seed of every row of the first layer group."""
    count = arena.plan.blocks * PAGE_TOKENS
    pages = np.repeat(np.arange(arena.plan.blocks, dtype=np.uint32), PAGE_TOKENS)
    rows = np.tile(np.arange(PAGE_TOKENS, dtype=np.int32), arena.plan.blocks)
    return pages, rows, np.arange(count, dtype=np.uint32)
