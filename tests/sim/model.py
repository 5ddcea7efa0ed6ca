"""A model of a few lines: a token is a function of the K and V that lie in the pages of its sequence,
so whoever reads a page that is not his gives another token. Also what every request must answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
from numpy.typing import NDArray

from services.engine.backend import Rows
from services.kv.arena import Arena
from services.kv.layout import PAGE_TOKENS

VOCAB = 64
CONTEXT = 256
_WEIGHTS = np.random.default_rng(7).integers(1, 1 << 16, CONTEXT).astype(np.int64)
GROUP_S = 0.001  # what computing one layer group takes


def values(tokens: NDArray[np.int32], positions: NDArray[np.int32]) -> NDArray[np.int64]:
    """What K and V of these tokens are, one number a row."""
    return (tokens.astype(np.int64) * 977 + positions.astype(np.int64) * 131 + 17) & 0xFFFF


def _token(rows: NDArray[np.int64]) -> int:
    return int((rows * _WEIGHTS[: len(rows)]).sum() >> 5) % VOCAB


@cache
def answer(prompt: tuple[int, ...], count: int) -> tuple[int, ...]:
    """The first `count` tokens of the only right answer."""
    tokens = list(prompt)
    for _ in range(count):
        ids = np.array(tokens, np.int32)
        tokens.append(_token(values(ids, np.arange(len(ids), dtype=np.int32))))
    return tuple(tokens[len(prompt) :])


class TinyBackend:
    """`Backend` over one arena. `compute` is called before each layer group: time passes there, and
    the process may die or be paused. `writing` are the blocks that a pass under way will still write."""

    numerics = "tiny"

    def __init__(
        self, arena: Arena, compute: Callable[[int], None], mine: Callable[[int], bool]
    ) -> None:
        """`mine`: whether a block of the table is this worker's to write, now or in a later pass."""
        self._arena, self._compute, self._mine = arena, compute, mine
        self._rows: Rows | None = None
        self.writing: set[int] = set()

    def begin(self, rows: Rows) -> None:
        self._rows = rows
        self.writing.clear()
        self.writing.update(rows.tables[rows.sequence, rows.positions // PAGE_TOKENS, 0].tolist())
        first = int(rows.positions[0]) // PAGE_TOKENS
        self.writing.update(filter(self._mine, rows.tables[0, first:, 0].tolist()))

    def run_group(self, group: int) -> None:
        rows = self._rows
        assert rows is not None
        self._compute(group)
        pages = rows.tables[rows.sequence, rows.positions // PAGE_TOKENS, group]
        data = values(rows.tokens, rows.positions)
        for page in np.unique(pages):
            here = pages == page
            at = rows.positions[here] % PAGE_TOKENS
            view = self._arena.page(int(page))
            view[:, :, :, at] = data[here].astype(view.dtype)[:, None]

    def logits(self, which: NDArray[np.int32]) -> NDArray[np.float32]:
        rows = self._rows
        assert rows is not None
        self.writing.clear()
        out = np.zeros((len(which), VOCAB), np.float32)
        for number, row in enumerate(which):
            table = rows.tables[rows.sequence[row]]
            out[number, self._read(table, int(rows.positions[row]) + 1)] = 1.0
        return out

    def _read(self, table: NDArray[np.uint32], length: int) -> int:
        """The token that follows, from what lies in the pages of every layer group."""
        blocks = -(-length // PAGE_TOKENS)
        found = []
        for group in range(self._arena.layout.groups):
            pages: Sequence[int] = table[:blocks, group].tolist()
            row = np.concatenate([self._arena.page(p)[0, group % 2, 0, :, 0] for p in pages])
            found.append(_token(row[:length].astype(np.int64)))
        # Groups that disagree give a token that is no one's.
        return found[0] if len(set(found)) == 1 else (found[0] + 1) % VOCAB
