"""Pages: what a row's checksum vouches for, what a copy takes along, what a seal says.

Wrong, stale, torn or foreign K and V must fail here, since nothing behind this looks again.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from services import _native
from services.kv.arena import FREE, HEADER, SEALED, Arena
from services.kv.identity import RowIdentity, block_keys, fingerprint, root_key
from services.kv.layout import PAGE_TOKENS
from tests.support import arenas

TOKENS = arenas.some_tokens(PAGE_TOKENS)
SEEDS = arenas.identity_of(TOKENS).seeds
PAGE = 3


@pytest.fixture
def arena(tmp_path: Path) -> Arena:
    arena = arenas.small_arena(tmp_path)
    for page in range(arena.plan.pages):
        arenas.fill_page(arena, page, seed=page)
    return arena


def bytes_of_row(arena: Arena, page: int, row: int) -> NDArray[np.uint8]:
    """uint8[layers, K and V, heads, bytes] of one token: a view."""
    return arena.page(page).view(np.uint8)[:, :, :, row]


# --- checksums of rows ---


@pytest.mark.parametrize("group", [0, 1])
def test_rows_verify_as_they_were_stamped(arena: Arena, group: int) -> None:
    """Same bytes, same tokens, same group: every row passes."""
    arenas.stamp(arena, PAGE, SEEDS, group)
    assert arenas.bad_row(arena, PAGE, SEEDS, group) == -1


@pytest.mark.parametrize("group", [0, 1])
def test_every_byte_of_k_and_v_counts(arena: Arena, group: int) -> None:
    """One flipped bit in any byte of a row, in any layer and head of its group, fails that row."""
    arenas.stamp(arena, PAGE, SEEDS, group)
    for row in (0, 31, 63):
        cells = bytes_of_row(arena, PAGE, row)[: len(arena.layout.layers_of(group))]
        for n, at in enumerate(np.ndindex(cells.shape)):
            cells[at] ^= 1 << n % 8
            assert arenas.bad_row(arena, PAGE, SEEDS, group) == row, at
            cells[at] ^= 1 << n % 8
    assert arenas.bad_row(arena, PAGE, SEEDS, group) == -1


def test_other_rows_do_not_count(arena: Arena) -> None:
    """A row's checksum covers that row alone: a neighbour that is being written cannot fail it."""
    arenas.stamp(arena, PAGE, SEEDS, 0)
    for row in (0, 10, 63):
        before = arena.page(PAGE).copy()
        arenas.fill_page(arena, PAGE, seed=99)
        arena.page(PAGE)[:, :, :, row] = before[:, :, :, row]
        assert arenas.bad_row(arena, PAGE, SEEDS[row : row + 1], 0, row) == -1
        arena.page(PAGE)[...] = before


def test_layers_behind_a_short_group_do_not_count(arena: Arena) -> None:
    """The last group has fewer layers than its pages have room for: the rest is nobody's."""
    arenas.stamp(arena, PAGE, SEEDS, 1)
    arena.page(PAGE)[1] ^= 0xFF
    assert arenas.bad_row(arena, PAGE, SEEDS, 1) == -1
    arenas.stamp(arena, PAGE, SEEDS, 0)
    arena.page(PAGE)[1] ^= 0xFF
    assert arenas.bad_row(arena, PAGE, SEEDS, 0) == 0


@pytest.mark.parametrize("changed", [0, 20, 40])
def test_intact_rows_of_other_tokens_fail(arena: Arena, changed: int) -> None:
    """Identity: one other token in the prefix fails every row from that token on, and no earlier."""
    arenas.stamp(arena, PAGE, SEEDS, 0)
    other = TOKENS.copy()
    other[changed] += 1
    seeds = arenas.identity_of(other).seeds
    for row in range(PAGE_TOKENS):
        bad = arenas.bad_row(arena, PAGE, seeds[row : row + 1], 0, row)
        assert bad == (row if row >= changed else -1)


def test_intact_rows_of_another_place_fail(arena: Arena) -> None:
    """Identity: another layer group, another tenant, another earlier block, another row."""
    arenas.stamp(arena, PAGE, SEEDS, 0)
    tenant = arenas.identity_of(TOKENS, root_key(arenas.FINGERPRINT, "other")).seeds
    second = arenas.identity_of(np.concatenate([TOKENS, TOKENS])).seeds[PAGE_TOKENS:]
    assert arenas.bad_row(arena, PAGE, SEEDS, 1) == 0
    assert arenas.bad_row(arena, PAGE, tenant, 0) == 0
    assert arenas.bad_row(arena, PAGE, second, 0) == 0
    bytes_of_row(arena, PAGE, 8)[...] = bytes_of_row(arena, PAGE, 7)
    arena.headers["row_crc"][PAGE, 8] = arena.headers["row_crc"][PAGE, 7]
    assert arenas.bad_row(arena, PAGE, SEEDS, 0) == 8


def test_every_bit_of_a_stored_checksum_counts(arena: Arena) -> None:
    """A header hit by a bit flip fails as the page would."""
    arenas.stamp(arena, PAGE, SEEDS, 0)
    for bit in range(32):
        arena.headers["row_crc"][PAGE, 5] ^= np.uint32(1 << bit)
        assert arenas.bad_row(arena, PAGE, SEEDS, 0) == 5
        arena.headers["row_crc"][PAGE, 5] ^= np.uint32(1 << bit)


def test_stamping_touches_the_given_rows_alone(arena: Arena) -> None:
    """Other rows' checksums and all of the page stay as they are."""
    before, page = arena.headers["row_crc"].copy(), arena.page(PAGE).copy()
    arenas.stamp(arena, PAGE, SEEDS[10:20], 0, first_row=10)
    changed = np.argwhere(arena.headers["row_crc"] != before)
    assert {tuple(at) for at in changed} <= {(PAGE, row) for row in range(10, 20)}
    assert (arena.page(PAGE) == page).all()


# --- copies and seals ---


@pytest.mark.parametrize("rows", [0, 1, 17, 64])
def test_a_copy_takes_rows_and_their_checksums_only(arena: Arena, rows: int) -> None:
    """The first rows verify in their new page; the rest of it, its header's other fields and the
    source are untouched."""
    target = PAGE + 1
    arenas.stamp(arena, PAGE, SEEDS, 0)
    source, old = arena.page(PAGE).copy(), arena.page(target).copy()
    headers = arena.headers.copy()
    arena.native.copy_rows(PAGE, target, rows, 0)
    assert arenas.bad_row(arena, target, SEEDS[:rows], 0) == -1
    assert (arena.page(target)[:, :, :, :rows] == source[:, :, :, :rows]).all()
    assert (arena.page(target)[:, :, :, rows:] == old[:, :, :, rows:]).all()
    assert (arena.page(PAGE) == source).all()
    headers["row_crc"][target, :rows] = headers["row_crc"][PAGE, :rows]
    assert arena.headers.tobytes() == headers.tobytes()


def test_a_copy_of_a_short_group_takes_its_layers(arena: Arena) -> None:
    """The room behind the last layer is not copied."""
    old = arena.page(PAGE + 1).copy()
    arena.native.copy_rows(PAGE, PAGE + 1, 64, 1)
    assert (arena.page(PAGE + 1)[0] == arena.page(PAGE)[0]).all()
    assert (arena.page(PAGE + 1)[1] == old[1]).all()


def test_a_seal_says_what_the_page_holds(arena: Arena) -> None:
    """State, key, token count and the checksum over the row checksums; nothing else."""
    arenas.stamp(arena, PAGE, SEEDS, 1)
    headers = arena.headers.copy()
    assert arena.native.state(PAGE) == FREE
    arena.native.seal(PAGE, 1, PAGE_TOKENS, b"k" * 16)
    header = arena.headers[PAGE]
    assert arena.native.state(PAGE) == header["state"] == SEALED
    assert header["key"].tobytes() == b"k" * 16
    assert header["tokens"] == PAGE_TOKENS
    assert header["checksum"] == _native.crc32c(header["row_crc"].tobytes())
    for field in ("state", "key", "tokens", "checksum"):
        headers[field][PAGE] = header[field]
    assert arena.headers.tobytes() == headers.tobytes()


def test_a_seal_no_longer_fits_other_row_checksums(arena: Arena) -> None:
    """`seal_checksum` follows every sealed row's checksum and no other."""
    arenas.stamp(arena, PAGE, SEEDS, 0)
    arena.native.seal(PAGE, 0, 40, bytes(16))
    assert arena.native.seal_checksum(PAGE, 40) == arena.headers["checksum"][PAGE]
    arena.headers["row_crc"][PAGE, 40] ^= 1
    assert arena.native.seal_checksum(PAGE, 40) == arena.headers["checksum"][PAGE]
    arena.headers["row_crc"][PAGE, 39] ^= 1
    assert arena.native.seal_checksum(PAGE, 40) != arena.headers["checksum"][PAGE]


# --- CRC32C and the chain of seeds ---


def crc32c(data: bytes, seed: int = 0) -> int:
    """The definition, bit by bit."""
    crc = seed ^ 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def test_crc32c_known_answers() -> None:
    """RFC 3720, appendix B.4, and the check value of the catalogue."""
    assert _native.crc32c(b"123456789") == 0xE3069283
    assert _native.crc32c(b"") == 0
    assert _native.crc32c(bytes(32)) == 0x8A9136AA
    assert _native.crc32c(b"\xff" * 32) == 0x62A8AB43
    assert _native.crc32c(bytes(range(32))) == 0x46DD794E


@given(st.binary(max_size=70), st.integers(0, 2**32 - 1), st.integers(0, 9))
def test_crc32c_is_its_definition(data: bytes, seed: int, offset: int) -> None:
    """At every length and alignment, whatever instruction computes it."""
    assert _native.crc32c(memoryview(bytes(offset) + data)[offset:], seed) == crc32c(data, seed)


def test_crc32c_of_much_data_is_that_of_its_parts() -> None:
    """The way without the interpreter lock, for large buffers, gives the same."""
    data = np.random.default_rng(3).integers(0, 256, 200_001, np.uint8).tobytes()
    parts = 0
    for at in range(0, len(data), 1000):
        parts = _native.crc32c(data[at : at + 1000], parts)
    assert _native.crc32c(data) == parts


@given(st.integers(0, 2**32 - 1), st.lists(st.integers(0, 2**31 - 1)), st.integers(0, 20))
def test_row_seeds_chain(seed: int, ids: list[int], cut: int) -> None:
    """Each seed follows from the one before and its token: two pieces give what the whole gives."""
    tokens = np.array(ids, np.int32)
    seeds = _native.row_seeds(seed, tokens)
    assert seeds.dtype == np.uint32
    before = seed
    for i, token in enumerate(tokens):
        before = _native.crc32c(token.tobytes(), before)
        assert seeds[i] == before
    head = _native.row_seeds(seed, tokens[:cut])
    tail = _native.row_seeds(int(head[-1]) if len(head) else seed, tokens[cut:])
    assert [*head, *tail] == [*seeds]


@given(st.lists(st.integers(1, 90), min_size=1, max_size=6))
def test_an_identity_grows_as_if_it_had_been_whole(pieces: list[int]) -> None:
    """Seeds and keys depend on the tokens alone, not on how they came."""
    tokens = arenas.some_tokens(sum(pieces))
    whole = RowIdentity(arenas.ROOT, tokens, len(tokens))
    grown = RowIdentity(arenas.ROOT, tokens[:0], len(tokens))
    at = 0
    for size in pieces:
        grown.extend(tokens[at : at + size])
        at += size
    keys = block_keys(arenas.ROOT, tokens)
    assert (grown.seeds == whole.seeds).all()
    assert grown.parents == whole.parents == [arenas.ROOT, *keys]
    assert [grown.key(block) for block in range(len(keys))] == keys


def test_a_key_names_everything_before_it() -> None:
    """One other token, or another root, changes its block's key and every later one."""
    tokens = arenas.some_tokens(5 * PAGE_TOKENS)
    keys = block_keys(arenas.ROOT, tokens)
    tokens[2 * PAGE_TOKENS + 63] += 1
    other = block_keys(arenas.ROOT, tokens)
    assert [a == b for a, b in zip(keys, other, strict=True)] == [True, True, False, False, False]
    assert not set(keys) & set(block_keys(root_key(arenas.FINGERPRINT, ""), tokens))
    assert len(block_keys(arenas.ROOT, tokens[: 2 * PAGE_TOKENS + 63])) == 2


def test_a_fingerprint_holds_every_part() -> None:
    """Each part counts, and so does where one ends: nothing is shared by accident."""
    parts = ("weights", "layout", "raw", "cpu", "cpu")
    marks = {fingerprint(*parts)}
    for i in range(len(parts)):
        marks.add(fingerprint(*(p + "x" * (n == i) for n, p in enumerate(parts))))
    marks.add(fingerprint("weight", "slayout", "raw", "cpu", "cpu"))
    assert len(marks) == len(parts) + 2
    assert all(len(bytes.fromhex(mark)) == 16 for mark in marks)


# --- bounds ---


def ids(*numbers: int) -> NDArray[np.uint32]:
    return np.array(numbers, np.uint32)


def rows(*numbers: int) -> NDArray[np.int32]:
    return np.array(numbers, np.int32)


@pytest.mark.parametrize("method", ["stamp_rows", "verify_rows"])
@pytest.mark.parametrize(
    ("pages", "which", "seeds", "group"),
    [
        (ids(0, 2**31), rows(0, 0), ids(0, 0), 0),
        (ids(0), rows(64), ids(0), 0),
        (ids(0), rows(-1), ids(0), 0),
        (ids(0), rows(0), ids(0), 2),
        (ids(0), rows(0), ids(0), -1),
        (ids(0, 1), rows(0), ids(0), 0),
        (ids(0), rows(0), ids(0, 1), 0),
    ],
)
def test_rows_outside_the_arena_are_refused(
    arena: Arena, method: str, pages: NDArray[np.uint32], which: NDArray[np.int32],
    seeds: NDArray[np.uint32], group: int,
) -> None:  # fmt: skip
    """Page, row, group or length: an exception, and no row has been touched."""
    before = arena.headers.copy()
    with pytest.raises((IndexError, ValueError)):
        getattr(arena.native, method)(pages, which, seeds, group)
    assert arena.headers.tobytes() == before.tobytes()


def test_pages_outside_the_arena_are_refused(arena: Arena) -> None:
    """Every other operation checks page, group, rows and key too."""
    native, last = arena.native, arena.plan.pages
    calls: tuple[Callable[[], object], ...] = (
        lambda: native.copy_rows(last, 0, 1, 0), lambda: native.copy_rows(0, last, 1, 0),
        lambda: native.copy_rows(0, 1, 65, 0), lambda: native.copy_rows(0, 1, -1, 0),
        lambda: native.copy_rows(0, 1, 1, 2), lambda: native.seal(last, 0, 64, bytes(16)),
        lambda: native.seal(0, 2, 64, bytes(16)), lambda: native.seal(0, 0, 65, bytes(16)),
        lambda: native.seal(0, 0, 64, bytes(15)), lambda: native.seal(0, 0, 64, bytes(17)),
        lambda: native.seal_checksum(last, 64), lambda: native.seal_checksum(0, 65),
        lambda: native.state(last),
    )  # fmt: skip
    for call in calls:
        with pytest.raises((IndexError, ValueError)):
            call()


def test_arrays_of_another_type_are_refused(arena: Arena) -> None:
    """No silent conversion: a wrong dtype is a mistake."""
    with pytest.raises(TypeError):
        arena.native.verify_rows(np.array([0], np.int64), rows(0), ids(0), 0)


def geometry(**change: int) -> _native.Geometry:
    layout = arenas.LAYOUT
    fields = {
        "header_offset": 0, "pages_offset": 4096, "page_bytes": layout.page_bytes, "page_count": 2,
        "layers": layout.layers, "layers_per_group": layout.layers_per_group,
        "kv_heads": layout.kv_heads, "head_dim": layout.head_dim,
        "element_bytes": layout.dtype.itemsize,
    }  # fmt: skip
    return _native.Geometry(**{**fields, **change})


@pytest.mark.parametrize(
    "change",
    [
        {"page_count": 3}, {"header_offset": 32}, {"pages_offset": 4096 + 32},
        {"page_bytes": arenas.LAYOUT.page_bytes - 32}, {"pages_offset": 512},
        {"page_count": 1 << 58}, {"page_bytes": arenas.LAYOUT.page_bytes // 2},
    ],
)  # fmt: skip
def test_a_geometry_that_does_not_fit_is_refused(change: dict[str, int]) -> None:
    """Too many pages, also by overflow; parts off their cache lines, over one another, or smaller
    than a page's rows."""
    buffer = bytearray(4096 + 2 * arenas.LAYOUT.page_bytes)
    _native.Arena(buffer, geometry())
    with pytest.raises(ValueError, match="arena"):
        _native.Arena(buffer, geometry(**change))


def test_the_header_is_whole_cache_lines() -> None:
    """Python and C++ see the same header."""
    assert HEADER.itemsize == _native.PAGE_HEADER_BYTES
    assert HEADER.itemsize % 64 == 0
    assert PAGE_TOKENS == _native.PAGE_TOKENS
