"""The scheduler's mind: events in, instructions out. Pure: no clock, no socket, no thread.

A request goes WAITING -> OPENING -> RUNNING -> DONE, by way of the rooms:

    placing    who shall work on it, and the leasing of its pages
    moving     another decode, another prefill, for as long as it runs
    stranded   another host, when the one with its pages does not come back
    reports    what its workers say
    endings    its one end, and the release of its pages
    stops      workers that have not let go of it yet
    recovery   all of them, after this process has died

They share the books. This module is the door: one method per event.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from baton.v1 import cluster_pb2, control_pb2, inference_pb2, journal_pb2, store_pb2
from policies.placement import LeastLoaded
from services.ops.errors import Overloaded, RequestConflict
from services.scheduler import orders
from services.scheduler.books import Books
from services.scheduler.config import SchedulerConfig
from services.scheduler.endings import CANCELLED, Endings
from services.scheduler.moving import Moving
from services.scheduler.placing import Placing
from services.scheduler.recovery import Recovery, journal
from services.scheduler.repairing import Repairing
from services.scheduler.reports import Reports
from services.scheduler.request import (
    CallStore,
    Instruction,
    Phase,
    Request,
    TextFactory,
    WorkerInfo,
)
from services.scheduler.stops import Stops
from services.scheduler.stranded import Stranded


class SchedulerState(Books):
    """All requests and workers. Methods are events; each gives the instructions that follow."""

    def __init__(
        self, config: SchedulerConfig, policy: LeastLoaded, first_epoch: int, texts: TextFactory
    ) -> None:
        super().__init__(config, policy, first_epoch, texts)
        self._stops = Stops(self)
        self._endings = Endings(self, self._stops)
        self._placing = Placing(self, self._endings)
        self._moving = Moving(self, self._stops, self._placing)
        self._stranded = Stranded(self, self._placing)
        self._reports = Reports(
            self, self._stops, self._endings, self._placing, self._moving,
            Repairing(self, self._placing, self._moving),
        )  # fmt: skip
        self._recovery = Recovery(
            self, self._stops, self._endings, self._placing, self._moving, self._reports
        )

    # --- requests come and go ---

    def accept(
        self, now: float, unix_ms: int, body: inference_pb2.GenerateRequest, prompt: list[int],
        sampling: control_pb2.ResolvedSampling, deadline_s: float | None,
    ) -> list[Instruction]:  # fmt: skip
        """A new request, already validated. Raises Overloaded, RequestConflict."""
        assert body.request_id not in self.requests
        if self.count(Phase.WAITING) >= self.config.waiting_max:
            self.counts.refused += 1
            raise Overloaded(f"waiting_max: {self.config.waiting_max} requests are waiting already")
        deadline_ms = int(unix_ms + deadline_s * 1e3) if deadline_s is not None else 0
        request = self.new_request(now, body, prompt, sampling, unix_ms, deadline_ms)
        request.deadline_at = None if deadline_s is None else now + deadline_s
        self.counts.accepted += 1
        self.write(orders.accepted(request))
        request.tell("accepted")
        self._placing.place_waiting(now)
        return self.drain()

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
            self._endings.end(request, now, CANCELLED)
        return self.drain()

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
        if request.readers == 0 and not request.done and "orphan" not in self.config.unsafe:
            request.orphan_at = now + request.orphan_s
        return self.tick(now)

    # --- workers come and go ---

    def worker_registered(self, now: float, register: control_pb2.Register) -> list[Instruction]:
        running = {stream.request_id: stream.epoch for stream in register.running}
        info = WorkerInfo(register.worker, now, running, self.epoch)
        info.worker.state = cluster_pb2.WORKER_STATE_READY
        if info.worker_id in self.names and info.worker_id not in self.workers:
            self.counts.false_suspicions += 1  # it was cut off, or paused, and never dead
        if not self.recovering:
            self.call_each(self._stops.settle(info))
        self.workers[info.worker_id] = info
        self.remember_name(info)
        self._stops.repeat(info.worker_id)
        self._stops.foreign(info)
        for request in list(self.requests.values()):
            if request.phase is Phase.RUNNING:
                self._moving.remind(request, info.worker_id)
        self._refresh(now)
        return self.drain()

    def worker_heard(self, now: float, worker_id: str) -> list[Instruction]:
        info = self.workers.get(worker_id)
        if info is None:
            return []
        info.heard_at = now
        if info.worker.state == cluster_pb2.WORKER_STATE_SUSPECT:
            info.worker.state = cluster_pb2.WORKER_STATE_READY
            self.counts.false_suspicions += 1
            self._refresh(now)
        return self.drain()

    def beat(self, worker_id: str, heartbeat: control_pb2.Heartbeat) -> None:
        """A worker's running totals, for whoever looks."""
        if worker_id in self.workers:
            worker = self.workers[worker_id].worker
            worker.streams, worker.fenced = heartbeat.streams, heartbeat.fenced

    def worker_lost(self, now: float, worker_id: str) -> list[Instruction]:
        """Its stream has ended: it is dead, or cut off from here."""
        self.workers.pop(worker_id, None)
        for request in list(self.requests.values()):
            if worker_id == request.decode_worker and not request.done:
                self.interrupted(request, now, f"decode {self.name(worker_id)} lost")
            if worker_id == request.prefill_worker and not request.prefill_done:
                request.tell(f"prefill {self.name(worker_id)} lost")
        self._refresh(now)
        return self.drain()

    @property
    def idle(self) -> bool:
        """Every request that is known has ended: time brings nothing but suspicion and forgetting."""
        return not self.recovering and all(request.done for request in self.requests.values())

    def tick(self, now: float) -> list[Instruction]:
        """Time has passed: suspicions, deadlines, orphans, retries, and forgetting."""
        for info in self.workers.values():
            silent = now - info.heard_at
            if info.ready and silent * 1e3 > self.config.suspect_ms:
                info.worker.state = cluster_pb2.WORKER_STATE_SUSPECT
        for request in list(self.requests.values()):
            self._endings.expire(request, now)
        self._stops.tick(now)
        self.call_each(self._recovery.tick(now))
        self._refresh(now)
        return self.drain()

    def _refresh(self, now: float) -> None:
        for request in list(self.requests.values()):
            self._moving.ensure(request, now)
        self._stranded.give_up(now)
        self._placing.place_waiting(now)

    # --- stores ---

    def stores_changed(
        self, ingest: dict[str, str], returned: Collection[str] = ()
    ) -> list[Instruction]:
        """Store -> its ingest address. One that was away while the others were recovered, or has missed
        calls and `returned`, may hold streams that nobody remembers."""
        fresh = [store for store in ingest if store not in self.ingest or store in returned]
        self.ingest = ingest
        if not self.recovering:
            self.call_each(self._recovery.reconcile(fresh))
        return self.drain()

    def writers_awaited(self, writers: Iterable[store_pb2.Awaited]) -> list[Instruction]:
        """A store waits for these: whoever has not been told, or has answered too early, is told."""
        for one in writers:
            self._stops.awaited(one.request_id, one.writer, one.epoch)
        return self.drain()

    def store_replied(
        self, now: float, call: CallStore, reply: object | None, code: str, message: str
    ) -> list[Instruction]:
        """`reply` of a call, or None with the gRPC status name and message."""
        request = self.requests.get(call.request_id)
        if isinstance(reply, store_pb2.ReconcileResponse):
            self._recovery.reconciled(call.store_id)
        if isinstance(reply, store_pb2.ReleaseResponse):
            self._stops.waited_for(call.request_id, reply.waiting_for)
        if request is None:
            return self.drain()
        if request.done:
            if isinstance(reply, store_pb2.ReassignResponse) and not reply.previous_gone:
                self._moving.stop_fenced(request, orders.role_of(call.message))
            return self.drain()
        if isinstance(reply, store_pb2.OpenStreamResponse):
            self._opened(request, now, call, reply)
        elif isinstance(reply, store_pb2.ReassignResponse):
            self._moving.reassigned(request, now, call, reply)
        elif isinstance(reply, store_pb2.ReadStreamResponse):
            if request.phase is Phase.RECOVERING:
                self._recovery.found(request, now, call.store_id, reply)
            else:
                self._reports.read_first(request, now, reply)
        elif reply is None:
            self._store_failed(request, now, call, code, message)
        return self.drain()

    def _opened(
        self, request: Request, now: float, call: CallStore, reply: store_pb2.OpenStreamResponse
    ) -> None:
        if request.phase is not Phase.OPENING or call.message.epoch != request.epoch:
            return
        request.slots[call.store_id] = reply.slot
        request.cached[call.store_id] = reply.cached_tokens
        if len(request.slots) == len(request.stores):
            self._moving.launch(request, now)

    def _store_failed(
        self, request: Request, now: float, call: CallStore, code: str, message: str
    ) -> None:
        """A store said no. What it lacks is computed again; what it has no room for waits."""
        request.tell(f"{call.method}: {code}: {message}")
        if call.method == "OpenStream":
            self._placing.open_failed(request, now, code, message)
        elif call.method == "Reassign":
            self._moving.reassign_failed(request, now, call, code)
        elif call.method == "ReadStream" and request.phase is Phase.RECOVERING:
            self._recovery.lost(request, now)

    def open_streams(self) -> dict[str, dict[str, int]]:
        """store -> request -> epoch: the streams whose leases are to be renewed there."""
        streams: dict[str, dict[str, int]] = {}
        for request in self.requests.values():
            if request.phase in (Phase.OPENING, Phase.RUNNING):
                for store in set(request.stores) & set(request.slots):
                    streams.setdefault(store, {})[request.request_id] = request.epoch
        return streams

    def streams_lost(self, now: float, store: str, lost: dict[str, int]) -> list[Instruction]:
        """A store does not have these streams, which were open there under these epochs."""
        for request_id, epoch in lost.items():
            request = self.requests.get(request_id)
            if request is None or request.phase is not Phase.RUNNING or request.epoch != epoch:
                continue
            if store in request.stores:
                request.tell("its lease ran out")
                self._placing.compute_again(request, now, fresh=False)
        return self.drain()

    # --- reports of the workers ---

    def prefill_done(
        self, now: float, worker_id: str, done: control_pb2.PrefillDone
    ) -> list[Instruction]:
        self._reports.prefill_done(now, worker_id, done)
        return self.drain()

    def step_reported(
        self, now: float, worker_id: str, step: control_pb2.StepReport
    ) -> list[Instruction]:
        for stream in step.streams:
            self._reports.step_reported(now, worker_id, stream)
        return self.drain()

    def decode_started(self, worker_id: str, started: control_pb2.DecodeStarted) -> None:
        self._reports.decode_started(started)

    def stopped(
        self, now: float, worker_id: str, stopped: control_pb2.Stopped
    ) -> list[Instruction]:
        self._reports.stopped(now, worker_id, stopped)
        return self.drain()

    def refused(
        self, now: float, worker_id: str, refused: control_pb2.Refused
    ) -> list[Instruction]:
        self._reports.refused(now, worker_id, refused)
        return self.drain()

    # --- after a restart of this process ---

    def recover(
        self, now: float, unix_ms: int, records: Iterable[journal_pb2.JournalRecord]
    ) -> None:
        """Takes up the journal of the scheduler before this one; writes nothing."""
        self._recovery.replay(now, unix_ms, records)
        self.drain()

    def journal(self) -> list[journal_pb2.JournalRecord]:
        """The shortest journal that says what is known now."""
        return journal(self.requests.values(), self.epoch)

    # --- looking at it ---

    def cluster_view(self, stores: Sequence[cluster_pb2.StorePages]) -> cluster_pb2.ClusterView:
        counts = cluster_pb2.RequestCounts()
        counts.CopyFrom(self.counts)
        counts.waiting = self.count(Phase.WAITING, Phase.RECOVERING)
        counts.running = self.count(Phase.OPENING, Phase.RUNNING)
        counts.known = len(self.requests)
        counts.stops_unanswered = len(self._stops)
        workers = self.workers_view()
        return cluster_pb2.ClusterView(workers=workers, stores=stores, requests=counts)

    def check_invariants(self) -> None:
        for request in self.requests.values():
            assert request.done == (request.final is not None), request.request_id
            assert request.readers >= 0
            if request.phase in (Phase.OPENING, Phase.RUNNING):
                assert request.epoch, request.request_id
                assert request.decode_store, request.request_id
