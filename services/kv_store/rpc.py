"""The KvStore service: translates messages, decides nothing."""

from __future__ import annotations

from typing import Any

from baton.v1 import store_pb2, store_pb2_grpc
from services.kv_store import report
from services.kv_store.fetch import PeerCaches
from services.kv_store.prefetch import Prefetcher
from services.kv_store.runtime import KvStore
from services.kv_store.state import MAX_EPOCH
from services.wire.rpc import unary


class KvStoreServicer(store_pb2_grpc.KvStoreServicer):  # type: ignore[misc]
    """Every method runs on the store's one thread, to its end, before the next one starts; but while
    OpenStream waits for another tier, others run."""

    def __init__(
        self, store: KvStore, prefetcher: Prefetcher, peers: PeerCaches, model: str, address: str,
        ingest: str,
    ) -> None:  # fmt: skip
        self._store, self._prefetcher, self._model = store, prefetcher, model
        self._peers = peers
        self._address, self._ingest = address, ingest

    @unary
    async def Describe(self, request: Any, context: Any) -> store_pb2.DescribeResponse:
        return store_pb2.DescribeResponse(
            pages=report.pages(self._store, self._address), model=self._model,
            fingerprint=self._store.identity.fingerprint, ingest_address=self._ingest,
            kv_dtype=self._store.arena.layout.kv_dtype,
            layers_per_group=self._store.arena.layout.layers_per_group,
            prefill_device=self._store.config.prefill_device,
            decode_device=self._store.config.decode_device,
            lease_ms=self._store.config.lease_ms,
        )  # fmt: skip

    @unary
    async def OpenStream(self, request: Any, context: Any) -> store_pb2.OpenStreamResponse:
        more = [self._peers.at(request.peers)] if request.peers else []
        return await self._prefetcher.open(request, more)

    @unary
    async def Reassign(self, request: Any, context: Any) -> store_pb2.ReassignResponse:
        return self._store.reassign(request)

    @unary
    async def Publish(self, request: Any, context: Any) -> store_pb2.PublishResponse:
        return store_pb2.PublishResponse(blocks=self._store.publish(request.request_id))

    @unary
    async def ReadStream(self, request: Any, context: Any) -> store_pb2.ReadStreamResponse:
        return self._store.read(request.request_id)

    @unary
    async def Release(self, request: Any, context: Any) -> store_pb2.ReleaseResponse:
        found = self._store.release(request)
        waiting = sorted(self._store.state.waiting_for(request.request_id))
        return store_pb2.ReleaseResponse(found=found, waiting_for=waiting)

    @unary
    async def Reconcile(self, request: Any, context: Any) -> store_pb2.ReconcileResponse:
        released = self._store.reconcile(request.request_ids, request.epoch or MAX_EPOCH)
        return store_pb2.ReconcileResponse(released=released)

    @unary
    async def Renew(self, request: Any, context: Any) -> store_pb2.RenewResponse:
        return self._store.renewed(request)

    @unary
    async def Pin(self, request: Any, context: Any) -> store_pb2.PinResponse:
        keys = self._store.pin(request)
        await self._prefetcher.bring(keys)
        cached = len(self._store.state.index.longest(keys))
        return store_pb2.PinResponse(blocks=len(keys), cached_blocks=cached)

    @unary
    async def Unpin(self, request: Any, context: Any) -> store_pb2.UnpinResponse:
        return store_pb2.UnpinResponse(found=self._store.unpin(request.name))

    @unary
    async def Invalidate(self, request: Any, context: Any) -> store_pb2.InvalidateResponse:
        blocks = self._store.invalidate(request.request_id, request.blocks)
        return store_pb2.InvalidateResponse(blocks=blocks)

    @unary
    async def Retire(self, request: Any, context: Any) -> store_pb2.RetireResponse:
        return store_pb2.RetireResponse(pages=self._store.retire(request))
