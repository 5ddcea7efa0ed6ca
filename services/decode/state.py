"""Which streams run, which wait: continuous batching. Pure.

pending (KV still arriving) -> waiting (runnable, no room) -> active (in every step)
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Generic, TypeVar

S = TypeVar("S")


@dataclass
class BatchState(Generic[S]):
    """Streams by request id, first come first served."""

    batch_max: int
    pending: dict[str, S] = field(default_factory=dict)
    waiting: dict[str, S] = field(default_factory=dict)
    active: dict[str, S] = field(default_factory=dict)

    def add(self, request_id: str, stream: S) -> None:
        assert request_id not in self, f"{request_id} is here already"
        self.pending[request_id] = stream

    def runnable(self, request_id: str) -> None:
        """Its KV is complete."""
        self.waiting[request_id] = self.pending.pop(request_id)

    def admit(self) -> list[S]:
        """Moves waiting streams into the batch while there is room; gives those moved."""
        moved = []
        while self.waiting and len(self.active) < self.batch_max:
            request_id = next(iter(self.waiting))
            self.active[request_id] = self.waiting.pop(request_id)
            moved.append(self.active[request_id])
        return moved

    def remove(self, request_id: str) -> S | None:
        """Takes a stream out, wherever it is."""
        for place in (self.pending, self.waiting, self.active):
            if request_id in place:
                return place.pop(request_id)
        return None

    def get(self, request_id: str) -> S | None:
        for place in (self.pending, self.waiting, self.active):
            if request_id in place:
                return place[request_id]
        return None

    def __contains__(self, request_id: str) -> bool:
        return self.get(request_id) is not None

    def all(self) -> dict[str, S]:
        return {**self.pending, **self.waiting, **self.active}

    def check_invariants(self) -> None:
        total = len(self.pending) + len(self.waiting) + len(self.active)
        assert total == len(self.all()), "a stream is in two places"
        assert len(self.active) <= self.batch_max, "the batch is over its limit"
