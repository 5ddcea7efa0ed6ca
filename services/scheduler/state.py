"""The scheduler's mind: events in, instructions out. Pure: no clock, no socket, no thread.

A request goes WAITING -> OPENING -> RUNNING -> DONE. While it runs, `_ensure` compares the workers it
has with the workers there are, and starts whatever brings the two together: the same few lines serve
a crash, a paused worker, a restart of this process and a worker that was lost while pages were being
leased.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from baton.v1 import cluster_pb2, control_pb2, inference_pb2, journal_pb2, store_pb2
from policies.placement import Hold, LeastLoaded
from policies.view import ClusterView, RequestView, WorkerView
from services.ops.errors import Overloaded, RequestConflict, UnknownRequest
from services.scheduler import orders, timing
from services.scheduler.config import SchedulerConfig
from services.scheduler.recovery import Recovery, journal
from services.scheduler.request import (
    CallStore,
    Instruction,
    Notify,
    Phase,
    Request,
    Send,
    TextFactory,
    WorkerInfo,
    Write,
)
from services.wire.messages import finish_reason

HOLD_RETRY_S = 0.05
STOPS_MAX = 10_000  # unanswered stops that are remembered
MAX_EPOCH = 0xFFFFFFFF
PREFILL, DECODE = "prefill", "decode"
_CANCELLED = inference_pb2.FINISH_REASON_CANCELLED


class SchedulerState:
    """All requests and workers. Methods are events; each gives the instructions that follow."""

    def __init__(
        self, config: SchedulerConfig, policy: LeastLoaded, first_epoch: int, texts: TextFactory
    ) -> None:
        self.config, self.policy, self._texts = config, policy, texts
        self._epoch = first_epoch
        self.requests: dict[str, Request] = {}
        self.workers: dict[str, WorkerInfo] = {}
        self.ingest: dict[str, str] = {}  # store -> where frames from another arena go
        self.counts = cluster_pb2.RequestCounts()
        self.names: dict[str, str] = {}  # worker id -> name, the dead included
        self._out: list[Instruction] = []
        self._asked: set[str] = set()  # workers whose past with another scheduler is settled
        self._stops: dict[tuple[str, str], int] = {}  # (request, worker) -> epoch, unanswered
        self._recovery = Recovery(self)

    # --- requests come and go ---

    def accept(
        self, now: float, unix_ms: int, body: inference_pb2.GenerateRequest, prompt: list[int],
        sampling: control_pb2.ResolvedSampling, deadline_s: float | None,
    ) -> list[Instruction]:  # fmt: skip
        """A new request, already validated. Raises Overloaded, RequestConflict."""
        assert body.request_id not in self.requests
        if self._count(Phase.WAITING) >= self.config.waiting_max:
            self.counts.refused += 1
            raise Overloaded(f"waiting_max: {self.config.waiting_max} requests are waiting already")
        deadline_ms = int(unix_ms + deadline_s * 1e3) if deadline_s is not None else 0
        request = self.new_request(now, body, prompt, sampling, unix_ms, deadline_ms)
        request.deadline_at = None if deadline_s is None else now + deadline_s
        self.counts.accepted += 1
        self._out.append(Write(orders.accepted(request)))
        request.tell("accepted")
        self._place_waiting(now)
        return self._drain()

    def new_request(
        self, now: float, body: inference_pb2.GenerateRequest, prompt: list[int],
        sampling: control_pb2.ResolvedSampling, unix_ms: int, deadline_unix_ms: int,
    ) -> Request:  # fmt: skip
        """Adds a request, with the defaults of what its body leaves open."""
        orphan = body.orphan_ms if body.HasField("orphan_ms") else self.config.orphan_ms
        retain = body.retain_ms if body.HasField("retain_ms") else self.config.retain_ms
        request = Request(
            body, prompt, sampling, self._texts(body), unix_ms, now, deadline_unix_ms, None,
            orphan / 1e3, retain / 1e3,
        )  # fmt: skip
        self.requests[request.request_id] = request
        return request

    def find(self, request_id: str) -> Request:
        if request_id not in self.requests:
            raise UnknownRequest(f"request_id: {request_id!r} is not known, or no longer")
        return self.requests[request_id]

    def same_body(self, body: inference_pb2.GenerateRequest) -> bool:
        """Whether this id is known with the same body. Raises RequestConflict when with another."""
        known = self.requests.get(body.request_id)
        if known and known.body != body:
            raise RequestConflict(f"request_id: {body.request_id!r} is in use with another body")
        return known is not None

    def cancel(self, now: float, request_id: str, why: str) -> list[Instruction]:
        request = self.find(request_id)
        if not request.done:
            request.tell(why)
            self.end(request, now, _CANCELLED)
        return self._drain()

    def reader_joined(self, request_id: str) -> None:
        request = self.find(request_id)
        request.readers += 1
        request.orphan_at = None

    def reader_left(self, now: float, request_id: str) -> list[Instruction]:
        """The last reader's leaving starts the orphan clock."""
        request = self.requests.get(request_id)
        if request is None:
            return []
        request.readers -= 1
        assert request.readers >= 0
        if request.readers == 0 and not request.done:
            request.orphan_at = now + request.orphan_s
        return self.tick(now)

    # --- workers come and go ---

    def worker_registered(self, now: float, register: control_pb2.Register) -> list[Instruction]:
        running = {stream.request_id: stream.epoch for stream in register.running}
        info = WorkerInfo(register.worker, now, running)
        info.worker.state = cluster_pb2.WORKER_STATE_READY
        if info.worker_id not in self._asked and not self._recovery.pending:
            self._out.extend(self.let_go(info))
        self.workers[info.worker_id] = info
        self.names[info.worker_id] = info.worker.name
        for (request_id, worker_id), epoch in self._stops.items():
            if worker_id == info.worker_id:  # what it was told may be lost: it answers again
                self._send(worker_id, orders.stop(request_id, epoch))
        for request_id, epoch in running.items():
            self._stop_if_foreign(info, request_id, epoch)
        for request in list(self.requests.values()):
            if request.phase is Phase.RUNNING:
                self.remind(request, info.worker_id)
        self._refresh(now)
        return self._drain()

    def remind(self, request: Request, worker_id: str) -> None:
        """A worker is back: what it was told, and what it has said meanwhile, may be lost. The same
        epoch again only makes it report once more."""
        if worker_id == request.decode_worker and request.needs_decode:
            self.send_decode(request)
        known = request.prefill_store in request.slots  # not after a recovery, in another arena
        if worker_id == request.prefill_worker and not request.prefill_done and known:
            self.send_prefill(request)

    def let_go(self, info: WorkerInfo) -> list[CallStore]:
        """What it said to the scheduler before this one is lost; what it works on, it has just said.
        What it gets from now on is not meant: a store may hear of this late."""
        self._asked.add(info.worker_id)
        mine = [
            r.request_id
            for r in self.requests.values()
            if not r.done and info.worker_id in (r.prefill_worker, r.decode_worker)
        ]
        message = store_pb2.RetireRequest(
            writer=info.worker_id, still_running=[*info.running, *mine], epoch=self._epoch
        )
        return [CallStore("", store, "Retire", message) for store in self.ingest]

    def _stop_if_foreign(self, info: WorkerInfo, request_id: str, epoch: int) -> None:
        """It runs what is nobody's any more: an ended request, or another epoch's."""
        request = self.requests.get(request_id)
        if request and not request.done and epoch in (request.epoch, request.attempt):
            return
        if request and request.phase is Phase.RECOVERING:
            return
        self._stop(request_id, info.worker_id, epoch)

    def _stop(self, request_id: str, worker_id: str, epoch: int) -> None:
        """Tells a worker to let go of a request, and remembers it until it has answered."""
        self._stops[request_id, worker_id] = epoch
        self._send(worker_id, orders.stop(request_id, epoch))
        while len(self._stops) > STOPS_MAX:
            del self._stops[next(iter(self._stops))]

    def worker_heard(self, now: float, worker_id: str) -> list[Instruction]:
        info = self.workers.get(worker_id)
        if info is None:
            return []
        info.heard_at = now
        if info.worker.state == cluster_pb2.WORKER_STATE_SUSPECT:
            info.worker.state = cluster_pb2.WORKER_STATE_READY
            self.counts.false_suspicions += 1
            self._refresh(now)
        return self._drain()

    def worker_lost(self, now: float, worker_id: str) -> list[Instruction]:
        """Its stream has ended: it is dead, or cut off from here."""
        self.workers.pop(worker_id, None)
        for request in list(self.requests.values()):
            if worker_id == request.decode_worker and not request.done:
                self._interrupted(request, now, f"decode {self._name(worker_id)} lost")
            if worker_id == request.prefill_worker and not request.prefill_done:
                request.tell(f"prefill {self._name(worker_id)} lost")
        self._refresh(now)
        return self._drain()

    def _name(self, worker_id: str) -> str:
        return self.names.get(worker_id, worker_id[:8])

    def _interrupted(self, request: Request, now: float, why: str) -> None:
        request.tell(why)
        if request.prefill_done and request.interrupted_at is None:
            request.interrupted_at = now

    def tick(self, now: float) -> list[Instruction]:
        """Time has passed: suspicions, deadlines, orphans, retries, and forgetting."""
        for info in self.workers.values():
            silent = now - info.heard_at
            if info.ready and silent * 1e3 > self.config.suspect_ms:
                info.worker.state = cluster_pb2.WORKER_STATE_SUSPECT
        for request in list(self.requests.values()):
            if request.done:
                if (
                    request.forget_at is not None
                    and now >= request.forget_at
                    and not request.readers
                ):
                    del self.requests[request.request_id]
            elif request.deadline_at is not None and now >= request.deadline_at:
                request.tell("deadline passed")
                self.end(request, now, _CANCELLED)
            elif request.orphan_at is not None and now >= request.orphan_at:
                request.tell("no reader")
                self.end(request, now, _CANCELLED)
        self._out.extend(self._recovery.tick(now))
        self._refresh(now)
        return self._drain()

    # --- placement ---

    def view(self) -> ClusterView:
        """What the policy decides on."""
        load: dict[str, int] = {}
        for request in self.requests.values():
            if request.phase in (Phase.OPENING, Phase.RUNNING):
                if not request.prefill_done:
                    load[request.prefill_worker] = load.get(request.prefill_worker, 0) + 1
                load[request.decode_worker] = load.get(request.decode_worker, 0) + 1
        ready = sorted((w for w in self.workers.values() if w.ready), key=lambda w: w.worker.name)
        return ClusterView(
            tuple(
                WorkerView(w.worker_id, w.role, w.worker.store_id, load.get(w.worker_id, 0))
                for w in ready
            )
        )

    def _refresh(self, now: float) -> None:
        for request in list(self.requests.values()):
            if request.phase is Phase.RUNNING:
                self.ensure(request, now)
        self._place_waiting(now)

    def _place_waiting(self, now: float) -> None:
        if self._recovery.pending:
            return  # what the stores hold is not known yet
        for request in [r for r in self.requests.values() if r.phase is Phase.WAITING]:
            if now < request.held_until:
                return
            view = RequestView(request.request_id, len(request.prompt), request.sampling.max_tokens)
            placement = self.policy.place(view, self.view())
            if isinstance(placement, Hold):
                return
            request.prefill_worker, request.decode_worker = placement.prefill, placement.decode
            request.prefill_store = self.workers[placement.prefill].worker.store_id
            request.decode_store = self.workers[placement.decode].worker.store_id
            self._open(request, now)

    def _next_epoch(self) -> int:
        self._epoch += 1
        return self._epoch

    @property
    def epoch(self) -> int:
        """The last epoch or attempt that has been given out."""
        return self._epoch

    def saw_epoch(self, *epochs: int) -> None:
        """Epochs that are in use already; later ones are greater."""
        self._epoch = max(self._epoch, *epochs)

    def _open(self, request: Request, now: float) -> None:
        """Leases pages in decode's store, and in prefill's when that is another."""
        request.phase = Phase.OPENING
        request.epoch, request.attempt = self._next_epoch(), self._next_epoch()
        request.base_index = len(request.tokens)
        request.prefill_done = request.decode_told = False
        request.slots, request.cached = {}, {}
        request.dispatched_at = request.dispatched_at or now
        self._out.append(Write(orders.placed(request)))
        for store in request.stores:
            self._call(request, store, "OpenStream", orders.open_stream(request, store))
        prefill, decode = self._name(request.prefill_worker), self._name(request.decode_worker)
        request.tell(f"placed on {prefill} and {decode}")

    def _call(self, request: Request, store: str, method: str, message: object) -> None:
        self._out.append(CallStore(request.request_id, store, method, message))

    def _launch(self, request: Request, now: float) -> None:
        """All pages are leased: decode gets ready while prefill computes."""
        request.phase = Phase.RUNNING
        request.fresh_kv = False
        request.cached_tokens = max(request.cached_tokens, min(request.cached.values()))
        self.ensure(request, now)
        if request.needs_decode and DECODE not in request.moving:
            self.send_decode(request)
        if PREFILL not in request.moving:
            self.send_prefill(request)

    def send_decode(self, request: Request) -> None:
        request.decode_told = True
        report_from = 0 if "dedupe" in self.config.unsafe else len(request.tokens)
        self._send(request.decode_worker, orders.prepare_decode(request, report_from))

    def send_prefill(self, request: Request) -> None:
        request.prefill_stopped = False
        decode = self.workers.get(request.decode_worker)
        announce = decode.worker.address if decode and request.needs_decode else ""
        ingest = self.ingest.get(request.decode_store, "")
        self._send(request.prefill_worker, orders.execute_prefill(request, announce, ingest))

    def _send(self, worker_id: str, command: control_pb2.WorkerCommand) -> None:
        self._out.append(Send(worker_id, command))

    # --- keeping a running request supplied with workers ---

    def ensure(self, request: Request, now: float) -> None:
        """Starts what a running request needs: another decode, another prefill."""
        if request.phase is not Phase.RUNNING or now < request.held_until:
            return
        orphaned = not request.prefill_done and request.prefill_worker not in self.workers
        if orphaned and PREFILL not in request.moving:
            self._move_prefill(request)
        if request.needs_decode and DECODE not in request.moving:
            self._ensure_decode(request, now)

    def _ensure_decode(self, request: Request, now: float) -> None:
        present = self.workers.get(request.decode_worker)
        if present and present.ready:
            return
        successor = self.policy.successor(self.view(), request.decode_store, request.decode_worker)
        if successor is None:
            return  # only death or a ready successor bumps the epoch; a death waits for a restart
        if present:
            self._interrupted(request, now, f"decode {self._name(request.decode_worker)} is silent")
        if self.config.recover == "reprefill" and request.prefill_done:
            self.compute_again(request, now, fresh=True)
            return
        epoch = self._next_epoch()
        moved = orders.placed(request, epoch=epoch, decode_worker=successor)
        self._out.append(Write(moved))
        request.moving[DECODE] = epoch
        message = orders.reassign(request, DECODE, epoch, successor)
        self._call(request, request.decode_store, "Reassign", message)

    def _move_prefill(self, request: Request) -> None:
        able = [
            w
            for w in self.view().of(PREFILL)
            if w.store_id == request.prefill_store and w.worker_id != request.prefill_worker
        ]
        if not able:
            return
        worker = min(able, key=lambda w: (w.load, w.worker_id)).worker_id
        attempt = self._next_epoch()
        self._out.append(Write(orders.placed(request, attempt=attempt, prefill_worker=worker)))
        request.moving[PREFILL] = attempt
        together = request.prefill_store == request.decode_store
        for store in request.stores:
            writer = worker if together or store == request.prefill_store else ""
            message = orders.reassign(request, PREFILL, attempt, writer)
            self._call(request, store, "Reassign", message)

    def compute_again(self, request: Request, now: float, *, fresh: bool) -> None:
        """The stream's KV is lost or not to be trusted: prefill computes prompt and tokens anew."""
        request.tell("KV is computed again")
        request.recomputed += len(request.prompt)
        self.counts.prompt_tokens_recomputed += len(request.prompt)
        self.release(request, keep=False)
        request.fresh_kv = fresh
        request.takeovers += 1
        request.phase = Phase.WAITING
        request.moving.clear()
        self._place_waiting(now)

    # --- answers of the stores ---

    def store_replied(
        self, now: float, call: CallStore, reply: object | None, code: str, message: str
    ) -> list[Instruction]:
        """`reply` of a call, or None with the gRPC status name and message."""
        request = self.requests.get(call.request_id)
        if request is None:
            return self._drain()
        if request.done:
            if isinstance(reply, store_pb2.ReassignResponse) and not reply.previous_gone:
                self._stop_fenced(request, orders.role_of(call.message))
            return self._drain()
        if isinstance(reply, store_pb2.OpenStreamResponse):
            self._opened(request, now, call, reply)
        elif isinstance(reply, store_pb2.ReassignResponse):
            self._reassigned(request, now, call, reply)
        elif isinstance(reply, store_pb2.ReadStreamResponse):
            if request.phase is Phase.RECOVERING:
                self._recovery.found(request, now, reply)
            else:
                self._read_first(request, now, reply)
        elif reply is None:
            self._store_failed(request, now, call, code, message)
        return self._drain()

    def _opened(
        self, request: Request, now: float, call: CallStore, reply: store_pb2.OpenStreamResponse
    ) -> None:
        if request.phase is not Phase.OPENING or call.message.epoch != request.epoch:
            return
        request.slots[call.store_id] = reply.slot
        request.cached[call.store_id] = reply.cached_tokens
        if len(request.slots) == len(request.stores):
            self._launch(request, now)

    def _reassigned(
        self, request: Request, now: float, call: CallStore, reply: store_pb2.ReassignResponse
    ) -> None:
        asked: store_pb2.ReassignRequest = call.message
        role = orders.role_of(asked)
        if request.phase is not Phase.RUNNING or request.moving.get(role) != asked.epoch:
            return  # the request has been opened anew since
        request.slots[call.store_id] = reply.slot
        if role == PREFILL:
            if reply.committed == len(request.prompt) + request.base_index:
                self._prefill_had_finished(request, now)
                return
            request.cached[call.store_id] = reply.committed
            if call.store_id == request.prefill_store:
                del request.moving[PREFILL]
                if not reply.previous_gone:
                    self._stop_fenced(request, PREFILL)
                request.attempt, request.prefill_worker = asked.epoch, asked.writer
                self.ensure(request, now)
                if PREFILL not in request.moving:
                    self.send_prefill(request)
            return
        del request.moving[DECODE]
        if not reply.previous_gone:
            self._stop_fenced(request, DECODE)
        request.epoch, request.decode_worker = asked.epoch, asked.writer
        request.takeovers += request.prefill_done
        self.counts.takeovers += request.prefill_done
        request.tell(f"decode {self._name(asked.writer)} takes over at step {reply.committed}")
        self.ensure(request, now)
        if DECODE not in request.moving and asked.writer in self.workers:
            self.send_decode(request)
            self._move_announcements(request)

    def _stop_fenced(self, request: Request, role: str) -> None:
        """The worker that has just been fenced may wake up: its pages wait for its answer."""
        worker = request.prefill_worker if role == PREFILL else request.decode_worker
        epoch = request.attempt if role == PREFILL else request.epoch
        if worker:
            self._stop(request.request_id, worker, epoch)

    def _prefill_had_finished(self, request: Request, now: float) -> None:
        """It died after the first token was in the record and before its report was here."""
        del request.moving[PREFILL]
        if request.prefill_store != request.decode_store:
            self.compute_again(
                request, now, fresh=False
            )  # how far the other arena is, it alone knew
            return
        request.prefill_stopped = True
        message = store_pb2.ReadStreamRequest(request_id=request.request_id)
        self._call(request, request.decode_store, "ReadStream", message)

    def _read_first(
        self, request: Request, now: float, reply: store_pb2.ReadStreamResponse
    ) -> None:
        """The first token of a prefill that could not report it."""
        if request.phase is not Phase.RUNNING or request.prefill_done or not reply.token_ids:
            return
        request.prefill_done = True
        first = control_pb2.Token(
            index=reply.first_index, token_id=reply.token_ids[0], logprob=reply.logprobs[0]
        )
        self.take_token(request, now, first)
        finish = finish_reason(first.token_id, first.index, request.sampling)
        self._after_tokens(request, now, finish, request.prefill_worker)

    def _move_announcements(self, request: Request) -> None:
        if request.prefill_done:
            return
        announce = self.workers[request.decode_worker].worker.address
        self._send(request.prefill_worker, orders.move_announcements(request, announce))

    def _store_failed(
        self, request: Request, now: float, call: CallStore, code: str, message: str
    ) -> None:
        """A store said no. What it lacks is computed again; what it has no room for waits."""
        request.tell(f"{call.method}: {code}: {message}")
        if call.method == "OpenStream":
            if request.phase is not Phase.OPENING:
                return
            self.release(request, keep=False)
            busy = any(
                r.phase in (Phase.OPENING, Phase.RUNNING)
                for r in self.requests.values()
                if r is not request
            )
            full = code == "RESOURCE_EXHAUSTED"
            if not full or (not busy and request.held_until):
                self._fail(request, now, code, message, retryable=full)
                return
            request.phase = Phase.WAITING
            request.held_until = now + HOLD_RETRY_S
        elif call.method == "Reassign":
            role = orders.role_of(call.message)
            if request.moving.get(role) != call.message.epoch:
                return
            del request.moving[role]
            if code == "NOT_FOUND":
                self.compute_again(request, now, fresh=False)
            else:
                request.held_until = now + HOLD_RETRY_S
        elif call.method == "ReadStream" and request.phase is Phase.RECOVERING:
            self._recovery.lost(request, now)
            self._place_waiting(now)

    # --- reports of the workers ---

    def prefill_done(
        self, now: float, worker_id: str, done: control_pb2.PrefillDone
    ) -> list[Instruction]:
        request = self.requests.get(done.request_id)
        if request is None or done.attempt != request.attempt:
            self.counts.stale_epoch_refused += 1
            return self._drain()
        request.computed += done.computed_tokens
        self.counts.prompt_tokens_computed += done.computed_tokens
        if request.phase is not Phase.RUNNING:
            return self._drain()  # decode was faster to the end, or the record will tell
        request.prefill_done = True
        self.counts.prompt_tokens_cached += request.cached_tokens
        request.kv_bytes += done.kv_bytes
        request.ready.extend(done.ready)
        request.last_layer_at = done.last_layer_at
        self._resumed(request, now)
        self.take_token(request, now, done.first)
        self._after_tokens(request, now, done.finish, worker_id)
        self.ensure(request, now)
        return self._drain()

    def step_reported(
        self, now: float, worker_id: str, step: control_pb2.StepReport
    ) -> list[Instruction]:
        for stream in step.streams:
            request = self.requests.get(stream.request_id)
            running = request is not None and request.phase is Phase.RUNNING
            if request is None or not running or self._stale(request, worker_id, stream.epoch):
                self.counts.stale_epoch_refused += running
                if stream.finish:  # it has come to its end there, and is let go of
                    self._retire(stream.request_id, worker_id, stream.epoch)
                continue
            if stream.tokens:
                request.prefill_done = True
                self._resumed(request, now)
            for token in stream.tokens:
                self.take_token(request, now, token)
                if request.text.stopped:
                    break
            self._after_tokens(request, now, stream.finish, worker_id)
        return self._drain()

    def _stale(self, request: Request, worker_id: str, epoch: int) -> bool:
        if "epoch" in self.config.unsafe:
            return False
        return epoch != request.epoch or worker_id != request.decode_worker

    def _resumed(self, request: Request, now: float) -> None:
        if request.interrupted_at is not None:
            request.stall_s = max(request.stall_s, now - request.interrupted_at)
            request.interrupted_at = None

    def take_token(self, request: Request, now: float, token: control_pb2.Token) -> None:
        """Each index once: a duplicate must be equal, a gap is asked for again."""
        known = len(request.tokens)
        if token.index < known and "dedupe" not in self.config.unsafe:
            same = request.tokens[token.index][0] == token.token_id
            assert same or self.config.unsafe, f"{request.request_id} token {token.index} differs"
            self.counts.duplicate_tokens_absorbed += 1
            return
        if token.index > known and "record" not in self.config.unsafe:
            request.tell(f"token {token.index} came before {known}")
            self.send_decode(request)
            return
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
        self._out.append(Notify(request.request_id))

    def _after_tokens(
        self, request: Request, now: float, finish: inference_pb2.FinishReason, worker_id: str
    ) -> None:
        if request.text.stopped and finish == inference_pb2.FINISH_REASON_UNSPECIFIED:
            self.end(request, now, inference_pb2.FINISH_REASON_STOP)
        elif request.text.stopped:
            self.end(request, now, inference_pb2.FINISH_REASON_STOP, finished_by=worker_id)
        elif finish != inference_pb2.FINISH_REASON_UNSPECIFIED:
            self.end(request, now, finish, finished_by=worker_id)

    def decode_started(self, worker_id: str, started: control_pb2.DecodeStarted) -> None:
        request = self.requests.get(started.request_id)
        if request and started.epoch == request.epoch and not request.verified:
            request.verified.extend(started.verified)
            request.runnable_at = started.runnable_at

    def stopped(
        self, now: float, worker_id: str, stopped: control_pb2.Stopped
    ) -> list[Instruction]:
        """The worker touches this request's pages no more, under this epoch."""
        request = self.requests.get(stopped.request_id)
        if request is None or request.done:
            self._retire(stopped.request_id, worker_id, stopped.epoch)
            return self._drain()
        running = request.phase is Phase.RUNNING
        if running and worker_id == request.prefill_worker and stopped.epoch == request.attempt:
            request.prefill_stopped = True
            if request.prefill_done:
                self._prefill_left(request)
            elif PREFILL not in request.moving and request.prefill_store in request.slots:
                self.send_prefill(request)  # its report is lost: asked again, it has it at hand
        elif not running or worker_id != request.decode_worker or stopped.epoch != request.epoch:
            self._retire(stopped.request_id, worker_id, stopped.epoch)
        return self._drain()

    def _prefill_left(self, request: Request) -> None:
        """Prefill and its transfer are over: others may share the prompt's blocks."""
        for store in request.stores:
            message = store_pb2.PublishRequest(request_id=request.request_id)
            self._call(request, store, "Publish", message)
        if request.prefill_store != request.decode_store:
            self.release_store(request, request.prefill_store, keep=True, live=[])
            request.prefill_store = request.decode_store

    def _retire(self, request_id: str, worker_id: str, epoch: int) -> None:
        """The worker has let go of what it got for this request up to this epoch."""
        if self._stops.get((request_id, worker_id), MAX_EPOCH) <= epoch:
            del self._stops[request_id, worker_id]
        message = store_pb2.RetireRequest(request_id=request_id, writer=worker_id, epoch=epoch)
        for store in self.ingest:
            self._out.append(CallStore(request_id, store, "Retire", message))

    def refused(
        self, now: float, worker_id: str, refused: control_pb2.Refused
    ) -> list[Instruction]:
        """A worker cannot go on: because it has been fenced, or because KV failed verification."""
        request = self.requests.get(refused.request_id)
        self._retire(refused.request_id, worker_id, refused.epoch)
        if request is None or request.phase is not Phase.RUNNING:
            return self._drain()
        current = (worker_id == request.decode_worker and refused.epoch == request.epoch) or (
            worker_id == request.prefill_worker and refused.epoch == request.attempt
        )
        if not current:
            self.counts.stale_epoch_refused += 1
            return self._drain()
        request.tell(f"{self._name(worker_id)} refused: {refused.message}")
        decoding = worker_id == request.decode_worker
        if (DECODE if decoding else PREFILL) in request.moving:
            return self._drain()  # the fence that it ran into is ours
        if refused.code == "FAILED_PRECONDITION":
            if decoding:
                request.decode_worker = ""
            else:
                request.prefill_worker = ""
            self.ensure(request, now)
        elif refused.code in ("DATA_LOSS", "UNAVAILABLE"):
            self._interrupted(request, now, refused.code)
            self._invalidate(request, refused.bad_blocks)
            self.compute_again(request, now, fresh=refused.code == "DATA_LOSS")
        else:
            self._fail(request, now, refused.code, refused.message, retryable=False)
        return self._drain()

    def _invalidate(self, request: Request, blocks: Sequence[int]) -> None:
        """Nobody finds these blocks in the cache again."""
        if not blocks:
            return
        message = store_pb2.InvalidateRequest(request_id=request.request_id, blocks=blocks)
        for store in request.stores:
            self._call(request, store, "Invalidate", message)

    # --- the end ---

    def end(
        self, request: Request, now: float, reason: inference_pb2.FinishReason,
        finished_by: str = "",
    ) -> None:  # fmt: skip
        """The one way a request ends well. `finished_by` has stopped writing by itself."""
        assert not request.done
        if reason == _CANCELLED:
            self.counts.cancelled += 1
        else:
            self.counts.finished += 1
        finished = inference_pb2.Finished(
            reason=reason, usage=timing.usage(request),
            timing=timing.timing(
                request, now, self._name(request.prefill_worker), self._name(request.decode_worker)
            ),
        )  # fmt: skip
        event = inference_pb2.GenerateEvent(request_id=request.request_id, finished=finished)
        self._conclude(request, now, event, finished_by)

    def _fail(
        self, request: Request, now: float, code: str, message: str, *, retryable: bool
    ) -> None:
        self.counts.failed += 1
        failed = inference_pb2.Failed(
            code=code, message=message, retryable=retryable, story=request.story
        )
        event = inference_pb2.GenerateEvent(request_id=request.request_id, failed=failed)
        self._conclude(request, now, event, "")

    def _conclude(
        self, request: Request, now: float, event: inference_pb2.GenerateEvent, finished_by: str
    ) -> None:
        if request.phase is not Phase.WAITING and request.decode_store:
            self.release(request, keep=True, finished_by=finished_by)
        request.phase = Phase.DONE
        request.final = event
        request.orphan_at = None
        request.forget_at = now + request.retain_s
        self._out.append(Write(orders.ended(request)))
        self._out.append(Notify(request.request_id))

    def release(self, request: Request, *, keep: bool, finished_by: str = "") -> None:
        """Tells the workers to stop and gives the pages back; those that a worker may still write
        to wait in quarantine until it has said so. They are told to let go of all that they have got
        until now: a reassignment may be under way whose answer will not be waited for."""
        live = [] if request.prefill_stopped else [request.prefill_worker]
        if request.decode_told and finished_by != request.decode_worker:
            live.append(request.decode_worker)
        for worker in live:
            self._stop(request.request_id, worker, self._epoch)
        for store in request.stores:
            self.release_store(request, store, keep=keep, live=live)

    def release_store(self, request: Request, store: str, *, keep: bool, live: list[str]) -> None:
        message = store_pb2.ReleaseRequest(
            request_id=request.request_id, keep_blocks=keep, live_writers=live
        )
        self._call(request, store, "Release", message)

    # --- after a restart of this process ---

    def recover(
        self, now: float, unix_ms: int, records: Iterable[journal_pb2.JournalRecord]
    ) -> None:
        """Takes up the journal of the scheduler before this one; writes nothing."""
        self._recovery.replay(now, unix_ms, records)
        self._out.clear()

    def journal(self) -> list[journal_pb2.JournalRecord]:
        """The shortest journal that says what is known now."""
        return journal(self.requests.values(), self._epoch)

    # --- looking at it ---

    def _count(self, *phases: Phase) -> int:
        return sum(request.phase in phases for request in self.requests.values())

    def cluster_view(self, stores: Sequence[cluster_pb2.StorePages]) -> cluster_pb2.ClusterView:
        counts = cluster_pb2.RequestCounts()
        counts.CopyFrom(self.counts)
        counts.waiting = self._count(Phase.WAITING, Phase.RECOVERING)
        counts.running = self._count(Phase.OPENING, Phase.RUNNING)
        workers = [
            orders.worker_view(info, self.requests.values())
            for info in sorted(self.workers.values(), key=lambda w: str(w.worker.name))
        ]
        return cluster_pb2.ClusterView(workers=workers, stores=stores, requests=counts)

    def check_invariants(self) -> None:
        for request in self.requests.values():
            assert request.done == (request.final is not None), request.request_id
            assert request.readers >= 0
            if request.phase in (Phase.OPENING, Phase.RUNNING):
                assert request.epoch, request.request_id
                assert request.decode_store, request.request_id

    def _drain(self) -> list[Instruction]:
        out, self._out = self._out, []
        return out
