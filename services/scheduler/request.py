"""What the scheduler knows of one request and of one worker, and what it can tell its runtime to do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any

from baton.v1 import cluster_pb2, control_pb2, inference_pb2, journal_pb2
from services.scheduler.text import TextStream

STORY_MAX = 32


class Phase(Enum):
    RECOVERING = auto()  # known from the journal; its pages and workers are being looked for
    WAITING = auto()  # no worker yet
    OPENING = auto()  # pages are being leased
    RUNNING = auto()  # prefill and decode know of it
    DONE = auto()


@dataclass
class Request:
    """One accepted request. Times are in seconds on the scheduler's clock."""

    body: inference_pb2.GenerateRequest
    prompt: list[int]
    sampling: control_pb2.ResolvedSampling
    text: TextStream
    accepted_unix_ms: int
    accepted_at: float
    deadline_unix_ms: int  # 0: none
    deadline_at: float | None
    orphan_s: float
    retain_s: float
    phase: Phase = Phase.WAITING
    # placement
    epoch: int = 0
    attempt: int = 0
    prefill_worker: str = ""
    decode_worker: str = ""
    prefill_store: str = ""
    decode_store: str = ""
    slots: dict[str, int] = field(default_factory=dict)  # store -> slot
    cached: dict[str, int] = field(default_factory=dict)  # store -> cached tokens
    base_index: int = 0  # token index that the present prefill samples
    prefill_done: bool = False
    prefill_stopped: bool = True
    decode_told: bool = False
    moving: dict[str, int] = field(default_factory=dict)  # role -> epoch that has been asked for
    fresh_kv: bool = False  # the next opening must not use the prefix cache
    # results
    tokens: list[tuple[int, float]] = field(default_factory=list)
    events: list[inference_pb2.GenerateEvent] = field(default_factory=list)
    final: inference_pb2.GenerateEvent | None = None
    # times and counts
    dispatched_at: float = 0.0
    first_token_at: float = 0.0
    last_token_at: float = 0.0
    interrupted_at: float | None = None
    stall_s: float = 0.0
    takeovers: int = 0
    computed: int = 0
    recomputed: int = 0
    cached_tokens: int = 0
    kv_bytes: int = 0
    ready: list[control_pb2.GroupTime] = field(default_factory=list)
    verified: list[control_pb2.GroupTime] = field(default_factory=list)
    last_layer_at: float = 0.0
    runnable_at: float = 0.0
    # readers
    readers: int = 0
    orphan_at: float | None = None
    forget_at: float | None = None
    held_until: float = 0.0
    story: list[str] = field(default_factory=list)

    @property
    def request_id(self) -> str:
        return str(self.body.request_id)

    @property
    def done(self) -> bool:
        return self.phase is Phase.DONE

    @property
    def needs_decode(self) -> bool:
        """Whether any token is left for a decode to compute."""
        return self.base_index + 1 < self.sampling.max_tokens

    @property
    def stores(self) -> list[str]:
        return [*dict.fromkeys([self.decode_store, self.prefill_store])]

    def tell(self, what: str) -> None:
        """Adds to the request's story, which a failure carries to the client."""
        self.story.append(what)
        del self.story[:-STORY_MAX]


@dataclass
class WorkerInfo:
    """One attached worker. `heard_at` is when it last said anything."""

    worker: cluster_pb2.Worker
    heard_at: float
    running: dict[str, int]  # request -> epoch or attempt, as last registered

    @property
    def worker_id(self) -> str:
        return str(self.worker.worker_id)

    @property
    def ready(self) -> bool:
        return bool(self.worker.state == cluster_pb2.WORKER_STATE_READY)

    @property
    def role(self) -> str:
        return "prefill" if self.worker.role == cluster_pb2.ROLE_PREFILL else "decode"


@dataclass(frozen=True)
class Write:
    """Journal this before anything that follows."""

    record: journal_pb2.JournalRecord


@dataclass(frozen=True)
class Send:
    """A command to a worker; if it is gone, nothing."""

    worker_id: str
    command: control_pb2.WorkerCommand


@dataclass(frozen=True)
class CallStore:
    """A call to a kv-store; the answer comes back as `store_replied`. Calls of one request are made
    in order."""

    request_id: str
    store_id: str
    method: str
    message: Any


@dataclass(frozen=True)
class Notify:
    """The request has new events for its readers."""

    request_id: str


Instruction = Write | Send | CallStore | Notify
TextFactory = Callable[[inference_pb2.GenerateRequest], TextStream]
