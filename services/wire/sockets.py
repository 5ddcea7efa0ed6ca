"""ZeroMQ sockets as every process here makes them: they never linger, their I/O thread can be kept off
the cores that compute, and where there are keys they speak CURVE. The one place where sockets are made,
so that what all of them need has one home.

CURVE does nothing on inproc: both ends are the same process.
"""

from __future__ import annotations

import time
from typing import Any, Generic, TypeVar

import zmq
import zmq.asyncio

from services.ops.keys import Keys
from services.wire.curve import Guard

S = TypeVar("S", bound="zmq.Socket[Any]")
REDIAL_S = 0.2  # at least this between two attempts at a peer that has refused
DIALLED_MAX = 256  # sockets that a Dialler keeps; the one not used for longest goes first
# A partition leaves connections open: without these, one side waits for the kernel's minutes.
PING_MS, SILENCE_MS = 200, 800
RECONNECT_MS, RECONNECT_MS_MAX = 20, 200


class _Guarded:
    """A context with a guard, which must be gone before the context can be."""

    guard: Guard | None = None

    def destroy(self, linger: int | None = None) -> None:
        if self.guard is not None:
            self.guard.stop()
        super().destroy(linger)  # type: ignore[misc]


class Context(_Guarded, zmq.Context["zmq.Socket[bytes]"]):
    """For a thread of its own."""


class AsyncContext(_Guarded, zmq.asyncio.Context):
    """For an event loop."""


def context(io_core: int = -1, keys: Keys | None = None) -> Context:
    """For a thread of its own; its I/O thread on `io_core` if that is not negative."""
    return _prepared(Context(), io_core, keys)


def async_context(io_core: int = -1, keys: Keys | None = None) -> AsyncContext:
    """For an event loop."""
    return _prepared(AsyncContext(), io_core, keys)


C = TypeVar("C", Context, AsyncContext)


def _prepared(made: C, io_core: int, keys: Keys | None) -> C:
    if io_core >= 0:
        made.set(zmq.THREAD_AFFINITY_CPU_ADD, io_core)
    if keys is not None:
        made.guard = Guard(made, keys, io_core)
    return made


def dial(made: zmq.Context[S], kind: int, address: str, peer: str, attempt: int = 0) -> S:
    """A socket connected to `address`, now or as soon as somebody listens there.

    Where there are keys, only a process of role `peer` can answer it; while its keys are being renewed
    it may have one of two, which takes more than one attempt.
    """
    socket = made.socket(kind)
    socket.linger = 0
    guard = getattr(made, "guard", None)
    if guard is not None:
        guard.secure_dialler(socket, peer, attempt)
    keep_alive(socket)
    try:
        socket.connect(address)
    except zmq.ZMQError:
        socket.close()
        raise
    return socket


def listener(made: zmq.Context[S], kind: int, admits: frozenset[str]) -> S:
    """A socket for the caller to bind. Where there are keys, only peers of these roles can connect."""
    socket = made.socket(kind)
    socket.linger = 0
    guard = getattr(made, "guard", None)
    if guard is not None:
        guard.secure_listener(socket, admits)
    keep_alive(socket)
    return socket


class Dialler(Generic[S]):
    """One context's sockets to many peers. One that was refused is dialled again: peers that restart
    may have new keys, and ZeroMQ does not try again by itself after a refusal."""

    def __init__(self, made: zmq.Context[S]) -> None:
        self._context = made
        self._sockets: dict[tuple[int, str], S] = {}
        self._attempts: dict[tuple[int, str], tuple[int, float]] = {}

    def to(self, kind: int, address: str, peer: str) -> S:
        """The socket to `address`; it stays this one's, and the caller keeps no reference."""
        key = (kind, address)
        socket = self._sockets.pop(key, None)
        if socket is not None and self._refused(socket):
            attempt, at = self._attempts.get(key, (0, 0.0))
            if time.monotonic() - at >= REDIAL_S:
                self._attempts[key] = (attempt + 1, time.monotonic())
                self._close(socket)
                socket = None
        if socket is None:
            attempt = self._attempts.get(key, (0, 0.0))[0]
            socket = dial(self._context, kind, address, peer, attempt)
        self._sockets[key] = socket  # now the youngest
        if len(self._sockets) > DIALLED_MAX:
            oldest = next(iter(self._sockets))
            self._attempts.pop(oldest, None)
            self._close(self._sockets.pop(oldest))
        return socket

    def _refused(self, socket: S) -> bool:
        guard = getattr(self._context, "guard", None)
        return guard is not None and guard.refused(socket)

    def _close(self, socket: S) -> None:
        guard = getattr(self._context, "guard", None)
        if guard is not None:
            guard.forget(socket)
        socket.close()


def bound_address(socket: zmq.Socket[Any], advertise: str) -> str:
    """Where a bound socket can be reached: `advertise` if given, else the address it got."""
    endpoint = socket.getsockopt(zmq.LAST_ENDPOINT)
    assert isinstance(endpoint, bytes)
    return advertise or endpoint.rstrip(b"\0").decode()


def keep_alive(socket: zmq.Socket[Any]) -> None:
    """A peer that is silent for SILENCE_MS is dropped and, by whoever had dialled, dialled again until
    it answers: nobody is given up for good. Set before `connect` or `bind`."""
    socket.setsockopt(zmq.HEARTBEAT_IVL, PING_MS)
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, SILENCE_MS)
    socket.setsockopt(zmq.HANDSHAKE_IVL, 2 * SILENCE_MS)
    socket.setsockopt(zmq.CONNECT_TIMEOUT, SILENCE_MS)
    socket.setsockopt(zmq.TCP_MAXRT, SILENCE_MS)
    socket.setsockopt(zmq.RECONNECT_IVL, RECONNECT_MS)
    socket.setsockopt(zmq.RECONNECT_IVL_MAX, RECONNECT_MS_MAX)
