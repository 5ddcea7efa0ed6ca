"""What the scheduler knows, and what it is about to say. Every room of the state machine reads these
books and adds to them; none of them decides anything here. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from baton.v1 import cluster_pb2, control_pb2, inference_pb2, journal_pb2
from policies.placement import LeastLoaded
from policies.view import ClusterView, WorkerView
from services.ops.errors import UnknownRequest
from services.scheduler import orders
from services.scheduler.config import SchedulerConfig
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

NAMES_MAX = 10_000  # of workers, the latest to register


class Books:
    """Requests, workers and stores; the epochs given out; the instructions not yet given."""

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
        self.forgotten = 0  # requests whose rows are still in the journal; the runtime sets it back
        self.recovering = False  # the streams of the scheduler before are still to be looked for
        self._out: list[Instruction] = []

    # --- requests and workers ---

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

    def count(self, *phases: Phase) -> int:
        return sum(request.phase in phases for request in self.requests.values())

    def name(self, worker_id: str) -> str:
        """A worker's name, for people."""
        return self.names.get(worker_id, worker_id[:8])

    def remember_name(self, info: WorkerInfo) -> None:
        self.names.pop(info.worker_id, None)
        self.names[info.worker_id] = str(info.worker.name)
        while len(self.names) > NAMES_MAX:
            del self.names[next(iter(self.names))]

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

    # --- epochs ---

    @property
    def epoch(self) -> int:
        """The last epoch or attempt that has been given out."""
        return self._epoch

    def next_epoch(self) -> int:
        self._epoch += 1
        return self._epoch

    def saw_epoch(self, *epochs: int) -> None:
        """Epochs that are in use already; later ones are greater."""
        self._epoch = max(self._epoch, *epochs)

    # --- what follows ---

    def write(self, record: journal_pb2.JournalRecord) -> None:
        self._out.append(Write(record))

    def send(self, worker_id: str, command: control_pb2.WorkerCommand) -> None:
        self._out.append(Send(worker_id, command))

    def call(self, request_id: str, store: str, method: str, message: object) -> None:
        self._out.append(CallStore(request_id, store, method, message))

    def call_each(self, calls: Iterable[CallStore]) -> None:
        self._out.extend(calls)

    def notify(self, request: Request) -> None:
        self._out.append(Notify(request.request_id))

    def drain(self) -> list[Instruction]:
        """What has been said since last asked."""
        out, self._out = self._out, []
        return out

    # --- looking at it ---

    def interrupted(self, request: Request, now: float, why: str) -> None:
        """Its tokens stop coming for a while, from now on."""
        request.tell(why)
        if request.prefill_done and request.interrupted_at is None:
            request.interrupted_at = now

    def workers_view(self) -> list[cluster_pb2.Worker]:
        return [
            orders.worker_view(info, self.requests.values())
            for info in sorted(self.workers.values(), key=lambda w: str(w.worker.name))
        ]
