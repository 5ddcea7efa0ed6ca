"""What workers say of a request: tokens, ends, refusals. Words of an old epoch change nothing. Pure."""

from __future__ import annotations

from baton.v1 import control_pb2, inference_pb2, store_pb2
from services.scheduler.books import Books
from services.scheduler.endings import Endings
from services.scheduler.moving import DECODE, PREFILL, Moving
from services.scheduler.placing import Placing
from services.scheduler.repairing import Repairing
from services.scheduler.request import Phase, Request
from services.scheduler.stops import Stops
from services.wire.messages import finish_reason

_NO_FINISH = inference_pb2.FINISH_REASON_UNSPECIFIED


class Reports:
    """Takes each token index once, and ends a request with its last one."""

    def __init__(
        self, books: Books, stops: Stops, endings: Endings, placing: Placing, moving: Moving,
        repairing: Repairing,
    ) -> None:  # fmt: skip
        self._books, self._stops, self._endings = books, stops, endings
        self._placing, self._moving, self._repairing = placing, moving, repairing

    # --- tokens ---

    def prefill_done(self, now: float, worker_id: str, done: control_pb2.PrefillDone) -> None:
        books = self._books
        request = books.requests.get(done.request_id)
        if request is None or done.attempt != request.attempt:
            books.counts.stale_epoch_refused += 1
            return
        request.computed += done.computed_tokens
        books.counts.prompt_tokens_computed += done.computed_tokens
        self._repairing.repaired(request, done.repaired_blocks, done.repaired_tokens)
        if request.phase is not Phase.RUNNING:
            return  # decode was faster to the end, or the record will tell
        request.prefill_done = True
        books.counts.prompt_tokens_cached += request.cached_tokens
        request.kv_bytes += done.kv_bytes
        request.ready.extend(done.ready)
        request.last_layer_at = done.last_layer_at
        self._resumed(request, now)
        self.take_token(request, now, done.first)
        self._after_tokens(request, now, done.finish, worker_id)
        self._moving.ensure(request, now)

    def step_reported(self, now: float, worker_id: str, stream: control_pb2.StreamTokens) -> None:
        request = self._books.requests.get(stream.request_id)
        running = request is not None and request.phase is Phase.RUNNING
        if request is None or not running or self._stale(request, worker_id, stream.epoch):
            self._books.counts.stale_epoch_refused += running
            if stream.finish:  # it has come to its end there, and is let go of
                self._stops.answered(stream.request_id, worker_id, stream.epoch)
            return
        if stream.tokens:
            request.prefill_done = True
            self._resumed(request, now)
        for token in stream.tokens:
            if not self.take_token(request, now, token):
                return  # nor is its end believed before what is missing has come
            if request.text.stopped:
                break
        self._after_tokens(request, now, stream.finish, worker_id)

    def _stale(self, request: Request, worker_id: str, epoch: int) -> bool:
        if "epoch" in self._books.config.unsafe:
            return False
        return epoch != request.epoch or worker_id != request.decode_worker

    def _resumed(self, request: Request, now: float) -> None:
        if request.interrupted_at is not None:
            request.stall_s = max(request.stall_s, now - request.interrupted_at)
            request.interrupted_at = None

    def take_token(self, request: Request, now: float, token: control_pb2.Token) -> bool:
        """Each index once: a duplicate must be equal. False at a gap, which is asked for again."""
        known, unsafe = len(request.tokens), self._books.config.unsafe
        if token.index < known and "dedupe" not in unsafe:
            same = request.tokens[token.index][0] == token.token_id
            assert same or unsafe, f"{request.request_id} token {token.index} differs"
            self._books.counts.duplicate_tokens_absorbed += 1
            return True
        if token.index > known and "record" not in unsafe:
            request.tell(f"token {token.index} came before {known}")
            self._moving.send_decode(request)
            return False
        if not request.tokens:
            request.first_token_at = now
        request.last_token_at = now
        request.tokens.append((token.token_id, token.logprob))
        ends = finish_reason(token.token_id, token.index, request.sampling)
        event = inference_pb2.TokenEvent(index=token.index, token_id=token.token_id)
        if not request.text.stopped:
            event.text = request.text.push(token.token_id, last=bool(ends))
        if request.sampling.logprobs:
            event.logprob = token.logprob
        request.events.append(
            inference_pb2.GenerateEvent(request_id=request.request_id, token=event)
        )
        self._books.notify(request)
        return True

    def _after_tokens(
        self, request: Request, now: float, finish: inference_pb2.FinishReason, worker_id: str
    ) -> None:
        if request.text.stopped and finish == _NO_FINISH:
            self._endings.end(request, now, inference_pb2.FINISH_REASON_STOP)
        elif request.text.stopped:
            reason = inference_pb2.FINISH_REASON_STOP
            self._endings.end(request, now, reason, finished_by=worker_id)
        elif finish != _NO_FINISH:
            self._endings.end(request, now, finish, finished_by=worker_id)

    def read_first(self, request: Request, now: float, reply: store_pb2.ReadStreamResponse) -> None:
        """The first token of a prefill that could not report it."""
        if request.phase is not Phase.RUNNING or request.prefill_done or not reply.token_ids:
            return
        if reply.attempt != request.attempt:
            return  # it has been opened anew since
        request.prefill_done = True
        first = control_pb2.Token(
            index=reply.first_index, token_id=reply.token_ids[0], logprob=reply.logprobs[0]
        )
        self.take_token(request, now, first)
        finish = finish_reason(first.token_id, first.index, request.sampling)
        self._after_tokens(request, now, finish, request.prefill_worker)

    # --- other words ---

    def decode_started(self, started: control_pb2.DecodeStarted) -> None:
        request = self._books.requests.get(started.request_id)
        if request is None or started.epoch != request.epoch:
            return
        request.kv_arrived = True
        self._repairing.repaired(request, started.repaired_blocks, started.repaired_tokens)
        if not request.verified:
            request.verified.extend(started.verified)
            request.runnable_at = started.runnable_at

    def stopped(self, now: float, worker_id: str, stopped: control_pb2.Stopped) -> None:
        """The worker touches this request's pages no more, under this epoch."""
        request = self._books.requests.get(stopped.request_id)
        if request is None or request.done:
            self._stops.answered(stopped.request_id, worker_id, stopped.epoch)
            return
        running = request.phase is Phase.RUNNING
        if running and worker_id == request.prefill_worker and stopped.epoch == request.attempt:
            request.prefill_stopped = True
            if PREFILL in request.left:
                self._moving.ensure(request, now)  # it has refused: nothing has been handed over
            elif request.prefill_done:
                self._prefill_left(request)
            elif not request.damage and PREFILL not in request.moving:
                self._report_lost(request, now)
        elif not running or worker_id != request.decode_worker or stopped.epoch != request.epoch:
            self._stops.answered(stopped.request_id, worker_id, stopped.epoch)

    def _report_lost(self, request: Request, now: float) -> None:
        """Prefill has come to its end and nobody has heard how: asked again, it has it at hand. Of one
        in another arena, after a recovery, not even the slot is known."""
        if request.prefill_store in request.slots:
            self._moving.send_prefill(request)
        else:
            self._placing.compute_again(request, now, fresh=False)

    def _prefill_left(self, request: Request) -> None:
        """Prefill and its transfer are over: others may share the prompt's blocks."""
        for store in request.stores:
            message = store_pb2.PublishRequest(request_id=request.request_id)
            self._books.call(request.request_id, store, "Publish", message)
        if request.prefill_store != request.decode_store:
            self._endings.release_store(request, request.prefill_store, keep=True, live=[])
            request.prefill_store = request.decode_store

    def refused(self, now: float, worker_id: str, refused: control_pb2.Refused) -> None:
        """A worker cannot go on: because it has been fenced, or because KV failed verification."""
        books = self._books
        request = books.requests.get(refused.request_id)
        self._stops.answered(refused.request_id, worker_id, refused.epoch)
        if request is None or request.phase is not Phase.RUNNING:
            return
        decoding = worker_id == request.decode_worker
        current = (decoding and refused.epoch == request.epoch) or (
            worker_id == request.prefill_worker and refused.epoch == request.attempt
        )
        if not current:
            books.counts.stale_epoch_refused += 1
            return
        request.tell(f"{books.name(worker_id)} refused: {refused.message}")
        role = DECODE if decoding else PREFILL
        if refused.code == "FAILED_PRECONDITION":
            request.left.add(role)
        if role in request.moving:
            return  # the fence that it ran into is ours
        if refused.code == "FAILED_PRECONDITION":
            self._moving.ensure(request, now)
        elif refused.code == "DATA_LOSS":
            self._repairing.refused(request, now, refused, decoding=decoding)
        elif refused.code == "UNAVAILABLE":
            books.interrupted(request, now, refused.code)
            self._placing.compute_again(request, now, fresh=False)
        else:
            self._endings.fail(request, now, refused.code, refused.message, retryable=False)
