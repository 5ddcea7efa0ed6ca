"""The scheduler's connections to the kv-stores: calls in order per request, retried while a store is
away, because a store that restarts finds everything again."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import grpc

from baton.v1 import cluster_pb2, store_pb2, store_pb2_grpc
from services.ops import log
from services.ops.errors import Unavailable
from services.scheduler.request import CallStore
from services.wire import rpc

_logger = log.get("stores")
_RETRY_S = (0.01, 0.02, 0.05, 0.1)
CALL_S = 5.0
DESCRIBE_S = 0.5
_AWAY = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)

Replied = Callable[[CallStore, Any, str, str], None]


class Stores:
    """Knows each store by the id of its arena. `replied` gets every answer, on the event loop."""

    def __init__(self, addresses: tuple[str, ...], fingerprint: str, replied: Replied) -> None:
        self._addresses, self._fingerprint, self._replied = addresses, fingerprint, replied
        self._channels = {address: rpc.channel(address) for address in addresses}
        self._stubs = {a: store_pb2_grpc.KvStoreStub(c) for a, c in self._channels.items()}
        self._by_id: dict[str, str] = {}
        self._last: dict[str, asyncio.Task[None]] = {}
        self.described: dict[str, store_pb2.DescribeResponse] = {}

    async def watch(self, changed: Callable[[dict[str, str]], None]) -> None:
        """Keeps descriptions fresh; `changed` gets store id -> ingest address."""
        while True:
            for address in self._addresses:
                await self.refresh(address)
            changed({d.pages.store_id: d.ingest_address for d in self.described.values()})
            known = len(self.described) == len(self._addresses)
            await asyncio.sleep(DESCRIBE_S if known else _RETRY_S[0])

    async def refresh(self, address: str) -> None:
        try:
            described = await self._stubs[address].Describe(
                store_pb2.DescribeRequest(), timeout=CALL_S
            )
        except grpc.aio.AioRpcError:
            if address in self.described:
                self.described[address].pages.reachable = False
            return
        if described.fingerprint != self._fingerprint:
            _logger.error("store of another model refused", address=address)
            return
        self.described[address] = described
        self._by_id = {d.pages.store_id: a for a, d in self.described.items()}

    async def pages(self) -> list[cluster_pb2.StorePages]:
        """Every store's pages by state, asked now."""
        await asyncio.gather(*(self.refresh(address) for address in self._addresses))
        return [d.pages for d in self.described.values()]

    def call(self, call: CallStore) -> None:
        """Starts a call after the request's earlier ones."""
        before = self._last.get(call.request_id)
        task = asyncio.create_task(self._call(call, before))
        self._last[call.request_id] = task
        task.add_done_callback(lambda done: self._finished(call.request_id, done))

    def _finished(self, request_id: str, task: asyncio.Task[None]) -> None:
        if self._last.get(request_id) is task:
            del self._last[request_id]
        if not task.cancelled():
            task.result()

    async def _call(self, call: CallStore, before: asyncio.Task[None] | None) -> None:
        if before is not None:
            await asyncio.wait([before])
        attempts = 0
        while True:
            address = self._by_id.get(call.store_id)
            if address is None:
                self._replied(call, None, "NOT_FOUND", f"store {call.store_id} is gone")
                return
            try:
                method = getattr(self._stubs[address], call.method)
                reply = await method(call.message, timeout=CALL_S)
            except grpc.aio.AioRpcError as error:
                if error.code() in _AWAY:
                    await asyncio.sleep(_RETRY_S[min(attempts, len(_RETRY_S) - 1)])
                    attempts += 1
                    continue
                self._replied(call, None, error.code().name, error.details() or "")
                return
            self._replied(call, reply, "OK", "")
            return

    async def close(self) -> None:
        for task in list(self._last.values()):
            task.cancel()
        for channel in self._channels.values():
            await channel.close()


async def describe(address: str, wait_s: float) -> store_pb2.DescribeResponse:
    """What a store holds; waits until it answers. Raises Unavailable after `wait_s`."""
    async with rpc.channel(address) as channel:
        stub = store_pb2_grpc.KvStoreStub(channel)
        try:
            return await stub.Describe(  # type: ignore[no-any-return]
                store_pb2.DescribeRequest(), timeout=wait_s, wait_for_ready=True
            )
        except grpc.aio.AioRpcError as error:
            raise Unavailable(f"stores: {address} does not answer: {error.code().name}") from error
