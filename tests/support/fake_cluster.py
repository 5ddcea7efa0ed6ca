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
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from baton.v1 import control_pb2, inference_pb2, journal_pb2
from policies.placement import LeastLoaded
from services.ops.errors import BatonError
from services.scheduler.config import SchedulerConfig
from services.scheduler.request import CallStore, Instruction, Notify, Send, Write
from services.scheduler.state import SchedulerState
from services.scheduler.text import TextStream
from tests.support.fake_store import FakeStore
from tests.support.fake_worker import DECODE, PREFILL, FakeWorker, Job, token_of

FINISH_STOP = inference_pb2.FINISH_REASON_STOP
FINISH_LENGTH = inference_pb2.FINISH_REASON_LENGTH
UNIX_MS = 1_800_000_000_000


def word(token: int) -> str:
    """The text of a token."""
    return f"<{token}>"


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
    corrupt: set[str] = field(default_factory=set)  # requests whose next decode step finds damage
    corrupt_prompts: set[str] = field(default_factory=set)  # the same for prefill
    irreparable: bool = False  # whether its proof fails
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
