"""A medium without sockets: several stores and senders in one process and one thread, for tests and the
simulator. Frames are passed on as they are, so a page that is overwritten before the peer has taken it
arrives overwritten, as it would from memory that a network card still reads."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from services.ops.errors import Unavailable
from services.wire.session import Buffer


@dataclass
class _InMemory:
    """A message on its way, and whether anybody may still read its frames."""

    frames: Sequence[Buffer]
    done: bool = False

    def take(self) -> list[memoryview]:
        """Its frames, as one who receives from a socket gets them: bytes of his own."""
        taken = [memoryview(bytes(frame)) for frame in self.frames]
        self.drop()
        return taken

    def drop(self) -> None:
        self.frames, self.done = (), True


Queue = deque[_InMemory]


@dataclass
class MemoryListener:
    address: str
    peers: dict[bytes, MemoryConnection] = field(default_factory=dict)
    inbox: deque[tuple[bytes, _InMemory]] = field(default_factory=deque)

    def receive(self) -> tuple[bytes, list[memoryview]] | None:
        if not self.inbox:
            return None
        peer, message = self.inbox.popleft()
        return peer, message.take()

    def send(self, peer: bytes, frames: Sequence[Buffer]) -> _InMemory | None:
        if peer not in self.peers:
            return None
        message = _InMemory(frames)
        self.peers[peer].inbox.append(message)
        return message

    def close(self) -> None:
        """What was on its way in either direction is lost; peers are not told."""
        for _, message in self.inbox:
            message.drop()
        self.inbox.clear()
        for connection in list(self.peers.values()):
            connection.lost()


@dataclass
class MemoryConnection:
    medium: MemoryMedium
    address: str
    name: bytes = b""
    inbox: Queue = field(default_factory=deque)

    def send(self, frames: Sequence[Buffer]) -> _InMemory | None:
        listener = self.medium.listeners.get(self.address)
        if listener is None:
            return None
        if not self.name:
            self.name = b"peer-%d" % next(self.medium.numbers)
            listener.peers[self.name] = self
        message = _InMemory(frames)
        listener.inbox.append((self.name, message))
        return message

    def receive(self) -> list[memoryview] | None:
        return self.inbox.popleft().take() if self.inbox else None

    def lost(self) -> None:
        listener = self.medium.listeners.get(self.address)
        if listener and self.name:
            listener.peers.pop(self.name, None)
            mine = [entry for entry in listener.inbox if entry[0] == self.name]
            for _, message in mine:
                message.drop()
            listener.inbox = deque(entry for entry in listener.inbox if entry[0] != self.name)
        for message in self.inbox:
            message.drop()
        self.inbox.clear()
        self.name = b""

    reset = close = lost


@dataclass
class MemoryMedium:
    """All listeners of one world, by address."""

    listeners: dict[str, MemoryListener] = field(default_factory=dict)
    notified: list[tuple[str, bytes]] = field(default_factory=list)
    numbers: itertools.count[int] = field(default_factory=lambda: itertools.count(1))

    def connect(self, address: str) -> MemoryConnection:
        return MemoryConnection(self, address)

    def listen(self, address: str) -> MemoryListener:
        """Raises Unavailable when the address is taken."""
        if address in self.listeners:
            raise Unavailable(f"address: {address} is in use")
        self.listeners[address] = MemoryListener(address)
        return self.listeners[address]

    def forget(self, address: str) -> None:
        """The process that listened there has died."""
        self.listeners[address].close()
        del self.listeners[address]

    def notify(self, address: str, data: bytes) -> None:
        self.notified.append((address, data))

    def wait(self, timeout_s: float | None) -> None:
        """Whatever comes is there at once."""

    def wake(self) -> None: ...

    def close(self) -> None:
        for address in list(self.listeners):
            self.forget(address)
