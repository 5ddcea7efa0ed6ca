"""The scheduler's connections to the kv-stores: calls in order per request and store, retried
while a store is away, because a store that restarts finds everything again."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, cast

import grpc

from baton.v1 import cluster_pb2, store_pb2, store_pb2_grpc
from services.ops import log
from services.ops.errors import Unavailable
from services.ops.keys import Keys
from services.scheduler.request import CallStore
from services.wire import rpc

_logger = log.get("stores")
_RETRY_S = (0.01, 0.02, 0.05, 0.1)
_UNKNOWN_S = 0.05  # between two looks for a store that is not known
CALL_S = 5.0  # of one attempt; a call is repeated for as long as its store is away
DESCRIBE_S = 0.5  # between two looks at a store
LOOK_S = 0.5  # that a look may take: the view of the others does not wait for a store that is away
PENDING_MAX = (
    2048  # calls that wait for one store; one that is behind by more is reconciled instead
)
_AWAY = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)

RENEW_S = 0.1  # how often it is looked whether a renewal is due
RENEW_CALL_S = 0.5
OpenStreams = Callable[[], dict[str, dict[str, int]]]  # store -> request -> epoch
Lost = Callable[[str, dict[str, int]], None]
WaitsFor = Callable[[Sequence[store_pb2.Awaited]], None]
Replied = Callable[[CallStore, Any, str, str], None]
Changed = Callable[[dict[str, str], set[str]], None]


class Stores:
    """Knows each store by the id of its arena. `replied` gets every answer, on the event loop."""

    def __init__(
        self, addresses: tuple[str, ...], fingerprint: str, replied: Replied,
        keys: Keys | None = None,
    ) -> None:  # fmt: skip
        self._addresses, self._fingerprint, self._replied = addresses, fingerprint, replied
        self._channels = {address: rpc.channel(address, keys, "kv-store") for address in addresses}
        self._stubs = {a: store_pb2_grpc.KvStoreStub(c) for a, c in self._channels.items()}
        self._by_id: dict[str, str] = {}
        self._last: dict[tuple[str, str], asyncio.Task[None]] = {}
        self._pending: Counter[str] = Counter()  # store -> calls without an answer
        self._changed: Changed = lambda ingest, returned: None
        self._behind: set[str] = set()  # stores that have missed calls
        self._replaced: set[str] = set()  # stores at whose address there is another one now
        self.described: dict[str, store_pb2.DescribeResponse] = {}

    async def watch(self, changed: Changed) -> None:
        """Keeps descriptions fresh; `changed` gets store id -> ingest address, and the stores that are
        back and have missed calls."""
        self._changed = changed

        async def look(address: str) -> None:
            while True:
                await self.refresh(address)
                self._tell()
                known = address in self.described
                await asyncio.sleep(DESCRIBE_S if known else _RETRY_S[-1])

        await asyncio.gather(*(look(address) for address in self._addresses))

    def _tell(self) -> None:
        ingest = {d.pages.store_id: d.ingest_address for d in self.described.values()}
        self._changed(ingest, self._caught_up())

    def _caught_up(self) -> set[str]:
        """Stores that have missed calls and answer again."""
        back = {
            d.pages.store_id
            for d in self.described.values()
            if d.pages.store_id in self._behind and d.pages.reachable
        }
        self._behind -= back
        return back

    async def refresh(self, address: str) -> None:
        """Looks at a store; what it says replaces what was known, and silence says unreachable."""
        try:
            described = await self._stubs[address].Describe(
                store_pb2.DescribeRequest(), timeout=LOOK_S
            )
        except grpc.aio.AioRpcError:
            if address in self.described:
                self.described[address].pages.reachable = False
            return
        if described.fingerprint != self._fingerprint:
            _logger.error("store of another model refused", address=address)
            return
        if address in self.described:
            self._replaced.add(self.described[address].pages.store_id)
        self._replaced.discard(described.pages.store_id)
        self.described[address] = described
        self._by_id = {d.pages.store_id: a for a, d in self.described.items()}

    async def pages(self) -> list[cluster_pb2.StorePages]:
        """Every store's pages by state, asked now."""
        await asyncio.gather(*(self.refresh(address) for address in self._addresses))
        return [d.pages for d in self.described.values()]

    async def renew(self, streams: OpenStreams, lost: Lost, awaited: WaitsFor) -> None:
        """Keeps the leases of all open streams, each store's four times in a lease; `lost` hears of
        those that a store does not have, `awaited` of the workers that it waits for."""
        due: dict[str, float] = {}
        loop = asyncio.get_running_loop()
        while True:
            wanted = streams()
            for store in [store for store in self._by_id if loop.time() >= due.get(store, 0.0)]:
                address = self._by_id.get(store)
                if address is not None:
                    every_s = self.described[address].lease_ms / 4e3 or RENEW_S
                    due[store] = loop.time() + every_s
                    awaited(await self._renew(store, address, wanted.get(store, {}), lost))
            await asyncio.sleep(RENEW_S)

    async def _renew(
        self, store: str, address: str, wanted: dict[str, int], lost: Lost
    ) -> Sequence[store_pb2.Awaited]:
        request = store_pb2.RenewRequest(request_ids=wanted)
        try:
            reply = await self._stubs[address].Renew(request, timeout=RENEW_CALL_S)
        except grpc.aio.AioRpcError:
            return ()  # away: no lease ends there meanwhile, and it is asked again
        if reply.unknown:
            lost(store, {request_id: wanted[request_id] for request_id in reply.unknown})
        return cast(Sequence[store_pb2.Awaited], reply.awaited)

    def call(self, call: CallStore) -> None:
        """Starts a call after the request's earlier ones to this store: one that is away holds up
        nobody else. What would wait behind PENDING_MAX others is not made at all."""
        if self._pending[call.store_id] >= PENDING_MAX:
            self._behind.add(call.store_id)
            self._replied(
                call, None, "UNAVAILABLE", f"store {call.store_id} has been away too long"
            )
            return
        self._pending[call.store_id] += 1
        queue = (call.request_id, call.store_id)
        before = self._last.get(queue)
        task = asyncio.create_task(self._call(call, before))
        self._last[queue] = task
        task.add_done_callback(lambda done: self._finished(queue, done))

    def _finished(self, queue: tuple[str, str], task: asyncio.Task[None]) -> None:
        if self._last.get(queue) is task:
            del self._last[queue]
        self._pending[queue[1]] -= 1
        if not task.cancelled():
            task.result()

    async def _call(self, call: CallStore, before: asyncio.Task[None] | None) -> None:
        if before is not None:
            await asyncio.wait([before])
        attempts = 0
        while True:
            address = self._by_id.get(call.store_id)
            if address is None and await self._may_come(call.store_id):
                await asyncio.sleep(_UNKNOWN_S)
                continue
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

    async def _may_come(self, store_id: str) -> bool:
        """Whether an unknown store may still be found. A worker of a new one may be here before it was
        looked at, so all are looked at again; who does not answer may be the one."""
        if store_id in self._replaced:
            return False
        if len(self.described) < len(self._addresses):
            return True
        await asyncio.gather(*(self.refresh(address) for address in self._addresses))
        self._tell()
        answering = [d for d in self.described.values() if d.pages.reachable]
        return store_id in self._by_id or len(answering) < len(self._addresses)

    async def close(self) -> None:
        for task in list(self._last.values()):
            task.cancel()
        for channel in self._channels.values():
            await channel.close()


async def describe(
    address: str, wait_s: float, keys: Keys | None = None
) -> store_pb2.DescribeResponse:
    """What a store holds; waits until it answers. Raises Unavailable after `wait_s`."""
    async with rpc.channel(address, keys, "kv-store") as channel:
        stub = store_pb2_grpc.KvStoreStub(channel)
        try:
            return await stub.Describe(  # type: ignore[no-any-return]
                store_pb2.DescribeRequest(), timeout=wait_s, wait_for_ready=True
            )
        except grpc.aio.AioRpcError as error:
            raise Unavailable(f"stores: {address} does not answer: {error.code().name}") from error
