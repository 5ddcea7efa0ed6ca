"""After the scheduler's own death: the journal says which requests there were, the stream records in
the arena how far they had come, and the workers that return who still runs them. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from baton.v1 import control_pb2, inference_pb2, journal_pb2, store_pb2
from services.scheduler import orders
from services.scheduler.request import CallStore, Phase, Request
from services.wire.messages import finish_reason

if TYPE_CHECKING:
    from services.scheduler.state import SchedulerState


class Recovery:
    """Takes requests from RECOVERING to wherever they belong."""

    def __init__(self, state: SchedulerState) -> None:
        self._state = state
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
                self._state.saw_epoch(record.placed.epoch, record.placed.attempt)
                self._placed(record.placed)
            elif kind == "ended":
                self._ended(now, record.ended)
        self._due_at = now + self._state.config.recover_grace_ms / 1e3

    def _accepted(self, now: float, unix_ms: int, accepted: journal_pb2.Accepted) -> None:
        request = self._state.new_request(
            now, accepted.body, list(accepted.token_ids), accepted.sampling,
            accepted.accepted_unix_ms, accepted.deadline_unix_ms,
        )  # fmt: skip
        if accepted.deadline_unix_ms:
            request.deadline_at = now + (accepted.deadline_unix_ms - unix_ms) / 1e3
        request.phase = Phase.RECOVERING
        request.orphan_at = now + request.orphan_s
        request.tell("taken up from the journal")

    def _placed(self, placed: journal_pb2.Placed) -> None:
        request = self._state.requests.get(placed.request_id)
        if request is None:
            return
        request.epoch, request.attempt = placed.epoch, placed.attempt
        request.prefill_worker, request.decode_worker = placed.prefill_worker, placed.decode_worker
        request.prefill_store, request.decode_store = placed.prefill_store, placed.decode_store
        request.base_index = placed.first_index
        request.prefill_stopped, request.decode_told = False, True  # as far as can be known

    def _ended(self, now: float, ended: journal_pb2.Ended) -> None:
        request = self._state.requests.get(ended.request_id)
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
            self._state.take_token(request, now, token)
            if request.text.stopped:
                break  # what follows a stop string is not part of the answer

    @property
    def pending(self) -> bool:
        """Whether the streams of the scheduler before this one are still to be looked for."""
        return self._due_at is not None

    def _waiting(self) -> list[Request]:
        return [r for r in self._state.requests.values() if r.phase is Phase.RECOVERING]

    def tick(self, now: float) -> list[CallStore]:
        """Once everyone awaited is back, or the grace is over: asks the stores for the streams."""
        state = self._state
        if self._due_at is None or not state.ingest:
            return []
        waiting = self._waiting()
        awaited = {w for r in waiting for w in (r.decode_worker, r.prefill_worker) if w}
        if now < self._due_at and not awaited <= set(state.workers):
            return []
        self._due_at = None
        alive = [r for r in state.requests.values() if not r.done]
        calls = []
        for store in state.ingest:
            here = [r.request_id for r in alive if store in r.stores]
            keep = store_pb2.ReconcileRequest(request_ids=here, epoch=state.epoch)
            calls.append(CallStore("", store, "Reconcile", keep))
        for info in state.workers.values():
            calls += state.let_go(info)
        for request in waiting:
            if request.decode_store and not request.base_index:
                message = store_pb2.ReadStreamRequest(request_id=request.request_id)
                calls.append(
                    CallStore(request.request_id, request.decode_store, "ReadStream", message)
                )
                continue
            if request.decode_store:  # part of its tokens died with us: all are made again
                state.release(request, keep=True)
            request.phase = Phase.WAITING
        return calls

    def found(self, request: Request, now: float, reply: store_pb2.ReadStreamResponse) -> None:
        """The stream's record still lies in the arena: adopt its tokens and whoever runs it."""
        if request.phase is not Phase.RECOVERING:
            return
        request.phase = Phase.RUNNING
        request.slots[request.decode_store] = reply.slot
        request.cached = dict.fromkeys(request.stores, 0)
        self._state.saw_epoch(reply.epoch, reply.attempt)
        request.epoch, request.attempt = reply.epoch, reply.attempt
        request.decode_worker = reply.decode_writer
        request.prefill_worker = reply.prefill_writer or request.prefill_worker
        request.prefill_done = bool(reply.token_ids)
        self._take(request, now, reply.token_ids, reply.logprobs)
        ends = inference_pb2.FINISH_REASON_UNSPECIFIED
        if request.tokens:
            last = len(request.tokens) - 1
            ends = finish_reason(request.tokens[last][0], last, request.sampling)
        if request.text.stopped or ends:
            by_itself = request.decode_worker if ends else ""  # it has committed its last token
            reason = ends or inference_pb2.FINISH_REASON_STOP
            self._state.end(request, now, reason, finished_by=by_itself)
            return
        self._adopt(request, now)

    def lost(self, request: Request, now: float) -> None:
        """No store knows the stream: it starts again, and gives the same tokens."""
        if request.phase is Phase.RECOVERING:
            request.phase = Phase.WAITING

    def _adopt(self, request: Request, now: float) -> None:
        """Workers that are back go on; for those that are not, others are found. A prefill towards
        another arena that is not at work any more starts again: what it had sent is not known."""
        remote = request.prefill_store != request.decode_store
        prefill = self._state.workers.get(request.prefill_worker)
        at_work = prefill and prefill.running.get(request.request_id) == request.attempt
        if remote and not request.prefill_done and not at_work:
            self._state.compute_again(request, now, fresh=False)
            return
        for worker_id in {request.decode_worker, request.prefill_worker}:
            if worker_id in self._state.workers:
                self._state.remind(request, worker_id)
        self._state.ensure(request, now)


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
