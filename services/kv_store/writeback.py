"""Writes cached blocks to disk while the arena still has them, the coldest first, a few at a time.

What is evicted before it was written is lost, and computed again: nothing ever waits for the disk.
"""

from __future__ import annotations

import asyncio
from itertools import islice

from services.kv_store.disk import DiskTier
from services.kv_store.runtime import KvStore
from services.ops import log

_logger = log.get("writeback")
WRITES_MAX = 8  # blocks under way at a time


class WriteBack:
    """Runs on the store's event loop; the disk's threads do the work."""

    def __init__(self, store: KvStore, disk: DiskTier, cold_s: float) -> None:
        self._store, self._disk, self._cold_s = store, disk, cold_s
        self._under_way: set[asyncio.Task[None]] = set()

    def step(self, now: float) -> None:
        """Starts writing what has not been used for `cold_s`; called every now and then."""
        self._start(now - self._cold_s)

    def _start(self, since: float) -> None:
        index = self._store.state.index
        room = min(WRITES_MAX, self._disk.index.blocks_max) - len(self._under_way)
        for key, block in list(islice(index.cold(since), 2 * WRITES_MAX)):
            if room <= 0 or self._disk.paused:
                return
            if block in self._store.state.copying:
                continue
            if self._disk.holds([key]):
                index.written(key)
            elif self._store.begin_copy(block):
                room -= 1
                task = asyncio.create_task(self._save(key, block))
                self._under_way.add(task)
                task.add_done_callback(self._under_way.discard)

    async def _save(self, key: bytes, block: int) -> None:
        try:
            if await self._disk.save(key, block):
                self._store.state.index.written(key)
        finally:
            self._store.end_copy(block)

    async def flush(self, limit_s: float) -> None:
        """Writes everything that is not on disk yet, hot or cold, for at most `limit_s`."""
        loop = asyncio.get_running_loop()
        until = loop.time() + limit_s
        while loop.time() < until:
            self._start(float("inf"))
            if not self._under_way:
                break
            await asyncio.wait(
                self._under_way, timeout=until - loop.time(), return_when=asyncio.FIRST_COMPLETED
            )
        left = len(self._store.state.index.unwritten)
        _logger.info("flushed", blocks=len(self._disk.index.keys), left=left)
