"""`Medium` over the simulated network: what carries the KV stream between the processes of a world.

It loses, repeats, delays and reorders messages and cuts connections, as a medium may. Frames are read
when they arrive, as a network card may read them: whoever has let go of the bytes by then sends other
ones. What is lost with a connection is held by it until it is reset.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from services.wire.session import Buffer
from tests.sim.hub import Process, Thread, current
from tests.sim.net import Net


@dataclass
class Parcel:
    """A message on its way; `done` once nothing reads its frames any more."""

    frames: Sequence[Buffer]
    done: bool = False

    def read(self) -> list[memoryview]:
        return [memoryview(bytes(frame)) for frame in self.frames]

    def drop(self) -> None:
        self.frames, self.done = (), True


@dataclass
class Wires:
    """Who listens where, and how badly messages fare on the way."""

    net: Net
    listeners: dict[str, SimListener] = field(default_factory=dict)
    wakes: dict[str, tuple[Process, Callable[[], None]]] = field(default_factory=dict)
    broken: dict[frozenset[str], int] = field(default_factory=dict)  # how often, by pair
    starting: Process | None = None  # whose media are being made
    _order: dict[tuple[str, str], float] = field(default_factory=dict)
    numbers: itertools.count[int] = field(default_factory=lambda: itertools.count(1))

    def medium(
        self, io_core: int = -1, frame_bytes_max: int = -1, keys: object = None
    ) -> SimMedium:
        """In place of `ZmqMedium`."""
        assert self.starting is not None
        return SimMedium(self, self.starting)

    def breaks(self, one: Process, other: Process) -> int:
        return self.broken.get(frozenset((one.name, other.name)), 0)

    def cut(self, one: str, other: str) -> None:
        """The connections between these two break, with all that is on them."""
        pair = frozenset((one, other))
        self.broken[pair] = self.broken.get(pair, 0) + 1

    def carry(
        self, one: Process, other: Process, parcel: Parcel, take: Callable[[list[memoryview]], None]
    ) -> None:
        net, rng = self.net, self.net.hub.rng
        if not other.alive or net.parted(one, other) or net.lost():
            return
        times, key = self.breaks(one, other), (one.name, other.name)
        at = net.hub.now + net.delay()
        if net.slow and rng.random() < net.slow:
            net.hub.counts["reordered"] += 1
        else:
            at = self._order[key] = max(at, self._order.get(key, 0.0))

        def arrives() -> None:
            if self.breaks(one, other) != times or net.parted(one, other) or parcel.done:
                return
            frames = parcel.read()
            parcel.drop()
            if net.slow and rng.random() < net.slow:
                net.hub.counts["duplicated"] += 1
                net.hub.after(net.delay(), lambda: take(frames), other)
            take(frames)

        net.hub.at(at, arrives, other)

    def wake(self, one: Process, address: str) -> None:
        if address in self.wakes:
            process, woken = self.wakes[address]
            self.carry(one, process, Parcel(()), lambda frames: woken())


class SimConnection:
    """One sender's way to one listener. Whenever it breaks, the listener sees another peer."""

    def __init__(self, medium: SimMedium, address: str) -> None:
        self._medium, self._address = medium, address
        self._life = medium.process.life
        self.name, self.inbox = b"", deque[list[memoryview]]()
        self._parcels: list[Parcel] = []
        self._number = next(medium.wires.numbers)

    def _listener(self) -> SimListener | None:
        """Who listens now, which decides who the listener thinks that this is."""
        listener = self._medium.wires.listeners.get(self._address)
        if listener is not None:
            breaks = self._medium.wires.breaks(self._medium.process, listener.process)
            self.name = b"%d/%d/%d" % (self._number, listener.process.life, breaks)
            listener.peers[self.name] = self
        return listener

    def send(self, frames: Sequence[Buffer]) -> Parcel | None:
        listener = self._listener()
        parcel = Parcel(frames)
        self._parcels = [p for p in self._parcels if not p.done] + [parcel]
        if listener is not None:
            name, wires = self.name, self._medium.wires
            wires.carry(
                self._medium.process, listener.process, parcel,
                lambda message: listener.take(name, message),
            )  # fmt: skip
        return parcel

    def take(self, name: bytes, message: list[memoryview]) -> None:
        if name == self.name and self._medium.process.life == self._life:
            self.inbox.append(message)
            self._medium.wake()

    def receive(self) -> list[memoryview] | None:
        return self.inbox.popleft() if self.inbox else None

    def reset(self) -> None:
        for parcel in self._parcels:
            parcel.drop()
        self._parcels.clear()
        self.inbox.clear()
        self._number = next(self._medium.wires.numbers)
        self.name = b""

    close = reset


class SimListener:
    """A store's end; `came` is called when something has come in."""

    def __init__(self, medium: SimMedium, address: str) -> None:
        self._wires, self.process, self.address = medium.wires, medium.process, address
        self.inbox: deque[tuple[bytes, list[memoryview]]] = deque()
        self.peers: dict[bytes, SimConnection] = {}
        self.came: Callable[[], None] = lambda: None

    def take(self, peer: bytes, message: list[memoryview]) -> None:
        self.inbox.append((peer, message))
        self.came()

    def receive(self) -> tuple[bytes, list[memoryview]] | None:
        return self.inbox.popleft() if self.inbox else None

    def send(self, peer: bytes, frames: Sequence[Buffer]) -> Parcel | None:
        connection = self.peers.get(peer)
        if connection is None:
            return None
        parcel = Parcel(frames)
        to = connection._medium.process
        self._wires.carry(self.process, to, parcel, lambda message: connection.take(peer, message))
        return parcel

    def close(self) -> None:
        self.peers.clear()


class SimMedium:
    """One process's, used by one thread of it."""

    def __init__(self, wires: Wires, process: Process) -> None:
        self.wires, self.process = wires, process
        self._thread: Thread | None = None
        self._came = False

    def connect(self, address: str) -> SimConnection:
        return SimConnection(self, address)

    def listen(self, address: str) -> SimListener:
        self.wires.listeners[address] = SimListener(self, address)
        return self.wires.listeners[address]

    def notify(self, address: str, data: bytes) -> None:
        self.wires.wake(self.process, address)

    def wait(self, timeout_s: float | None) -> None:
        self._thread = current()
        if not self._came:
            self._thread.wait(timeout_s)
        self._came = False

    def wake(self) -> None:
        self._came = True
        if self._thread is not None:
            self._thread.wake()

    def close(self) -> None:
        """Nothing of it outlives the process."""
