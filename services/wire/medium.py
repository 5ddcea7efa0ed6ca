"""What carries the KV stream: one interface, whatever lies beneath.

A medium may lose, repeat, delay and reorder messages and may cut a connection at any time, and says
nothing about it: whoever uses one repairs that (`session.py`, `push.py`). Nothing here blocks but
`wait`.

Who owns the bytes: a frame given to `send` is read until its tracker is done, and may be read by the
peer, where memory is shared, until the peer has answered. A received frame is valid until it is
dropped; whoever needs it longer copies it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from services.wire.session import Buffer, Tracker


class Connection(Protocol):
    """A way to one listener and back."""

    def send(self, frames: Sequence[Buffer]) -> Tracker | None:
        """Sends without a copy where the medium can; None: no memory is read any more."""
        ...

    def receive(self) -> list[memoryview] | None:
        """The next message that has come, or None."""
        ...

    def reset(self) -> None:
        """Drops all that is on its way and connects anew, to the listener as somebody else."""
        ...

    def close(self) -> None: ...


class Listener(Protocol):
    """Where peers connect to."""

    @property
    def address(self) -> str: ...

    def receive(self) -> tuple[bytes, list[memoryview]] | None:
        """(peer, message), or None. A peer's name is good for one connection."""
        ...

    def send(self, peer: bytes, frames: Sequence[Buffer]) -> Tracker | None:
        """As `Connection.send`; what cannot be delivered is dropped."""
        ...

    def close(self) -> None: ...


class Medium(Protocol):
    """Used by one thread, but for `wake`."""

    def connect(self, address: str) -> Connection: ...

    def listen(self, address: str) -> Listener: ...

    def notify(self, address: str, data: bytes) -> None:
        """One small message to a decode's announcement socket; it may be lost."""
        ...

    def wait(self, timeout_s: float | None) -> None:
        """Returns when something may have come, at a `wake`, or after the timeout."""
        ...

    def wake(self) -> None:
        """Ends a `wait`, from any thread."""
        ...

    def close(self) -> None: ...
