"""A kv-store in a few lines: streams by epoch, fences, and whom it waits for. See `fake_cluster`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from baton.v1 import store_pb2
from services.ops.errors import NeverFits, Overloaded, RequestConflict, StaleEpoch, UnknownRequest

if TYPE_CHECKING:
    from tests.support.fake_cluster import FakeCluster


@dataclass
class Record:
    """A stream as the arena has it."""

    request: store_pb2.OpenStreamRequest
    slot: int
    epoch: int
    attempt: int
    prefill_writer: str
    decode_writer: str
    tokens: list[int] = field(default_factory=list)  # generated, the first one included
    fenced: set[tuple[str, int]] = field(default_factory=set)  # (writer, epoch)

    @property
    def request_id(self) -> str:
        return str(self.request.request_id)


@dataclass
class FakeStore:
    """Streams by id, and who may still write what is nobody's any more: (request, writer, epoch)."""

    store_id: str
    slots: int
    cluster: FakeCluster
    full: bool = False  # for now
    streams: dict[str, Record] = field(default_factory=dict)
    quarantine: set[tuple[str, str, int]] = field(default_factory=set)
    published: set[str] = field(default_factory=set)

    @property
    def address(self) -> str:
        return f"tcp://{self.store_id}"

    def at(self, slot: int) -> Record | None:
        return next((r for r in self.streams.values() if r.slot == slot), None)

    def _stream(self, request_id: str) -> Record:
        if request_id not in self.streams:
            raise UnknownRequest(f"request_id: {request_id!r} is not open in this store")
        return self.streams[request_id]

    def _wait_for(self, request_id: str, writer: str, epoch: int) -> None:
        if self.cluster.exists(writer):
            self.quarantine.add((request_id, writer, epoch))

    def OpenStream(self, request: store_pb2.OpenStreamRequest) -> store_pb2.OpenStreamResponse:
        known = self.streams.get(request.request_id)
        if known is None:
            free = set(range(self.slots)) - {record.slot for record in self.streams.values()}
            if not self.slots:
                raise NeverFits("arena: there is no room at all")
            if not free or self.full:
                raise Overloaded("arena: no room")
            known = self.streams[request.request_id] = Record(
                request, min(free), request.epoch, request.attempt, request.prefill_writer,
                request.decode_writer,
            )  # fmt: skip
        elif (known.epoch, known.attempt) != (request.epoch, request.attempt):
            raise RequestConflict(f"request_id: {request.request_id!r} is open already")
        return store_pb2.OpenStreamResponse(slot=known.slot, cached_tokens=0)

    def Reassign(self, request: store_pb2.ReassignRequest) -> store_pb2.ReassignResponse:
        record = self._stream(request.request_id)
        prefill = request.role == store_pb2.WRITER_ROLE_PREFILL
        if request.epoch <= (record.attempt if prefill else record.epoch):
            raise StaleEpoch(f"epoch: {request.epoch} is not newer")
        old = record.prefill_writer if prefill else record.decode_writer
        last = record.attempt if prefill else record.epoch
        finished = prefill and bool(record.tokens)
        reply = store_pb2.ReassignResponse(
            slot=record.slot, previous_gone=not self.cluster.exists(old)
        )
        if prefill:
            reply.committed = len(record.request.token_ids) if finished else 0
        else:
            reply.committed = max(0, len(record.tokens) - 1)
        if finished:
            return reply
        if prefill:
            record.attempt, record.prefill_writer = request.epoch, request.writer
        else:
            record.epoch, record.decode_writer = request.epoch, request.writer
        record.fenced.add((old, last))
        self._wait_for(record.request_id, old, last)
        return reply

    def Publish(self, request: store_pb2.PublishRequest) -> store_pb2.PublishResponse:
        self.published.add(self._stream(request.request_id).request_id)
        return store_pb2.PublishResponse()

    def ReadStream(self, request: store_pb2.ReadStreamRequest) -> store_pb2.ReadStreamResponse:
        record = self._stream(request.request_id)
        return store_pb2.ReadStreamResponse(
            epoch=record.epoch, attempt=record.attempt, slot=record.slot,
            committed=max(0, len(record.tokens) - 1), first_index=record.request.first_index,
            prompt_tokens=len(record.request.token_ids), token_ids=record.tokens,
            logprobs=[-1.0] * len(record.tokens), prefill_writer=record.prefill_writer,
            decode_writer=record.decode_writer,
        )  # fmt: skip

    def Release(self, request: store_pb2.ReleaseRequest) -> store_pb2.ReleaseResponse:
        record = self.streams.get(request.request_id)
        upto = request.epoch or 0xFFFFFFFF
        if record is None or max(record.epoch, record.attempt) > upto:
            return store_pb2.ReleaseResponse(
                found=False, waiting_for=self._waiting_for(request.request_id)
            )
        present = {(record.prefill_writer, record.attempt), (record.decode_writer, record.epoch)}
        said = {*request.live_writers}
        if request.writers_unknown:
            said = {record.prefill_writer, record.decode_writer}
        live = {pair for pair in present if pair[0] in said} | record.fenced
        for worker in self.cluster.workers.values():
            if worker.writes(record):
                known = any(worker.id == writer for writer, _ in live)
                assert known, f"{worker.name} is at work on {record.request_id}: not said"
        del self.streams[record.request_id]
        for writer, epoch in live:
            self._wait_for(record.request_id, writer, epoch)
        waiting = self._waiting_for(request.request_id)
        return store_pb2.ReleaseResponse(found=True, waiting_for=waiting)

    def _waiting_for(self, request_id: str) -> list[str]:
        return sorted({writer for name, writer, _ in self.quarantine if name == request_id})

    def Retire(self, request: store_pb2.RetireRequest) -> store_pb2.RetireResponse:
        """What the writer got under epochs after `epoch` is not meant."""
        one, writer, epoch = request.request_id, request.writer, request.epoch
        waiting = {r for r, w, _ in self.quarantine if w == writer}
        for request_id in sorted({*waiting, *self.streams}):
            if request_id == one or (not one and request_id not in request.still_running):
                self._let_go(request_id, writer, epoch)
        return store_pb2.RetireResponse()

    def _let_go(self, request_id: str, writer: str, epoch: int) -> None:
        worker, name = self.cluster.by_id(writer), (request_id, writer)
        gone = {held for held in self.quarantine if held[:2] == name and held[2] <= epoch}
        for _, _, old in gone:
            at_work = worker is not None and worker.haunts(request_id, old)
            assert not at_work, f"{writer} is still at work on {request_id} under {old}"
        self.quarantine -= gone
        record = self.streams.get(request_id)
        if record:
            record.fenced = {(w, e) for w, e in record.fenced if w != writer or e > epoch}

    def Reconcile(self, request: store_pb2.ReconcileRequest) -> store_pb2.ReconcileResponse:
        upto = request.epoch or 0xFFFFFFFF
        gone = {
            r
            for r, record in self.streams.items()
            if max(record.epoch, record.attempt) <= upto and r not in request.request_ids
        }
        for request_id in gone:
            record = self.streams[request_id]
            live = [record.prefill_writer, record.decode_writer]
            self.Release(store_pb2.ReleaseRequest(request_id=request_id, live_writers=live))
        return store_pb2.ReconcileResponse(released=len(gone))

    def Invalidate(self, request: store_pb2.InvalidateRequest) -> store_pb2.InvalidateResponse:
        self._stream(request.request_id)
        return store_pb2.InvalidateResponse()
