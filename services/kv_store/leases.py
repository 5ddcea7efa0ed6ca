"""How long each open stream is still leased. Pure: its time is what it is told.

A stream is renewed by the scheduler that wants it. Time in which the store itself was stopped does
not count: nobody could have been heard then, so one tick lets at most `step_s` pass.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass
class LeaseTable:
    """request -> when its lease ends, on the table's own clock, in seconds."""

    lease_s: float
    step_s: float
    now: float = 0.0
    ends: dict[str, float] = field(default_factory=dict)
    _told: float | None = None  # the caller's time at the last tick

    def tick(self, now: float) -> None:
        """Time has passed; `now` is the caller's, monotonic."""
        if self._told is not None:
            assert now >= self._told, "time goes backwards"
            self.now += min(now - self._told, self.step_s)
        self._told = now

    def grant(self, request_id: str) -> None:
        """A stream has been opened, or found in the arena: its lease begins."""
        self.ends[request_id] = self.now + self.lease_s

    def renew(self, request_ids: Iterable[str]) -> list[str]:
        """Extends these leases; gives those that are not there."""
        unknown = []
        for request_id in request_ids:
            if request_id in self.ends:
                self.grant(request_id)
            else:
                unknown.append(request_id)
        return unknown

    def end(self, request_id: str) -> None:
        self.ends.pop(request_id, None)

    def expired(self) -> list[str]:
        """Whose lease has run out; the caller releases them."""
        return [request_id for request_id, end in self.ends.items() if end <= self.now]

    def check_invariants(self, open_streams: Iterable[str]) -> None:
        assert set(self.ends) == set(open_streams), "leases and open streams differ"
        assert all(end <= self.now + self.lease_s for end in self.ends.values()), "too long a lease"
