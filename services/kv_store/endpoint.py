"""A store's end of the KV stream over any medium: its listener, its connections to other stores, and the
receiver that decides. Moves messages when it is given a turn; decides nothing."""

from __future__ import annotations

import time
from collections.abc import Callable

from services.kv.arena import Arena
from services.kv_store.receive import Cache, Receiver
from services.wire.client import TICK_S, Client
from services.wire.medium import Listener, Medium
from services.wire.session import hello_of

IDLE_S = 0.5  # between two looks at the clock while nothing is under way
MESSAGES_PER_TURN = 16  # before the store's other work has its turn; each is at most about 1 MiB


class Endpoint:
    """`listener` is one of `medium`'s. Used by the store's one thread."""

    def __init__(
        self, arena: Arena, cache: Cache, medium: Medium, listener: Listener, *,
        inflight_bytes_max: int, verify: bool = True, clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self._medium, self._listener = medium, listener
        self.client = Client(medium, hello_of(arena.plan), clock=clock)
        self.receiver = Receiver(
            arena, cache, reply=listener.send, notify=medium.notify, client=self.client,
            inflight_bytes_max=inflight_bytes_max, verify=verify, clock=clock,
        )  # fmt: skip

    def turn(self) -> int:
        """Takes some messages, answers included; how many."""
        took = 0
        while took < MESSAGES_PER_TURN and (message := self._listener.receive()) is not None:
            self.receiver.handle(*message)
            took += 1
        took += self.client.poll()
        self.receiver.tick()
        self.receiver.flush()
        return took

    @property
    def wait_s(self) -> float:
        """How long the next turn may wait for a message."""
        return IDLE_S if self.client.idle and self.receiver.idle else TICK_S

    @property
    def corrupt(self) -> int:
        """Messages that came damaged: the header of a request or of an answer, or rows of pages."""
        return (
            self.receiver.counts.corrupt_headers
            + self.receiver.landing.damaged
            + self.client.damaged
        )

    def close(self) -> None:
        self.client.close()
        self._medium.close()
