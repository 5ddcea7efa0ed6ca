"""The store's own line of every page header: it alone writes it, and it keeps a copy in its memory.

One line is written in one step and carries a checksum, so a store that starts anew knows which lines
to believe. The copy is what a line is compared with while the store runs: a flipped bit is mended
before anybody has to believe it.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from numpy.typing import NDArray

from services.kv import arena as pages
from services.kv.arena import PAGE_MAGIC, Arena, own_crcs
from services.kv_store.state import KvState


class HeaderBook:
    """The lines of one arena, [groups x blocks] of them."""

    def __init__(self, arena: Arena) -> None:
        self._arena = arena
        self._own: NDArray[np.void] = arena.own_headers.copy()

    def write(self, block: int, **fields: Any) -> None:
        """Sets fields in the headers of all pages of a block."""
        where = slice(block, None, self._arena.plan.blocks)
        lines = self._own[where]
        for name, value in fields.items():
            lines[name] = value
        lines["own_crc"] = own_crcs(lines)
        self._arena.own_headers[where] = lines

    def make(self, block: int, **fields: Any) -> None:
        """Writes whole lines anew: nothing of what lay there is believed."""
        where = slice(block, None, self._arena.plan.blocks)
        lines = self._own[where]
        lines[...] = np.zeros((), lines.dtype)
        lines["magic"], lines["version"], lines["block"] = PAGE_MAGIC, 1, block
        lines["group"] = np.arange(self._arena.layout.groups)
        self.write(block, **fields)

    def follow(self, state: KvState, owner: int) -> None:
        """Brings the headers of all blocks whose place has changed up to the state. Those that have
        been leased belong to `owner`, a slot plus one, or 0 to none."""
        pool = state.pool
        changed, taken = pool.drain_changes()
        for block in changed:
            parts = self._arena.headers[block :: self._arena.plan.blocks]
            if block in pool.quarantined:
                writer = _writer_key(pool.quarantined[block].writer)
                self.write(block, quarantined=1, writer=writer)
            elif block in taken:
                parts["state"] = pages.OPEN  # first: what follows belongs to it
                parts["tokens"] = 0
                self.write(
                    block, lease=1, owner=owner, writer=_writer_key(pool.writers.get(block, "")),
                    quarantined=0, epoch=pool.epochs.get(block, 0), stamp=time.time_ns(),
                )  # fmt: skip
            elif block in state.index:
                self.write(block, owner=0, writer=_writer_key(""))
            elif block in pool.leases:
                self.write(block, writer=_writer_key(pool.writers.get(block, "")))
            else:
                self.write(block, lease=0, owner=0, quarantined=0)
                parts["state"] = pages.FREE

    def adopt(self, state: KvState) -> int:
        """After a rebuild: writes anew the headers that were found damaged, gives their number, and
        those whose blocks have become cached by it."""
        pool = state.pool
        owners = {b: s.slot + 1 for s in state.streams.values() for b in s.blocks()}
        for block in state.torn:
            waiting = pool.quarantined.get(block)
            writer = waiting.writer if waiting else pool.writers.get(block, "")
            self.make(
                block, lease=block not in pool.free, owner=owners.get(block, 0),
                writer=_writer_key(writer), epoch=pool.epochs.get(block, 0),
                quarantined=waiting is not None, stamp=time.time_ns(),
            )  # fmt: skip
            if block in pool.free:
                self._arena.headers["state"][block :: self._arena.plan.blocks] = pages.FREE
        damaged = len(state.torn)
        state.torn.clear()
        self.follow(state, owner=0)
        return damaged

    def mend(self, first: int, count: int) -> list[int]:
        """Compares `count` lines from page `first` on with the copy and writes those that differ anew;
        gives their pages."""
        ours = self._own[first : first + count]
        theirs = np.ascontiguousarray(self._arena.own_headers[first : first + count])
        same = ours.view(np.uint8) == theirs.view(np.uint8)
        differ = (first + np.flatnonzero(~same.reshape(len(ours), -1).all(axis=1))).tolist()
        for page in differ:
            self._arena.own_headers[page] = self._own[page]
        return differ


def _writer_key(writer: str) -> np.void:
    return np.void(bytes.fromhex(writer) if len(writer) == 32 else b"\0" * 16)
