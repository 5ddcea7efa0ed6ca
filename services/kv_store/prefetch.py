"""Brings what a new stream's prefix lacks in the arena from other tiers, before the stream is opened.

Several opens may want the same blocks, the arena may be full, a tier may hang: then the hit is
shorter, and no open waits longer than `prefetch_ms`. Blocks enter the prefix index only once they are
verified and sealed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from baton.v1 import store_pb2
from services.kv_store.runtime import KvStore
from services.ops import log
from services.ops.errors import BatonError

_logger = log.get("prefetch")


class PrefixSource(Protocol):
    """Somewhere that blocks of cached prefixes can be had from."""

    async def load(self, keys: Sequence[bytes], blocks: Sequence[int]) -> int:
        """Copies the blocks named by the leading keys into these arena blocks, checksums verified,
        sealed; gives how many leading ones it could. Never raises for a miss. The blocks are its own
        to write until it returns."""


@runtime_checkable
class Inventory(Protocol):
    """A source that knows without I/O what it may have, so that no more room is made than needed."""

    def holds(self, keys: Sequence[bytes]) -> int:
        """How many of the leading keys."""


class Prefetcher:
    """Opens streams of one store. Runs on the store's event loop."""

    def __init__(self, store: KvStore, sources: Sequence[PrefixSource], wait_s: float) -> None:
        self._store, self._sources, self._wait_s = store, list(sources), wait_s
        self._under_way: dict[bytes, asyncio.Task[None]] = {}  # first missing key -> its fetch

    async def open(
        self, request: store_pb2.OpenStreamRequest, more: Sequence[PrefixSource] = ()
    ) -> store_pb2.OpenStreamResponse:
        """`KvStore.open` with the longest hit that the sources, and then `more`, can give."""
        known = request.request_id in self._store.state.streams
        if not known and not request.bypass_cache:
            await self.bring(self._store.prompt_keys(request), more)
        return self._store.open(request)

    async def bring(self, chain: Sequence[bytes], more: Sequence[PrefixSource] = ()) -> None:
        """Makes as much of this chain findable as the sources have, within `wait_s`. What takes longer
        goes on by itself: the next one finds it."""
        missing = chain[len(self._store.state.index.longest(chain)) :]
        sources = [*self._sources, *more]
        if not missing or not any(_promised(source, missing) for source in sources):
            return
        task = self._under_way.get(missing[0])
        if task is None:
            task = asyncio.create_task(self._fetch(chain, sources))
            self._under_way[missing[0]] = task
            task.add_done_callback(lambda _: self._under_way.pop(missing[0]))
        await asyncio.wait([task], timeout=self._wait_s)
        if task.done():
            task.result()

    async def _fetch(self, chain: Sequence[bytes], sources: Sequence[PrefixSource]) -> None:
        for source in sources:
            have = self._store.state.index.longest(chain)
            missing = chain[len(have) :]
            missing = missing[: _promised(source, missing)]
            if not missing:
                continue
            blocks = self._store.begin_fill(len(missing), keep=have)
            done = 0
            try:
                if blocks:
                    done = await source.load(missing[: len(blocks)], blocks)
            except BatonError as error:
                _logger.warning("prefetch failed", reason=error.message)
            finally:
                self._store.end_fill(missing[:done], blocks, kept=have)

    async def settled(self) -> None:
        """Waits until nothing is under way."""
        await asyncio.gather(*self._under_way.values(), return_exceptions=True)


def _promised(source: PrefixSource, keys: Sequence[bytes]) -> int:
    return source.holds(keys) if isinstance(source, Inventory) else len(keys)
