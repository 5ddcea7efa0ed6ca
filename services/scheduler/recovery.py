"""After the scheduler's own death: the journal says which requests there were, the stream records in
the arena how far they had come, and the workers that return who still runs them. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from baton.v1 import control_pb2, inference_pb2, journal_pb2, store_pb2
from services.scheduler import orders
from services.scheduler.books import Books
from services.scheduler.endings import Endings
from services.scheduler.moving import Moving
from services.scheduler.placing import Placing
from services.scheduler.reports import Reports
from services.scheduler.request import CallStore, Phase, Request
from services.scheduler.stops import Stops
from services.wire.messages import finish_reason


class Recovery:
    """Takes requests from RECOVERING to wherever they belong."""

    def __init__(
        self, books: Books, stops: Stops, endings: Endings, placing: Placing, moving: Moving,
        reports: Reports,
    ) -> None:  # fmt: skip
        self._books, self._stops, self._endings = books, stops, endings
        self._placing, self._moving, self._reports = placing, moving, reports
        self._due_at: float | None = None

    def replay(
        self, now: float, unix_ms: int, records: Iterable[journal_pb2.JournalRecord]
    ) -> None:
        """Takes up the journal; streams are looked for once the workers have had time to return."""
        for record in records:
            kind = record.WhichOneof("record")
            if kind == "accepted":
                self._accepted(now, unix_ms, record.accepted)
            elif kind == "placed":
                self._books.saw_epoch(record.placed.epoch, record.placed.attempt)
                self._placed(record.placed)
            elif kind == "ended":
                self._ended(now, record.ended)
        self._due_at = now + self._books.config.recover_grace_ms / 1e3
        self._books.recovering = True

    def _accepted(self, now: float, unix_ms: int, accepted: journal_pb2.Accepted) -> None:
        request = self._books.new_request(
            now, accepted.body, list(accepted.token_ids), accepted.sampling,
            accepted.accepted_unix_ms, accepted.deadline_unix_ms,
        )  # fmt: skip
        if accepted.deadline_unix_ms:
            request.deadline_at = now + (accepted.deadline_unix_ms - unix_ms) / 1e3
        request.phase = Phase.RECOVERING
        request.orphan_at = now + request.orphan_s
        request.tell("taken up from the journal")

    def _placed(self, placed: journal_pb2.Placed) -> None:
        request = self._books.requests.get(placed.request_id)
        if request is None:
            return
        request.epoch, request.attempt = placed.epoch, placed.attempt
        request.prefill_worker, request.decode_worker = placed.prefill_worker, placed.decode_worker
        request.prefill_store, request.decode_store = placed.prefill_store, placed.decode_store
        request.base_index, request.opened = placed.first_index, placed.opened
        request.prefill_stopped, request.decode_told = False, True  # as far as can be known

    def _ended(self, now: float, ended: journal_pb2.Ended) -> None:
        request = self._books.requests.get(ended.request_id)
        if request is None:
            return
        self._take(request, now, ended.token_ids, ended.logprobs)
        request.phase = Phase.DONE
        request.orphan_at = None
        request.forget_at = now + request.retain_s
        request.final = orders.final_of(ended)

    def _take(
        self, request: Request, now: float, ids: Iterable[int], logprobs: Iterable[float]
    ) -> None:
        for index, (token_id, logprob) in enumerate(zip(ids, logprobs, strict=True)):
            token = control_pb2.Token(index=index, token_id=token_id, logprob=logprob)
            self._reports.take_token(request, now, token)
            if request.text.stopped:
                break  # what follows a stop string is not part of the answer

    def _waiting(self) -> list[Request]:
        return [r for r in self._books.requests.values() if r.phase is Phase.RECOVERING]

    def tick(self, now: float) -> list[CallStore]:
        """Once everyone awaited is back, or the grace is over: asks the stores for the streams."""
        books = self._books
        if self._due_at is None or not books.ingest:
            return []
        waiting = self._waiting()
        awaited = {w for r in waiting for w in (r.decode_worker, r.prefill_worker) if w}
        if now < self._due_at and not awaited <= set(books.workers):
            return []
        self._due_at, books.recovering = None, False
        calls = self.reconcile(books.ingest)
        for request in waiting:
            if request.decode_store and not request.base_index:
                message = store_pb2.ReadStreamRequest(request_id=request.request_id)
                calls.append(
                    CallStore(request.request_id, request.decode_store, "ReadStream", message)
                )
                continue
            if request.decode_store:  # part of its tokens died with us: all are made again
                self._endings.release(request, keep=True)
            request.phase = Phase.WAITING
        return calls

    def reconcile(self, stores: Iterable[str]) -> list[CallStore]:
        """These stores let go of the streams that nobody remembers."""
        calls = []
        for store in stores:
            alive = [r for r in self._books.requests.values() if not r.done and store in r.stores]
            message = store_pb2.ReconcileRequest(
                request_ids=[r.request_id for r in alive], epoch=self._books.epoch
            )
            calls.append(CallStore("", store, "Reconcile", message))
        return calls

    def reconciled(self, store: str) -> None:
        """A store has let go of what nobody remembers. Only now may it hear which workers have let go
        of what: before, it did not wait for them yet."""
        for info in self._books.workers.values():
            calls = self._stops.settle(info)
            self._books.call_each(call for call in calls if call.store_id == store)

    def found(
        self, request: Request, now: float, store: str, reply: store_pb2.ReadStreamResponse
    ) -> None:
        """The stream's record still lies in the arena: adopt its tokens and whoever runs it."""
        older = min(reply.epoch, reply.attempt) < request.opened
        if older or reply.first_index:  # another opening: a dead scheduler's call came late
            self.lost(request, now)
            return
        if store != request.decode_store:  # where prefill is at work for another arena
            request.slots[store] = reply.slot
            self._adopt(request, now)
            return
        placed = {request.decode_worker, request.prefill_worker}
        request.phase = Phase.RUNNING
        request.cached = dict.fromkeys(request.stores, 0)
        self._books.saw_epoch(reply.epoch, reply.attempt)
        request.epoch, request.attempt = reply.epoch, reply.attempt
        request.decode_worker = reply.decode_writer
        request.prefill_worker = reply.prefill_writer or request.prefill_worker
        request.prefill_done = request.kv_arrived = bool(reply.token_ids)
        request.slots.pop(request.prefill_store, None)
        request.slots[request.decode_store] = reply.slot
        self._stops.recovered(request, placed)
        self._take(request, now, reply.token_ids, reply.logprobs)
        ends = inference_pb2.FINISH_REASON_UNSPECIFIED
        if request.tokens:
            last = len(request.tokens) - 1
            ends = finish_reason(request.tokens[last][0], last, request.sampling)
        if request.text.stopped or ends:
            by_itself = request.decode_worker if ends else ""  # it has committed its last token
            reason = ends or inference_pb2.FINISH_REASON_STOP
            self._endings.end(request, now, reason, finished_by=by_itself)
            return
        if request.prefill_done or request.prefill_store == request.decode_store:
            self._adopt(request, now)
            return
        request.phase = Phase.RECOVERING
        message = store_pb2.ReadStreamRequest(request_id=request.request_id)
        self._books.call(request.request_id, request.prefill_store, "ReadStream", message)

    def lost(self, request: Request, now: float) -> None:
        """No store knows the stream as it was: it starts again, and gives the same tokens."""
        if request.phase is Phase.RECOVERING:
            self._endings.release(request, keep=False)  # prefill's store may still have it
            request.phase = Phase.WAITING
            self._placing.place_waiting(now)

    def _adopt(self, request: Request, now: float) -> None:
        """Workers that are back go on; for those that are not, others are found."""
        request.phase = Phase.RUNNING
        for worker_id in {request.decode_worker, request.prefill_worker}:
            if worker_id in self._books.workers:
                self._moving.remind(request, worker_id)
        self._moving.ensure(request, now)


def journal(requests: Iterable[Request], epoch: int) -> list[journal_pb2.JournalRecord]:
    """The shortest journal that says what is known now. `epoch` is the last one given out: it must
    not go back, also when nobody remembers the request that it was for."""
    records = []
    for request in requests:
        records.append(orders.accepted(request))
        if request.decode_store:
            records.append(orders.placed(request))
        if request.final:
            records.append(orders.ended(request))
    floor = journal_pb2.Placed(epoch=epoch, attempt=epoch)
    return [*records, journal_pb2.JournalRecord(placed=floor)]
