"""Computes one damaged block again, from the tokens and the KV before it, and proves that it is the
block that was stored. Nothing else of the stream is computed: a row's K and V depend on nothing but
the tokens up to it (design.md section 5), so the bytes must come out the same.

    table:   [ block 0 | ... | fresh block i | ... ]      damaged: the block that stood at i

The proof, row by row and layer group by layer group: the checksum of the new row is the one that was
stored, or else the new bytes are those that were stored, and only the checksum was damaged.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from services.engine.backend import Backend, Rows
from services.kv.arena import Arena
from services.kv.identity import RowIdentity
from services.kv.layout import PAGE_TOKENS
from services.kv.verify import sealed
from services.ops.errors import CorruptKv


@dataclass(frozen=True)
class Repair:
    """Block `index` of a sequence, its rows up to `end` tokens; `damaged` holds what was stored."""

    index: int
    damaged: int
    end: int

    @property
    def rows(self) -> int:
        return min(PAGE_TOKENS, self.end - self.index * PAGE_TOKENS)


def open_repairs(
    arena: Arena, sources: NDArray[np.uint32], blocks: NDArray[np.uint32], end: int
) -> list[Repair]:
    """What is still to be repaired among the first `end` tokens of a sequence, in order.

    `sources`: the plan's `repair_source`; `blocks`: the sequence's table. A block that has been sealed
    since has been repaired.
    """
    return [
        Repair(index, int(sources[index]) - 1, end)
        for index in np.flatnonzero(sources).tolist()
        if index * PAGE_TOKENS < end and not sealed(arena, int(blocks[index]))
    ]


def repair(
    backend: Backend, arena: Arena, identity: RowIdentity, tokens: NDArray[np.int32],
    blocks: NDArray[np.uint32], todo: Repair, *, seal: bool = True,
) -> int:  # fmt: skip
    """Fills `blocks[todo.index]`, which the caller may write; every row before it is verified. With
    `seal` a complete block is sealed.

    tokens: int32[>= todo.end]. Gives the rows that were computed. Raises CorruptKv, irreparable, when
    they are not what was stored.
    """
    begin = todo.index * PAGE_TOKENS
    positions = np.arange(begin, begin + todo.rows, dtype=np.int32)
    in_page = positions - np.int32(begin)
    table = arena.table(blocks)
    sequence = np.zeros(len(positions), np.int32)
    backend.begin(Rows(tokens[positions], positions, sequence, table[None]))
    for group in range(arena.layout.groups):
        backend.run_group(group)
        page = int(table[todo.index, group])
        ids = np.full(len(positions), page, np.uint32)
        arena.native.stamp_rows(ids, in_page, identity.seeds[positions], group)
        if not _same(arena, page, arena.page_id(todo.damaged, group), todo.rows, group):
            raise CorruptKv(
                f"block {todo.index}, layer group {group}: computed again, it is another",
                [todo.index], irreparable=True,
            )  # fmt: skip
    if seal and todo.rows == PAGE_TOKENS:
        for group in range(arena.layout.groups):
            page = int(table[todo.index, group])
            arena.native.seal(page, group, PAGE_TOKENS, identity.key(todo.index))
    return todo.rows


def _same(arena: Arena, page: int, stored: int, rows: int, group: int) -> bool:
    layers = len(arena.layout.layers_of(group))
    checksums = arena.headers["row_crc"]
    same = checksums[page][:rows] == checksums[stored][:rows]
    for row in np.flatnonzero(~same).tolist():
        now, then = (arena.page(p)[:layers, :, :, row].tobytes() for p in (page, stored))
        if now != then:
            return False
    return True
