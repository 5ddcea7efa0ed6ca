"""Runs of neighbouring blocks: what one frame carries and one copy moves. Knows the arena; knows
nothing of streams or sockets."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from services._native import crc32c
from services.kv.arena import Arena
from services.kv.layout import PAGE_TOKENS

ROW_SUMS_BYTES = PAGE_TOKENS * 4  # of one page


def runs(blocks: Sequence[int] | NDArray[np.uint32]) -> Iterator[tuple[int, int]]:
    """Neighbouring blocks as (first, count): one run is one contiguous piece of the arena."""
    start = length = -1
    for block in np.asarray(blocks).tolist():
        if block == start + length:
            length += 1
            continue
        if length > 0:
            yield start, length
        start, length = block, 1
    if length > 0:
        yield start, length


def read_pages(arena: Arena, group: int, blocks: NDArray[np.uint32]) -> list[memoryview]:
    """Row checksums and runs of whole pages, as `Landing.pages` takes them. The runs are the arena's
    own memory; the caller sees to it that nobody writes them."""
    sums = memoryview(arena.row_crcs[blocks + np.uint32(group * arena.plan.blocks)].tobytes())
    return [sums, *(arena.run(group, first, count) for first, count in runs(blocks))]


def copy_runs(
    arena: Arena, group: int, blocks: NDArray[np.uint32], frames: Sequence[memoryview],
    skip_pages: int = 0,
) -> None:  # fmt: skip
    """Copies whole pages into these blocks, one copy for each piece that is contiguous on both sides.

    frames: | page page page | page page |       blocks: | 7 8 | 3 4 5 |
    """
    at = skip_pages * arena.layout.page_bytes
    for first, count in runs(blocks):
        into, to = arena.run(group, first, count), 0
        for piece in slices(frames, at, len(into)):
            into[to : to + len(piece)] = piece
            to += len(piece)
        assert to == len(into), "the frames are shorter than the blocks"
        at += to


def slices(frames: Sequence[memoryview], begin: int, size: int) -> Iterator[memoryview]:
    """Bytes [begin, begin + size) of the frames' concatenation."""
    for frame in frames:
        if size > 0 and begin < len(frame):
            piece = frame[begin : begin + size]
            yield piece
            size -= len(piece)
        begin = max(0, begin - len(frame))


def checksum_of(frames: Sequence[bytes | memoryview]) -> int:
    """CRC32C over the frames' concatenation."""
    checksum = 0
    for frame in frames:
        checksum = crc32c(frame, checksum)
    return checksum
