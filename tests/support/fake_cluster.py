"""A cluster made of a real `SchedulerState` and stores and workers that are a few lines each.

Nothing happens by itself: commands, reports, calls and answers lie in queues until somebody delivers
them, workers act when they are told to, and time stands until it is moved. So a test can say in which
order things happen, and a random walk can try any order.

The fakes keep to the contracts: a worker drops its reports while it has no scheduler, a store fences
by epoch and waits for writers that have not stopped, what a worker commits lies in the store's record.
They check them too: an epoch that is used has been journaled, no epoch has two decodes, pages are
given back only behind the writers.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from baton.v1 import cluster_pb2, control_pb2, inference_pb2, journal_pb2, store_pb2
from policies.placement import LeastLoaded
from services.ops.errors import BatonError, Overloaded, RequestConflict, StaleEpoch, UnknownRequest
from services.scheduler.config import SchedulerConfig
from services.scheduler.request import CallStore, Instruction, Notify, Send, Write
from services.scheduler.state import SchedulerState
from services.scheduler.text import TextStream
from services.wire.messages import finish_reason

Event = control_pb2.WorkerEvent
PREFILL, DECODE = "prefill", "decode"
FINISH_STOP = inference_pb2.FINISH_REASON_STOP
FINISH_LENGTH = inference_pb2.FINISH_REASON_LENGTH
UNIX_MS = 1_800_000_000_000


def token_of(request_id: str, index: int) -> int:
    """What every worker computes for this request at this index."""
    return 100 + (sum(request_id.encode()) * 31 + index * 7) % 800


def word(token: int) -> str:
    return f"<{token}>"


# --- a store ---


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
            if not free:
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
        if record is None:
            return store_pb2.ReleaseResponse(found=False)
        present = {(record.prefill_writer, record.attempt), (record.decode_writer, record.epoch)}
        live = {pair for pair in present if pair[0] in request.live_writers} | record.fenced
        for worker in self.cluster.workers.values():
            if worker.writes(record):
                said = any(worker.id == writer for writer, _ in live)
                assert said, f"{worker.name} is at work on {record.request_id}: not said"
        del self.streams[record.request_id]
        for writer, epoch in live:
            self._wait_for(record.request_id, writer, epoch)
        return store_pb2.ReleaseResponse(found=True)

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


# --- workers ---


@dataclass
class Job:
    """What a worker has been told about one request."""

    request_id: str
    slot: int
    epoch: int  # for prefill: the attempt
    command: Any
    attached: bool = False
    sampled: bool = False
    again: bool = False  # all had been computed before: it only hands it over once more
    stopped: bool = False
    stop_epoch: int = 0

    @property
    def idle(self) -> bool:
        """Nothing has been written yet: it looks at the epoch before it begins."""
        return not self.attached and not self.sampled


@dataclass
class FakeWorker:
    """One process; `acts` does its next piece of work."""

    name: str
    id: str
    role: str
    store: FakeStore
    cluster: FakeCluster
    alive: bool = True
    paused: bool = False
    attached: bool = False
    jobs: list[Job] = field(default_factory=list)
    commands: deque[control_pb2.WorkerCommand] = field(default_factory=deque)
    reports: deque[Event] = field(default_factory=deque)

    @property
    def address(self) -> str:
        return f"tcp://{self.name}"

    @property
    def runs(self) -> bool:
        return self.alive and not self.paused

    def register(self) -> control_pb2.Register:
        role = cluster_pb2.ROLE_PREFILL if self.role == PREFILL else cluster_pb2.ROLE_DECODE
        worker = cluster_pb2.Worker(
            worker_id=self.id, name=self.name, role=role, address=self.address,
            store_id=self.store.store_id,
        )  # fmt: skip
        running = [
            control_pb2.RunningStream(request_id=job.request_id, epoch=job.epoch)
            for job in self.jobs
        ]
        return control_pb2.Register(worker=worker, running=running)

    def writes(self, record: Record) -> bool:
        """Whether it may still write this stream's pages."""
        owner = record.attempt if self.role == PREFILL else record.epoch
        jobs = [job for job in self.jobs if self._record(job) is record and job.epoch == owner]
        return self.alive and any(not self._only_reports(job, record) for job in jobs)

    def haunts(self, request_id: str, epoch: int) -> bool:
        """Whether it is at work on this request under this epoch, which has been fenced."""
        jobs = [job for job in self.jobs if (job.request_id, job.epoch) == (request_id, epoch)]
        return self.alive and any(not job.idle for job in jobs)

    def _record(self, job: Job) -> Record | None:
        record = self.store.at(job.slot)
        return record if record and record.request_id == job.request_id else None

    def _only_reports(self, job: Job, record: Record) -> bool:
        """A worker that is asked again about what has been done."""
        if self.role == PREFILL or not record.tokens:
            return bool(record.tokens) and (job.again or not job.sampled)
        last = record.request.first_index + len(record.tokens) - 1
        return bool(finish_reason(record.tokens[-1], last, job.command.sampling))

    def report(self, **event: Any) -> None:
        """Without a scheduler it is dropped: the records hold the truth."""
        if self.attached:
            self.reports.append(Event(**event))

    def take(self, command: control_pb2.WorkerCommand) -> None:
        kind = command.WhichOneof("command")
        if kind == "stop":
            self._stop(command.stop)
        elif kind == "prefill":
            self._prefill(command.prefill)
        elif kind == "decode":
            self._decode(command.decode)

    def _stop(self, stop: control_pb2.StopRequest) -> None:
        mine = [
            job
            for job in self.jobs
            if job.request_id == stop.request_id and job.epoch <= stop.epoch
        ]
        if self.role == PREFILL and mine:
            for job in mine:
                job.stopped = True
                job.stop_epoch = max(job.stop_epoch, stop.epoch)
            return
        self.jobs = [job for job in self.jobs if job not in mine]
        self.report(stopped=control_pb2.Stopped(request_id=stop.request_id, epoch=stop.epoch))

    def _prefill(self, command: control_pb2.ExecutePrefill) -> None:
        known = [job.epoch for job in self.jobs if job.request_id == command.request_id]
        if known and max(known) >= command.attempt:
            return
        self.jobs.append(Job(command.request_id, command.slot, command.attempt, command))

    def _decode(self, command: control_pb2.PrepareDecode) -> None:
        known = next((j for j in self.jobs if j.request_id == command.request_id), None)
        if known and known.epoch == command.epoch:
            known.command = command
            if known.attached:
                record = self.store.at(known.slot)
                if record and record.epoch == known.epoch:
                    self._tell(known, record, command.report_from)
            return
        if known:
            self.jobs.remove(known)
        record = self.store.at(command.slot)
        if record is None or record.epoch != command.epoch:
            self._refuse(command.request_id, command.epoch, "FAILED_PRECONDITION")
            return
        self.jobs.append(Job(command.request_id, command.slot, command.epoch, command))

    def _refuse(self, request_id: str, epoch: int, code: str) -> None:
        self.report(
            refused=control_pb2.Refused(
                request_id=request_id, epoch=epoch, code=code, message="refused",
                bad_blocks=[0] if code == "DATA_LOSS" else [],
            )
        )  # fmt: skip

    def act(self) -> None:
        """The next piece of work: prefill takes its first job, decode one step of each."""
        if self.role == PREFILL:
            self._compute(self.jobs[0])
            return
        for job in list(self.jobs):
            self._step(job)

    # prefill

    def _compute(self, job: Job) -> None:
        """Compute and sample; at the next call the transfer is over and the job done."""
        record = self.store.at(job.slot)
        owned = record is not None and record.attempt == job.epoch
        if not job.stopped and not job.sampled and owned:
            assert record is not None
            self._sample(job, record)
            return
        if not job.stopped and not job.sampled:
            self._refuse(job.request_id, job.epoch, "FAILED_PRECONDITION")
        elif not job.stopped and job.command.ingest_address and not self._arrived(job):
            self._refuse(job.request_id, job.epoch, "UNAVAILABLE")
        self.jobs.remove(job)
        epoch = max(job.epoch, job.stop_epoch)
        self.report(stopped=control_pb2.Stopped(request_id=job.request_id, epoch=epoch))

    def _sample(self, job: Job, record: Record) -> None:
        job.sampled, job.again = True, bool(record.tokens)
        first = record.request.first_index
        if not job.again:
            record.tokens.append(token_of(job.request_id, first))
        if job.command.ingest_address and self._arrived(job):
            remote = self._remote(job)
            assert remote is not None
            remote.tokens = remote.tokens or list(record.tokens[:1])
        self.report(
            prefill_done=control_pb2.PrefillDone(
                request_id=job.request_id, attempt=job.epoch,
                first=control_pb2.Token(index=first, token_id=record.tokens[0], logprob=-1.0),
                computed_tokens=0 if job.again else len(record.request.token_ids),
                finish=finish_reason(record.tokens[0], first, job.command.sampling),
                already_done=job.again,
            )
        )  # fmt: skip

    def _remote(self, job: Job) -> Record | None:
        store = next(
            s for s in self.cluster.stores.values() if s.address == job.command.ingest_address
        )
        return store.at(job.command.remote_slot)

    def _arrived(self, job: Job) -> bool:
        remote = self._remote(job)
        return remote is not None and remote.attempt == job.command.remote_attempt

    # decode

    def _step(self, job: Job) -> None:
        record = self.store.at(job.slot)
        if record is None or record.epoch != job.epoch:
            self.jobs.remove(job)
            self._refuse(job.request_id, job.epoch, "FAILED_PRECONDITION")
        elif job.request_id in self.cluster.corrupt:
            self.cluster.corrupt.discard(job.request_id)
            self.jobs.remove(job)
            self._refuse(job.request_id, job.epoch, "DATA_LOSS")
        elif not job.attached and record.tokens:
            job.attached = True
            self.report(
                decode_started=control_pb2.DecodeStarted(request_id=job.request_id, epoch=job.epoch)
            )
            self._tell(job, record, job.command.report_from)
        elif job.attached:
            index = record.request.first_index + len(record.tokens)
            record.tokens.append(token_of(job.request_id, index))
            self._tell(job, record, index)

    def _tell(self, job: Job, record: Record, report_from: int) -> None:
        first = record.request.first_index
        last = first + len(record.tokens) - 1
        finish = finish_reason(record.tokens[-1], last, job.command.sampling)
        tokens = [
            control_pb2.Token(index=i, token_id=record.tokens[i - first], logprob=-1.0)
            for i in range(max(report_from, first), last + 1)
        ]
        stream = control_pb2.StreamTokens(
            request_id=job.request_id, epoch=job.epoch, tokens=tokens, finish=finish
        )
        self.report(step=control_pb2.StepReport(streams=[stream]))
        if finish:
            self.jobs.remove(job)


# --- the cluster ---


@dataclass
class FakeCluster:
    """One scheduler, its journal, and everybody else."""

    prefills: int = 1
    decodes: int = 2
    store_count: int = 1  # workers are dealt to the stores in turn
    slots: int = 8
    options: dict[str, Any] = field(default_factory=dict)
    now: float = 0.0
    stores: dict[str, FakeStore] = field(default_factory=dict)
    workers: dict[str, FakeWorker] = field(default_factory=dict)  # by name, the latest of it
    gone: set[str] = field(default_factory=set)
    journal: list[journal_pb2.JournalRecord] = field(default_factory=list)
    calls: dict[str, deque[CallStore]] = field(default_factory=dict)
    answers: dict[str, tuple[CallStore, Any, str, str]] = field(default_factory=dict)
    corrupt: set[str] = field(default_factory=set)
    sent: list[Instruction] = field(default_factory=list)  # all that this scheduler has said
    said: dict[str, list[inference_pb2.GenerateEvent]] = field(default_factory=dict)
    finals: dict[str, inference_pb2.GenerateEvent] = field(default_factory=dict)
    placed: set[tuple[str, int]] = field(default_factory=set)  # epochs that have been journaled
    epochs: dict[tuple[str, int], str] = field(default_factory=dict)  # of a decode -> who got it
    scheduler: SchedulerState = field(init=False)
    processes: int = 0

    def __post_init__(self) -> None:
        for n in range(self.store_count):
            self.stores[f"s{n}"] = FakeStore(f"s{n}", self.slots, self)
        self.scheduler = self._new_scheduler()
        for role, count in ((PREFILL, self.prefills), (DECODE, self.decodes)):
            for n in range(count):
                self.start(f"{role}-{n}")

    def _new_scheduler(self) -> SchedulerState:
        config = SchedulerConfig(**self.options)
        state = SchedulerState(
            config, LeastLoaded(), 1000, lambda body: TextStream(word, list(body.sampling.stop))
        )
        state.ingest = {store.store_id: store.address for store in self.stores.values()}
        return state

    # --- who is there ---

    def exists(self, worker_id: str) -> bool:
        return bool(worker_id) and worker_id not in self.gone

    def start(self, name: str) -> FakeWorker:
        """A new process of this name, attached."""
        self.processes += 1
        role, number = name.split("-")
        store = self.stores[f"s{int(number) % len(self.stores)}"]
        worker = FakeWorker(name, f"{name}/{self.processes}", role, store, self)
        self.workers[name] = worker
        self.attach(worker)
        return worker

    def by_id(self, worker_id: str) -> FakeWorker | None:
        return next((w for w in self.workers.values() if w.id == worker_id), None)

    def attach(self, worker: FakeWorker) -> None:
        worker.attached = True
        worker.commands.clear()
        self.run(self.scheduler.worker_registered(self.now, worker.register()))

    def detach(self, worker: FakeWorker, *, noticed: bool = True) -> None:
        """The link breaks; with `noticed` the scheduler sees that before the worker is back."""
        worker.attached = False
        worker.commands.clear()
        worker.reports.clear()
        if noticed and worker.id in self.scheduler.workers:
            self.run(self.scheduler.worker_lost(self.now, worker.id))

    def kill(self, name: str) -> None:
        worker = self.workers[name]
        worker.alive = False
        worker.jobs.clear()
        self.gone.add(worker.id)
        for store in self.stores.values():
            store.quarantine = {held for held in store.quarantine if held[1] != worker.id}
        self.detach(worker)

    # --- requests ---

    def ask(
        self, request_id: str, *, prompt: int = 3, max_tokens: int = 4, stop_at: int | None = None,
        stop_token_at: int | None = None, deadline_s: float | None = None, reader: bool = True,
        **body: Any,
    ) -> None:  # fmt: skip
        """`stop_at`: the index whose text is a stop string; `stop_token_at`: whose token is one."""
        stops = [word(token_of(request_id, stop_at))] if stop_at is not None else []
        params = inference_pb2.SamplingParams(max_tokens=max_tokens, stop=stops)
        ids = inference_pb2.TokenIds(ids=range(prompt))
        message = inference_pb2.GenerateRequest(
            request_id=request_id, token_ids=ids, sampling=params, **body
        )
        stop_ids = [token_of(request_id, stop_token_at)] if stop_token_at is not None else []
        sampling = control_pb2.ResolvedSampling(
            max_tokens=max_tokens, top_p=1.0, seed=7, stop_token_ids=stop_ids
        )
        self.run(
            self.scheduler.accept(
                self.now, self.unix_ms, message, list(range(prompt)), sampling, deadline_s
            )
        )
        if reader:
            self.scheduler.reader_joined(request_id)

    @property
    def unix_ms(self) -> int:
        return UNIX_MS + int(self.now * 1000)

    def tokens(self, request_id: str) -> list[int]:
        return [t for t, _ in self.scheduler.requests[request_id].tokens]

    def expected(self, request_id: str, count: int) -> list[int]:
        return [token_of(request_id, index) for index in range(count)]

    def final(self, request_id: str) -> inference_pb2.GenerateEvent | None:
        return self.scheduler.requests[request_id].final

    def commands(self, kind: str) -> list[tuple[str, Any]]:
        """(worker name, message) of every command of this kind that the scheduler has sent."""
        sends = [i for i in self.sent if isinstance(i, Send) and i.command.HasField(kind)]
        return [(s.worker_id.split("/")[0], getattr(s.command, kind)) for s in sends]

    def asked_of_stores(self, method: str) -> list[Any]:
        """Every message that the scheduler has sent to a store with this method."""
        return [i.message for i in self.sent if isinstance(i, CallStore) and i.method == method]

    def until(self, there: Callable[[], object], limit: int = 1000) -> None:
        """Lets things happen, in turn, until `there` is true."""
        for turn in range(limit):
            if there():
                return
            acts = self._productive()
            assert acts, "nothing is left to do"
            acts[turn % len(acts)]()
        raise AssertionError("it never came")

    # --- what the runtime does ---

    def run(self, instructions: Iterable[Instruction]) -> None:
        """First everything is journaled, then the rest happens, as in `runtime.run`."""
        todo = list(instructions)
        records = [i.record for i in todo if isinstance(i, Write)]
        self.journal.extend(records)
        for placed in (record.placed for record in records):
            self.placed |= {(placed.request_id, placed.epoch), (placed.request_id, placed.attempt)}
        self.sent.extend(todo)
        for instruction in todo:
            if isinstance(instruction, Send):
                self._send(instruction)
            elif isinstance(instruction, CallStore):
                self._check_epochs(instruction)
                self.calls.setdefault(instruction.request_id, deque()).append(instruction)
            elif isinstance(instruction, Notify):
                assert instruction.request_id in self.scheduler.requests
        self.check()

    def _send(self, send: Send) -> None:
        kind = send.command.WhichOneof("command")
        message = getattr(send.command, kind)
        if kind == "decode":
            self._journaled(message.request_id, message.epoch)
            first = self.epochs.setdefault((message.request_id, message.epoch), send.worker_id)
            assert first == send.worker_id, f"{message.request_id}: two decodes in one epoch"
        elif kind == "prefill":
            self._journaled(message.request_id, message.attempt)
        worker = self.by_id(send.worker_id)
        if worker and worker.attached:
            worker.commands.append(send.command)

    def _check_epochs(self, call: CallStore) -> None:
        if call.method in ("OpenStream", "Reassign"):
            self._journaled(call.request_id, call.message.epoch)
        if call.method == "OpenStream":
            self._journaled(call.request_id, call.message.attempt)

    def _journaled(self, request_id: str, epoch: int) -> None:
        assert (request_id, epoch) in self.placed, f"{request_id}: epoch {epoch} is not journaled"

    # --- deliveries: what can happen next ---

    def deliver_command(self, worker: FakeWorker) -> None:
        worker.take(worker.commands.popleft())

    def deliver_report(self, worker: FakeWorker) -> None:
        """As in `runtime.heard`."""
        event = worker.reports.popleft()
        state, kind = self.scheduler, event.WhichOneof("event")
        self.run(state.worker_heard(self.now, worker.id))
        if kind == "step":
            self.run(state.step_reported(self.now, worker.id, event.step))
        elif kind == "prefill_done":
            self.run(state.prefill_done(self.now, worker.id, event.prefill_done))
        elif kind == "decode_started":
            state.decode_started(worker.id, event.decode_started)
        elif kind == "stopped":
            self.run(state.stopped(self.now, worker.id, event.stopped))
        elif kind == "refused":
            self.run(state.refused(self.now, worker.id, event.refused))
        self.check()

    def execute(self, request_id: str) -> None:
        """The store carries out the request's next call; its answer is on its way."""
        call = self.calls[request_id].popleft()
        try:
            reply = getattr(self.stores[call.store_id], call.method)(call.message)
            self.answers[request_id] = (call, reply, "OK", "")
        except BatonError as error:
            self.answers[request_id] = (call, None, error.code, error.message)

    def answer(self, request_id: str) -> None:
        call, reply, code, message = self.answers.pop(request_id)
        self.run(self.scheduler.store_replied(self.now, call, reply, code, message))

    def possible(self) -> list[Callable[[], None]]:
        """Everything that could happen next without a fault; each queue for itself keeps its order."""
        acts: list[Callable[[], None]] = []
        for worker in self.workers.values():
            if worker.runs and worker.commands:
                acts.append(partial(self.deliver_command, worker))
            if worker.attached and not worker.paused and worker.reports:
                acts.append(partial(self.deliver_report, worker))
            if worker.runs and worker.jobs:
                acts.append(worker.act)
        acts += [partial(self.answer, request_id) for request_id in self.answers]
        acts += [
            partial(self.execute, request_id)
            for request_id, queue in self.calls.items()
            if queue and request_id not in self.answers
        ]
        return acts

    def settle(self, limit: int = 10_000) -> None:
        """Lets everything happen, in turn, until nothing is left to do; time stands."""
        for turn in range(limit):
            acts = self._productive()
            if not acts:
                return
            acts[turn % len(acts)]()
        raise AssertionError("it never settles")

    def _productive(self) -> list[Callable[[], None]]:
        idle = {
            worker.act
            for worker in self.workers.values()
            if worker.role == DECODE and not any(self._can_step(worker, job) for job in worker.jobs)
        }
        return [act for act in self.possible() if act not in idle]

    def _can_step(self, worker: FakeWorker, job: Job) -> bool:
        record = worker.store.at(job.slot)
        return record is None or record.epoch != job.epoch or bool(record.tokens)

    # --- time and faults ---

    def beat(self) -> None:
        """A heartbeat of everybody who can."""
        for worker in list(self.workers.values()):
            if worker.runs and worker.attached:
                self.run(self.scheduler.worker_heard(self.now, worker.id))

    def pass_time(self, seconds: float, step: float = 0.1) -> None:
        """Heartbeats and ticks; nothing is delivered meanwhile."""
        end = self.now + seconds
        while self.now < end - 1e-9:
            self.now = min(end, self.now + step)
            self.beat()
            self.run(self.scheduler.tick(self.now))

    def restart_scheduler(self, *, compact: bool = False) -> None:
        """It dies; its successor reads the journal. All links and calls break."""
        if compact:
            self.journal = self.scheduler.journal()
        for worker in self.workers.values():
            worker.attached = False
            worker.commands.clear()
            worker.reports.clear()
        self.calls.clear()
        self.answers.clear()
        self.sent.clear()
        self.scheduler = self._new_scheduler()
        self.scheduler.recover(self.now, self.unix_ms, list(self.journal))
        self.check()

    def reattach(self) -> None:
        for worker in self.workers.values():
            if worker.runs and not worker.attached:
                self.attach(worker)

    # --- what must hold ---

    def check(self) -> None:
        """After each event: what clients have been told is right, complete and has no gap, stays what
        it was whoever is asked again, and every request that has ended has ended once."""
        self.scheduler.check_invariants()
        for request_id, request in self.scheduler.requests.items():
            told = self.said.setdefault(request_id, [])
            for index, event in enumerate(request.events):
                if index < len(told):
                    assert event == told[index], f"{request_id}: event {index} has changed"
                    continue
                assert request_id not in self.finals, f"{request_id}: a token after the end"
                assert event.token.index == index, f"{request_id}: {event.token.index} at {index}"
                assert event.token.token_id == token_of(request_id, index)
                told.append(event)
            if request.final is not None:
                first = self.finals.setdefault(request_id, request.final)
                assert request.final == first, f"{request_id}: has ended in two ways"
                whole = request.final.finished.reason in (FINISH_STOP, FINISH_LENGTH)
                lost = len(told) - len(request.events)
                assert not (whole and lost), f"{request_id}: the end has lost {lost} tokens"
        ended = [r.ended.request_id for r in self.journal if r.HasField("ended")]
        assert len(ended) == len(set(ended)), "a request has ended twice"

    def unfinished(self) -> list[str]:
        return [r for r, request in self.scheduler.requests.items() if not request.done]

    def check_ended(self) -> None:
        """Every request has ended."""
        for request_id, request in self.scheduler.requests.items():
            assert request.final is not None, f"{request_id} hangs: {request.phase} {request.story}"

    def check_quiet(self) -> None:
        """Nothing is left to do: every request has ended, no stream is open, nobody is waited for."""
        self.check_ended()
        for store in self.stores.values():
            assert not store.streams, f"{store.store_id}: {sorted(store.streams)} still open"
            assert not store.quarantine, f"{store.store_id}: still waits for {store.quarantine}"
        for worker in self.workers.values():
            assert not worker.jobs, f"{worker.name} is still at work"


# --- any order of events ---

Choose = Callable[[Sequence[Any]], Any]


@dataclass
class ClusterWalk:
    """A cluster in which anything can happen next; `choose` takes every decision."""

    cluster: FakeCluster
    choose: Choose
    story: list[str] = field(default_factory=list)
    asked: int = 0
    restarts: bool = True  # of the scheduler

    def step(self) -> None:
        """Mostly something that was on its way, sometimes a fault."""
        acts = self.cluster.possible()
        if acts and self.choose(range(6)):
            self.choose(acts)()
        else:
            fault = self.choose(self._faults())
            self.story.append(fault.__name__)
            fault()

    def _faults(self) -> list[Callable[[], None]]:
        faults = [self.time, self.time, self.kill, self.pause, self.resume, self.cut, self.mend]
        restarts = [self.restart] if self.restarts else []
        return [*faults, self.ask, self.ask, self.cancel, self.leave, self.corrupt, *restarts]

    def _note(self, what: object) -> None:
        self.story[-1] += f" {what}"

    def _worker(self, fits: Callable[[FakeWorker], bool]) -> FakeWorker | None:
        able = [worker for worker in self.cluster.workers.values() if fits(worker)]
        worker: FakeWorker | None = self.choose(able) if able else None
        self._note(worker.name if worker else "nobody")
        return worker

    def _request(self) -> str | None:
        open_now = [r for r, request in self.cluster.scheduler.requests.items() if not request.done]
        name: str | None = self.choose(open_now) if open_now else None
        self._note(name)
        return name

    def ask(self) -> None:
        if self.asked == 5:
            return
        self.asked += 1
        ends = self.choose([{}, {}, {"stop_at": self.choose(range(4))}, {"stop_token_at": 2}])
        tokens = self.choose([1, 2, 3, 6])
        self._note(f"r{self.asked} {tokens} {ends}")
        self.cluster.ask(
            f"r{self.asked}", max_tokens=tokens, reader=self.choose([True, True, False]),
            deadline_s=self.choose([None, None, 0.5]), **ends,
        )  # fmt: skip

    def time(self) -> None:
        seconds = self.choose([0.05, 0.3, 1.0])
        self._note(seconds)
        self.cluster.pass_time(seconds)

    def kill(self) -> None:
        worker = self._worker(lambda w: w.alive)
        if worker:
            self.cluster.kill(worker.name)
            self.cluster.start(worker.name)

    def pause(self) -> None:
        worker = self._worker(lambda w: w.runs)
        if worker:
            worker.paused = True

    def resume(self) -> None:
        worker = self._worker(lambda w: w.paused)
        if worker:
            worker.paused = False

    def cut(self) -> None:
        worker = self._worker(lambda w: w.attached)
        if worker:
            self.cluster.detach(worker, noticed=self.choose([True, False]))

    def mend(self) -> None:
        worker = self._worker(lambda w: w.runs and not w.attached)
        if worker:
            self.cluster.attach(worker)

    def cancel(self) -> None:
        request_id = self._request()
        if request_id:
            state = self.cluster.scheduler
            self.cluster.run(state.cancel(self.cluster.now, request_id, "cancelled"))

    def leave(self) -> None:
        request_id = self._request()
        if request_id and self.cluster.scheduler.requests[request_id].readers:
            self.cluster.run(self.cluster.scheduler.reader_left(self.cluster.now, request_id))

    def corrupt(self) -> None:
        request_id = self._request()
        if request_id:
            self.cluster.corrupt.add(request_id)

    def restart(self) -> None:
        """Some of the workers are back at once, some of the readers come back."""
        self.cluster.restart_scheduler(compact=self.choose([True, False]))
        for request_id, request in self.cluster.scheduler.requests.items():
            if not request.done and self.choose([True, True, False]):
                self.cluster.scheduler.reader_joined(request_id)
        for worker in list(self.cluster.workers.values()):
            if worker.runs and self.choose([True, False]):
                self.cluster.attach(worker)

    def end(self) -> None:
        """No more faults: everybody is back and everything comes to its end. After restarts of the
        scheduler in the midst of cut links, pages may wait until the worker they wait for dies."""
        cluster = self.cluster
        cluster.corrupt.clear()
        for worker in cluster.workers.values():
            worker.paused = False
        cluster.reattach()
        rounds = 0
        while rounds < 5 or (rounds < 50 and cluster.unfinished()):
            cluster.settle()
            cluster.pass_time(0.2)
            rounds += 1
        cluster.settle()
        cluster.check_ended()
        if not self.restarts:
            cluster.check_quiet()
