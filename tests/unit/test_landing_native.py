"""Pages that come from another arena: copied out of any frames, verified, and sealed, in native code."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.kv.arena import SEALED, Arena
from services.kv.layout import PAGE_TOKENS
from tests.support import arenas

COUNT = 3  # pages that travel


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Arena, Arena]:
    here, there = (
        arenas.small_arena(tmp_path_factory.mktemp(name), arena_bytes=4 << 20)
        for name in ("from", "to")
    )
    return here, there


def sent(arena: Arena, group: int, seeds: np.ndarray) -> tuple[bytes, np.ndarray]:
    """What the first pages of a group look like on the wire."""
    for block in range(COUNT):
        page = arena.page_id(block, group)
        arenas.fill_page(arena, page, seed=block + 1)
        arenas.stamp(arena, page, seeds[block * PAGE_TOKENS :][:PAGE_TOKENS], group)
    pages = np.arange(COUNT) + arena.page_id(0, group)
    return bytes(arena.run(group, 0, COUNT)), arena.headers["row_crc"][pages].copy()


@given(data=st.data())
def test_whatever_the_frames_the_pages_are_the_same(
    pair: tuple[Arena, Arena], data: st.DataObject
) -> None:
    here, there = pair
    group, skip = data.draw(st.integers(0, 1)), data.draw(st.integers(0, COUNT - 1))
    seeds = np.arange(COUNT * PAGE_TOKENS, dtype=np.uint32) * np.uint32(2654435761)
    content, sums = sent(here, group, seeds)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(content)), max_size=5)))
    frames = [content[a:b] for a, b in zip([0, *cuts], [*cuts, len(content)], strict=True)]
    blocks = np.array(
        data.draw(st.permutations(range(there.plan.blocks)))[: COUNT - skip], np.uint32
    )
    rows = data.draw(st.integers(0, len(blocks) * PAGE_TOKENS))
    wanted = seeds[skip * PAGE_TOKENS :][:rows]
    bad = there.native.land(blocks, group, frames, skip, sums[skip:], wanted)
    assert bad == -1
    size = here.layout.page_bytes
    for at, block in enumerate(blocks.tolist(), skip):
        assert bytes(there.run(group, block, 1)) == content[at * size : (at + 1) * size]
        stored = there.headers["row_crc"][there.page_id(block, group)]
        assert stored.tolist() == sums[at].tolist()


@given(row=st.integers(0, COUNT * PAGE_TOKENS - 1), sums_too=st.booleans())
def test_the_first_row_that_differs_is_told(
    pair: tuple[Arena, Arena], row: int, sums_too: bool
) -> None:
    """In the pages or in the checksums that came with them."""
    here, there = pair
    seeds = np.arange(COUNT * PAGE_TOKENS, dtype=np.uint32) * np.uint32(2654435761)
    content, sums = sent(here, 0, seeds)
    damaged, page = bytearray(content), row // PAGE_TOKENS
    if sums_too:
        sums[page, row % PAGE_TOKENS] ^= 1
    else:
        heads = np.frombuffer(damaged, here.layout.dtype).reshape(COUNT, *here.layout.page_shape)
        at = heads[page, ..., row % PAGE_TOKENS, :]
        at[...] = at[...] * 0 + 1
    blocks = np.arange(COUNT, dtype=np.uint32)
    assert there.native.land(blocks, 0, [bytes(damaged)], 0, sums, seeds) == row
    assert there.native.land(blocks, 0, [bytes(damaged)], 0, sums, seeds[:row]) == -1


@pytest.mark.parametrize(
    ("blocks", "group", "pages", "skip", "sums", "seeds"),
    [
        ([9999], 0, 1, 0, 64, 64),
        ([0], 2, 1, 0, 64, 64),
        ([0], 0, 0, 0, 64, 64),
        ([0], 0, 1, 1, 64, 64),
        ([0], 0, 1, 0, 63, 63),
        ([0], 0, 1, 0, 64, 65),
    ],
    ids=["block", "group", "no frame", "skipped past the end", "sums", "seeds"],
)
def test_what_does_not_fit_is_refused(
    pair: tuple[Arena, Arena], blocks: list[int], group: int, pages: int, skip: int, sums: int,
    seeds: int,
) -> None:  # fmt: skip
    """And no byte of the arena has changed."""
    _, there = pair
    before = there.headers.tobytes()
    frames = [bytes(there.layout.page_bytes * pages)]
    with pytest.raises((IndexError, ValueError)):
        there.native.land(
            np.array(blocks, np.uint32), group, frames, skip, np.zeros(sums, np.uint32),
            np.zeros(seeds, np.uint32),
        )  # fmt: skip
    assert there.headers.tobytes() == before


@pytest.mark.parametrize(
    "strided",
    [
        lambda view: view[::-1],
        lambda view: np.repeat(view, 2)[::2],
        lambda view: view.reshape(2, -1).copy(order="F"),
        lambda view: np.broadcast_to(view[:1], view.shape),
    ],
    ids=["backwards", "every other byte", "columns", "one byte over and over"],
)
def test_frames_with_strides_are_refused(
    pair: tuple[Arena, Arena], strided: Callable[[np.ndarray], np.ndarray]
) -> None:
    """Wherever such a frame stands; no byte of the arena has changed."""
    _, there = pair
    page = np.arange(there.layout.page_bytes, dtype=np.uint8)
    before = there.headers.tobytes(), bytes(there.run(0, 0, 2))
    for frames in ([strided(page), page], [page, strided(page)]):
        with pytest.raises(ValueError, match="frames: must be contiguous"):
            there.native.land(
                np.arange(2, dtype=np.uint32), 0, frames, 0,
                np.zeros(2 * PAGE_TOKENS, np.uint32), np.zeros(0, np.uint32),
            )  # fmt: skip
    assert (there.headers.tobytes(), bytes(there.run(0, 0, 2))) == before


def test_frames_of_any_shape_are_taken_when_they_lie_in_one_piece(
    pair: tuple[Arena, Arena],
) -> None:
    """Of several dimensions, of one element, of none at all, and of wider elements."""
    here, there = pair
    seeds = np.arange(COUNT * PAGE_TOKENS, dtype=np.uint32)
    content, sums = sent(here, 0, seeds)
    whole = np.frombuffer(content, np.uint8)
    size = here.layout.page_bytes
    frames = [
        whole[:size].reshape(4, 2, -1), whole[size : size + 1][::-1], whole[:0][::-1],
        memoryview(content)[size + 1 : 2 * size], whole[2 * size :].view(np.uint32)[:, None],
    ]  # fmt: skip
    assert there.native.land(np.arange(3, dtype=np.uint32), 0, frames, 0, sums, seeds) == -1
    assert bytes(there.run(0, 0, COUNT)) == content


def test_sealed_blocks_are_as_if_sealed_one_by_one(pair: tuple[Arena, Arena]) -> None:
    here, there = pair
    blocks, keys = np.array([2, 0], np.uint32), bytes(range(32))
    for arena in pair:
        arena.headers["row_crc"][:] = 7
    there.native.seal_blocks(blocks, 1, keys)
    for at, block in enumerate(blocks.tolist()):
        page = here.page_id(block, 1)
        here.native.seal(page, 1, PAGE_TOKENS, keys[16 * at : 16 * at + 16])
        for name in ("state", "tokens", "key", "checksum"):
            assert here.headers[name][page].tobytes() == there.headers[name][page].tobytes()
        assert there.headers["state"][page] == SEALED
    with pytest.raises(ValueError, match="keys"):
        there.native.seal_blocks(blocks, 1, keys[:-1])
