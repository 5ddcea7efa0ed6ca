"""What a policy may look at. Immutable; no clock, no socket."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class WorkerView:
    """One ready worker. `load` counts its unfinished requests."""

    worker_id: str
    role: str  # prefill or decode
    store_id: str
    load: int


@dataclass(frozen=True)
class ClusterView:
    """Everyone a request could go to, in a stable order."""

    workers: tuple[WorkerView, ...]

    def of(self, role: str) -> tuple[WorkerView, ...]:
        return tuple(worker for worker in self.workers if worker.role == role)


@dataclass(frozen=True)
class RequestView:
    """What a policy knows of a request."""

    request_id: str
    prompt_tokens: int
    max_tokens: int
