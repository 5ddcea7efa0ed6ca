"""A store's end of the KV stream over ZeroMQ, on the event loop: where it listens, what it lends."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import zmq

from services.kv.runs import ROW_SUMS_BYTES
from services.kv_store.endpoint import Endpoint
from services.kv_store.fetch import PeerCaches
from services.kv_store.runtime import KvStore
from services.ops import log
from services.ops.errors import ConfigError
from services.ops.keys import Keys
from services.wire.stream import FRAME_BYTES_MAX
from services.wire.zmq_medium import ZmqListener, ZmqMedium

_logger = log.get("ingest")
# While messages come, the next one is waited for without a round of the event loop, whose other work
# waits for so long at most.
LINGER_S = 0.001


class Lending:
    """The store's cached blocks, as the stream lends them."""

    def __init__(self, store: KvStore) -> None:
        self._store = store

    def borrow(self, keys: Sequence[bytes]) -> list[int]:
        """Blocks that are intact and held: nobody evicts or reuses them until they are given back."""
        lent: list[int] = []
        for block in self._store.state.index.longest(keys):
            if not self._store.begin_copy(block):
                break  # found damaged, and dropped
            lent.append(block)
        return lent

    def give_back(self, block: int) -> None:
        self._store.end_copy(block)


class Ingest:
    """The store's ROUTER socket and what comes in on it."""

    def __init__(
        self, store: KvStore, listen: str, advertise: str, keys: Keys | None = None
    ) -> None:
        self._store = store
        layout, config = store.arena.layout, store.config
        least = 2 * (layout.page_bytes + ROW_SUMS_BYTES)
        if config.ingest_bytes_inflight_max < least:
            raise ConfigError(f"ingest_bytes_inflight_max: less than two pages, {least} bytes")
        frame_bytes_max = max(FRAME_BYTES_MAX, layout.page_bytes) + 4096
        self._medium = ZmqMedium(frame_bytes_max=frame_bytes_max, keys=keys)
        listener = self._bind(listen)
        self.address = advertise or listener.address
        self.endpoint = Endpoint(
            store.arena, Lending(store), self._medium, listener,
            inflight_bytes_max=config.ingest_bytes_inflight_max,
            verify="wire" not in config.unsafe,
        )  # fmt: skip
        self.peers = PeerCaches(store.arena, self.endpoint.client, self._medium.wake)
        store.corrupt_messages = lambda: self.corrupt

    def _bind(self, listen: str) -> ZmqListener:
        """Binds, if `listen` leaves the port open to the one that the store before this one had:
        senders then find their way back by themselves and send again what was not acknowledged."""
        remembered = self._store.arena.directory / "ingest"
        if listen.endswith(":*") and remembered.exists():
            try:
                return self._medium.listen(remembered.read_text())
            except zmq.ZMQError as error:
                _logger.warning("ingest port taken", reason=str(error))
        listener = self._medium.listen(listen)
        remembered.write_text(listener.address)
        return listener

    @property
    def corrupt(self) -> int:
        """Messages of the stream that came damaged, and were or will be sent again."""
        return self.endpoint.corrupt + self.peers.corrupt

    async def run(self) -> None:
        """Takes messages until cancelled."""
        loop, came = asyncio.get_running_loop(), asyncio.Event()
        loop.add_reader(self._medium.fileno(), came.set)
        try:
            while True:
                if self.endpoint.turn():
                    self._medium.wait(LINGER_S)
                else:
                    came.clear()
                    await self._until(came)
                await asyncio.sleep(0)
        finally:
            loop.remove_reader(self._medium.fileno())

    async def _until(self, came: asyncio.Event) -> None:
        """Returns when a message may have come, or a tick is due."""
        self._medium.settle()
        if self._medium.pending():
            return
        try:
            async with asyncio.timeout(self.endpoint.wait_s):
                await came.wait()
        except TimeoutError:
            return

    def close(self) -> None:
        self.endpoint.close()
