"""Any medium with faults from a seed: what is sent through it is dropped, sent twice, held back, let
past by what came later, damaged in one byte, or lost with its connection."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random

from services.wire.medium import Connection, Listener, Medium
from services.wire.session import Buffer, Tracker


@dataclass(frozen=True)
class Faults:
    """Probabilities per message, in each direction."""

    drop: float = 0.0
    duplicate: float = 0.0
    delay: float = 0.0  # held back for some looks of the receiver; what comes later may overtake it
    corrupt: float = 0.0
    cut: float = 0.0


@dataclass
class FaultyMedium:
    """Faults on both ways of every connection made through it, and on notifications."""

    inner: Medium
    rng: Random
    faults: Faults

    def connect(self, address: str) -> FaultyConnection:
        return FaultyConnection(self.inner.connect(address), self.rng, self.faults)

    def listen(self, address: str) -> Listener:
        return self.inner.listen(address)

    def notify(self, address: str, data: bytes) -> None:
        for frames in _mistreat([data], self.rng, self.faults):
            self.inner.notify(address, bytes(frames[0]))

    def wait(self, timeout_s: float | None) -> None:
        self.inner.wait(0.001 if timeout_s is None else min(timeout_s, 0.001))

    def wake(self) -> None:
        self.inner.wake()

    def close(self) -> None:
        self.inner.close()


def _mistreat(
    frames: Sequence[Buffer], rng: Random, faults: Faults
) -> list[Sequence[Buffer]]:  # fmt: skip
    """What becomes of one message: none, one or two, whole or damaged."""
    if rng.random() < faults.drop:
        return []
    if rng.random() < faults.corrupt:
        at = rng.randrange(len(frames))
        if len(frames[at]):
            damaged = bytearray(frames[at])
            damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
            frames = [*frames[:at], bytes(damaged), *frames[at + 1 :]]
    return [frames, frames] if rng.random() < faults.duplicate else [frames]


@dataclass
class _Held:
    frames: Sequence[Buffer]
    looks: int
    done: bool = False


@dataclass
class FaultyConnection:
    inner: Connection
    rng: Random
    faults: Faults
    outgoing: list[_Held] = field(default_factory=list)
    incoming: deque[list[memoryview]] = field(default_factory=deque)
    late: list[_Held] = field(default_factory=list)

    def send(self, frames: Sequence[Buffer]) -> Tracker | None:
        if self.rng.random() < self.faults.cut:
            self.reset()
        trackers: list[Tracker] = []
        for message in _mistreat(frames, self.rng, self.faults):
            if self.rng.random() < self.faults.delay:
                held = _Held(message, self.rng.randrange(1, 20))
                self.outgoing.append(held)
                trackers.append(held)
            elif tracker := self.inner.send(message):
                trackers.append(tracker)
        return _All(trackers) if trackers else None

    def receive(self) -> list[memoryview] | None:
        self._age()
        while (came := self.inner.receive()) is not None:
            for message in _mistreat(came, self.rng, self.faults):
                views = [memoryview(frame) for frame in message]
                if self.rng.random() < self.faults.delay:
                    self.late.append(_Held(views, self.rng.randrange(1, 20)))
                else:
                    self.incoming.append(views)
        return self.incoming.popleft() if self.incoming else None

    def _age(self) -> None:
        for held in [*self.outgoing, *self.late]:
            held.looks -= 1
        for held in [held for held in self.outgoing if held.looks <= 0]:
            self.outgoing.remove(held)
            self.inner.send([bytes(frame) for frame in held.frames])
            held.done = True
        for held in [held for held in self.late if held.looks <= 0]:
            self.late.remove(held)
            self.incoming.append([memoryview(frame) for frame in held.frames])

    def reset(self) -> None:
        for held in self.outgoing:
            held.done = True
        self.outgoing.clear()
        self.late.clear()
        self.incoming.clear()
        self.inner.reset()

    def close(self) -> None:
        self.reset()
        self.inner.close()


@dataclass
class _All:
    trackers: list[Tracker]

    @property
    def done(self) -> bool:
        return all(tracker.done for tracker in self.trackers)
