"""A slow look at everything that lies in the arena: headers are mended from the store's own copy, cached
blocks whose seal does not fit leave the cache before anybody wants them.

Rows against tokens are verified by whoever attaches: the store does not know what a token means.
"""

from __future__ import annotations

from services.kv import arena as pages
from services.kv_store.runtime import KvStore
from services.ops import log

_logger = log.get("scrub")
PAGES, BLOCKS = 1024, 8  # headers compared, and blocks verified, at a time


class Scrub:
    """Goes round and round; every `step` looks at the next few."""

    def __init__(self, store: KvStore, pages_max: int = PAGES, blocks_max: int = BLOCKS) -> None:
        self._store, self._pages_max, self._blocks_max = store, pages_max, blocks_max
        self._page = self._block = 0

    def step(self) -> None:
        plan = self._store.arena.plan
        count = min(self._pages_max, plan.pages - self._page)
        mended = self._store.book.mend(self._page, count)
        self._page = (self._page + count) % plan.pages
        if mended:
            self._store.counts.headers_repaired += len(mended)
            _logger.warning("headers mended", pages=mended)
        for _ in range(self._blocks_max):
            self._look(self._block)
            self._block = (self._block + 1) % plan.blocks

    def _look(self, block: int) -> None:
        store = self._store
        parts = store.arena.headers[block :: store.arena.plan.blocks]
        if block in store.state.pool.free and (parts["state"] != pages.FREE).any():
            parts["state"] = pages.FREE
            store.counts.headers_repaired += 1
        elif block in store.state.index and not store.whole(block):
            store.drop_corrupt(block)
