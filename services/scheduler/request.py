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


@dataclass(frozen=True)
class Damage:
    """KV that failed verification, until another epoch or attempt has been asked to compute it again.

    `found_by`: the role that refused, and that repairs. `blocks` are damaged in `store`; tokens from
    `resume_at` on may have been computed from them.
    """

    found_by: str
    store: str
    blocks: tuple[int, ...]
    resume_at: int | None = None


@dataclass(frozen=True)
class Move:
    """A Reassign whose answer is not here yet; `damage` is what it asks to have repaired."""

    epoch: int
    writer: str
    damage: Damage | None = None


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
    opened: int = 0  # the epoch under which its pages were first leased; moves have later ones
    prefill_worker: str = ""
    decode_worker: str = ""
    prefill_store: str = ""
    decode_store: str = ""
    slots: dict[str, int] = field(default_factory=dict)  # store -> slot
    cached: dict[str, int] = field(default_factory=dict)  # store -> cached tokens
    base_index: int = 0  # token index that the present prefill samples
    prefill_done: bool = False
    prefill_stopped: bool = True
    kv_arrived: bool = False  # decode's arena has the whole prompt, and its first token
    decode_told: bool = False
    moving: dict[str, Move] = field(default_factory=dict)  # role -> what has been asked for
    moved: dict[str, bool] = field(default_factory=dict)  # store -> former prefill gone; so far
    left: set[str] = field(default_factory=set)  # roles whose worker has refused to go on
    fresh_kv: bool = False  # the next opening must not use the prefix cache
    damage: Damage | None = None
    repairs: int = 0  # refusals of damaged KV so far
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
    def handing_over(self) -> bool:
        """Whether prefill is done and its pages may still be on their way to another arena. They have
        come when decode has added a token to the first one."""
        remote = self.prefill_store != self.decode_store and not self.prefill_stopped
        added = len(self.tokens) > self.base_index + 1
        return self.prefill_done and remote and not self.kv_arrived and not added

    @property
    def stores(self) -> list[str]:
        return [*dict.fromkeys([self.decode_store, self.prefill_store])]

    def awaits(self, role: str, epoch: int) -> bool:
        """Whether the move of this role to this epoch is the one under way."""
        return role in self.moving and self.moving[role].epoch == epoch

    def epoch_of(self, worker_id: str) -> int:
        """The epoch or attempt that this worker has or is about to get; 0: none."""
        epochs = [move.epoch for move in self.moving.values() if move.writer == worker_id]
        if self.phase in (Phase.OPENING, Phase.RUNNING):
            epochs += [self.epoch] * (worker_id == self.decode_worker)
            gone = self.prefill_done and self.prefill_stopped
            epochs += [self.attempt] * (worker_id == self.prefill_worker and not gone)
        return max(epochs, default=0)

    def tell(self, what: str) -> None:
        """Adds to the request's story, which a failure carries to the client."""
        self.story.append(what)
        del self.story[:-STORY_MAX]


@dataclass
class WorkerInfo:
    """One attached worker. `heard_at` is when it last said anything."""

    worker: cluster_pb2.Worker
    heard_at: float
    running: dict[str, int]  # request -> epoch or attempt, as last registered and not let go of
    epoch: int  # the last one given out before it registered

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
    """A call to a kv-store; the answer comes back as `store_replied`. Calls of one request to
    one store are made in order."""

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
