"""The KV stream over ZeroMQ, between processes (ipc) and hosts (tcp): DEALER to ROUTER, and PUSH for
announcements. Large frames go out of the sender's memory without a copy by libzmq.

ZeroMQ connects again by itself and then goes on with what was queued: the listener sees another peer
and says so, which is how a sender learns that something may be lost.
"""

from __future__ import annotations

import contextlib
import os
import select
from collections.abc import Sequence
from typing import cast

import zmq
from zmq.backend.cython import _zmq as cython_zmq

from services import _native
from services.ops.errors import Unavailable
from services.ops.keys import Keys
from services.wire import sockets
from services.wire.session import Buffer, Tracker

COPY_BYTES_MAX = 1 << 16  # smaller frames are copied: it is cheaper than keeping track of them
MESSAGES_QUEUED_MAX = 1024  # per connection; what is in them is bounded by the granted window
SENDERS = frozenset({"prefill", "kv-store"})  # who may connect to a store
_native.use_zeromq(cython_zmq.__file__)


class Socket:
    """One of pyzmq's, whose messages native code moves."""

    def __init__(self, made: zmq.Socket[bytes]) -> None:
        self.made = made
        self.native = _native.Socket(made.underlying, COPY_BYTES_MAX)
        self.fd = cast(int, made.getsockopt(zmq.FD))  # tells of messages


class ZmqConnection:
    def __init__(self, medium: ZmqMedium, address: str) -> None:
        self._medium, self._address, self._attempt = medium, address, 0
        self._socket = medium.dial(address, self._attempt)

    def send(self, frames: Sequence[Buffer]) -> Tracker | None:
        """None also when it could not be sent: whoever waits for the answer finds out."""
        return self._socket.native.send(frames)  # type: ignore[no-any-return]

    def receive(self) -> list[memoryview] | None:
        return self._socket.native.receive()  # type: ignore[no-any-return]

    def reset(self) -> None:
        self.close()
        self._attempt += 1
        self._socket = self._medium.dial(self._address, self._attempt)

    def close(self) -> None:
        self._medium.drop(self._socket)


class ZmqListener:
    """`frame_bytes_max`: a peer that sends more in one frame is cut off before it is in memory."""

    def __init__(self, medium: ZmqMedium, socket: Socket, address: str) -> None:
        self._medium, self._socket, self.address = medium, socket, address

    def receive(self) -> tuple[bytes, list[memoryview]] | None:
        frames = self._socket.native.receive()
        return (bytes(frames[0]), frames[1:]) if frames else None

    def send(self, peer: bytes, frames: Sequence[Buffer]) -> Tracker | None:
        return self._socket.native.send([peer, *frames])  # type: ignore[no-any-return]

    def close(self) -> None:
        self._medium.drop(self._socket)


class ZmqMedium:
    """All sockets of one thread; its I/O thread on `io_core` if that is not negative."""

    def __init__(
        self, io_core: int = -1, frame_bytes_max: int = -1, keys: Keys | None = None
    ) -> None:
        self._context = sockets.context(io_core, keys)
        self._decodes = sockets.Dialler(self._context)
        self._frame_bytes_max = frame_bytes_max
        self._sockets: dict[int, Socket] = {}  # by the file descriptor that tells of messages
        self._epoll = select.epoll()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._epoll.register(self._wake, select.EPOLLIN)

    def fileno(self) -> int:
        """Readable when something may have come, for an event loop. Look at `pending` before you
        wait for it: ZeroMQ tells of each change once."""
        return self._epoll.fileno()

    def pending(self) -> bool:
        """Whether a message is there to be received."""
        return any(socket.native.ready() for socket in self._sockets.values())

    def dial(self, address: str, attempt: int) -> Socket:
        """A socket to a store. Raises Unavailable for what is no address."""
        try:
            made = sockets.dial(self._context, zmq.DEALER, address, "kv-store", attempt)
            return self._watch(made)
        except zmq.ZMQError as error:
            raise Unavailable(f"address: {address!r}: {error}") from error

    def _watch(self, made: zmq.Socket[bytes]) -> Socket:
        socket = Socket(made)
        self._sockets[socket.fd] = socket
        self._epoll.register(socket.fd, select.EPOLLIN)
        return socket

    def drop(self, socket: Socket) -> None:
        """Closes a socket; what it had not sent is forgotten."""
        if self._sockets.get(socket.fd) is not socket:
            return
        del self._sockets[socket.fd]
        self._epoll.unregister(socket.fd)
        if self._context.guard is not None:
            self._context.guard.forget(socket.made)
        socket.native.close()
        socket.made.close(linger=0)

    def connect(self, address: str) -> ZmqConnection:
        return ZmqConnection(self, address)

    def listen(self, address: str) -> ZmqListener:
        """Raises zmq.ZMQError when the address cannot be had."""
        socket = sockets.listener(self._context, zmq.ROUTER, SENDERS)
        socket.set(zmq.ROUTER_MANDATORY, 1)
        socket.set(zmq.RCVHWM, MESSAGES_QUEUED_MAX)
        socket.set(zmq.SNDHWM, MESSAGES_QUEUED_MAX)
        socket.set(zmq.MAXMSGSIZE, self._frame_bytes_max)
        try:
            socket.bind(address)
        except zmq.ZMQError:
            socket.close(linger=0)
            raise
        return ZmqListener(self, self._watch(socket), sockets.bound_address(socket, ""))

    def notify(self, address: str, data: bytes) -> None:
        """Nobody there, or no address: the words in the arena say it all."""
        with contextlib.suppress(zmq.ZMQError):
            self._decodes.to(zmq.PUSH, address, "decode").send(data, zmq.DONTWAIT)

    def wait(self, timeout_s: float | None) -> None:
        if self.pending():
            return
        if any(fd == self._wake for fd, _ in self._epoll.poll(timeout_s)):
            self.settle()

    def settle(self) -> None:
        """Takes back all wakes."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._wake)

    def wake(self) -> None:
        os.eventfd_write(self._wake, 1)

    def close(self) -> None:
        for socket in [*self._sockets.values()]:
            self.drop(socket)
        self._epoll.close()
        os.close(self._wake)
        self._context.destroy(linger=0)
