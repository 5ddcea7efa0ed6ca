"""A prefill or a decode in a few lines: it acts when it is told to. See `fake_cluster`."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from baton.v1 import cluster_pb2, control_pb2
from services.wire.messages import finish_reason
from tests.support.fake_store import FakeStore, Record

if TYPE_CHECKING:
    from tests.support.fake_cluster import FakeCluster

Event = control_pb2.WorkerEvent
PREFILL, DECODE = "prefill", "decode"


def token_of(request_id: str, index: int) -> int:
    """What every worker computes for this request at this index."""
    return 100 + (sum(request_id.encode()) * 31 + index * 7) % 800


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
                irreparable=code == "DATA_LOSS" and self.cluster.irreparable,
                resume_at=2 if code == "DATA_LOSS" and self.role == PREFILL else None,
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
        if not job.stopped and owned and job.request_id in self.cluster.corrupt_prompts:
            self.cluster.corrupt_prompts.discard(job.request_id)
            self._refuse(job.request_id, job.epoch, "DATA_LOSS")
        elif not job.stopped and not job.sampled and owned:
            assert record is not None
            self._sample(job, record)
            return
        elif not job.stopped and not job.sampled:
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
