"""CURVE on ZeroMQ: who is let in, and words for what failed.

One thread for each context that has keys. It answers libzmq's question whether a public key may connect
(ZAP, https://rfc.zeromq.org/spec/27) and reads what the sockets' monitors report. It sees handshakes
and never a message.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import queue
import threading
import time
from typing import Any

import zmq
import zmq.asyncio
import zmq.auth
from zmq.utils.monitor import recv_monitor_message

from services.ops import lifecycle, log
from services.ops.errors import ConfigError
from services.ops.keys import CURVE_ROLES, Keys

SAME_WORDS_S = 5.0  # the same refusal is logged once in this time, with how often it came
KINDS_MAX = 256  # refusals told apart; a flood of strangers must not take memory
_REPORTED = (
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_HANDSHAKE_SUCCEEDED
    | zmq.EVENT_MONITOR_STOPPED
)
_MECHANISM = zmq.PROTOCOL_ERROR_ZMTP_MECHANISM_MISMATCH
_CRYPTOGRAPHIC = zmq.PROTOCOL_ERROR_ZMTP_CRYPTOGRAPHIC
_logger = log.get("curve")
_serial = itertools.count(1)


class _Admission:
    """Says whether a public key may connect: it must be, now, that of one of the admitted roles."""

    def __init__(self, keys: Keys, admits: frozenset[str], say: Words) -> None:
        self._keys, self._admits, self._say = keys, admits, say

    def callback(self, domain: str, key: bytes) -> bool:
        known: dict[bytes, str] = {}
        for role in CURVE_ROLES:
            try:
                known |= dict.fromkeys(self._keys.curve_keys(role), role)
            except ConfigError as error:
                self._say("known keys unreadable", reason=error.message)
        role = known.get(key, "")
        if role in self._admits:
            return True
        who = f"a {role}, which may not connect here" if role else "a key that is not known"
        self._say("peer refused", socket=domain, reason=f"it has {who}", key=key.decode())
        return False


class Words:
    """Logs each kind of refusal at most once in `SAME_WORDS_S`, with how often it came."""

    def __init__(self) -> None:
        self._said: dict[tuple[str, str], tuple[float, int]] = {}

    def __call__(self, event: str, *, reason: str, **fields: str) -> None:
        at, unsaid = self._said.get((event, reason), (float("-inf"), 0))
        now = time.monotonic()
        if now - at < SAME_WORDS_S:
            self._said[event, reason] = (at, unsaid + 1)
            return
        if len(self._said) >= KINDS_MAX:
            self._said.clear()
        self._said[event, reason] = (now, 0)
        _logger.warning(event, reason=reason, times=unsaid + 1, **fields)


class Guard:
    """Secures the sockets of one context and watches their handshakes; `stop()` before the context
    ends. Its thread keeps to `io_core` if that is not negative, like the context's own."""

    def __init__(self, context: zmq.Context[Any], keys: Keys, io_core: int) -> None:
        assert keys.curve is not None, f"a {keys.role} has no CURVE pair"
        self._keys, self._io_core = keys, io_core
        self._curve = keys.curve
        # Sockets of another tracking set: the owner's `destroy` must not close them in its own thread.
        self._context: zmq.Context[Any] = zmq.Context.shadow(context.underlying)
        self._say = Words()
        self._refused: set[int] = set()
        self._numbers: dict[int, int] = {}  # id(socket) -> number
        self._new: queue.SimpleQueue[tuple[int, str] | None] = queue.SimpleQueue()
        self._zap = zmq.auth.Authenticator(self._context)
        self._zap.start()
        name = f"inproc://guard-{next(_serial)}"
        self._control, self._inbox = (self._context.socket(zmq.PAIR) for _ in range(2))
        self._inbox.bind(name)
        self._control.connect(name)
        # Without it nobody would be let in any more, and nobody told.
        self._thread = lifecycle.engine_thread(self._run, "curve-guard")
        self._thread.start()

    # --- called by whoever owns the context ---

    def secure_listener(self, socket: zmq.Socket[Any], admits: frozenset[str]) -> None:
        """Makes it a CURVE server for peers of these roles. Before it is bound."""
        assert admits <= set(CURVE_ROLES), f"without CURVE keys: {admits}"
        domain = f"{self._keys.role}-{next(_serial)}"
        self._zap.configure_curve_callback(domain, _Admission(self._keys, admits, self._say))
        socket.curve_server = True
        socket.curve_publickey, socket.curve_secretkey = self._curve.public, self._curve.secret
        socket.zap_domain = domain.encode()
        self._watch(socket, "a peer")

    def secure_dialler(self, socket: zmq.Socket[Any], peer: str, attempt: int) -> None:
        """Makes it connect to a CURVE server of role `peer` alone. Raises ConfigError."""
        known = self._keys.curve_keys(peer)
        socket.curve_serverkey = known[attempt % len(known)]
        socket.curve_publickey, socket.curve_secretkey = self._curve.public, self._curve.secret
        self._watch(socket, f"the {peer}")

    def refused(self, socket: zmq.Socket[Any]) -> bool:
        """Whether the last handshake of a dialled socket has failed."""
        return self._numbers.get(id(socket), 0) in self._refused

    def forget(self, socket: zmq.Socket[Any]) -> None:
        """The socket is about to be closed."""
        self._refused.discard(self._numbers.pop(id(socket), 0))
        socket.disable_monitor()

    def stop(self) -> None:
        """Ends the thread; safe to call twice."""
        if self._control.closed:
            return
        self._new.put(None)
        self._control.send(b"")
        self._thread.join()
        self._control.close()

    def _watch(self, socket: zmq.Socket[Any], peer: str) -> None:
        number = next(_serial)
        socket.monitor(_monitor(number), _REPORTED)
        self._numbers[id(socket)] = number
        self._new.put((number, peer))
        self._control.send(b"")

    # --- the thread ---

    def _run(self) -> None:
        if self._io_core >= 0:
            os.sched_setaffinity(threading.get_native_id(), {self._io_core})
        asyncio.run(self._serve())

    async def _serve(self) -> None:
        poller = zmq.asyncio.Poller()
        monitors: dict[zmq.Socket[Any], tuple[int, str]] = {}
        poller.register(self._inbox, zmq.POLLIN)
        poller.register(self._zap.zap_socket, zmq.POLLIN)
        while True:
            for socket, _ in await poller.poll():
                if socket is self._inbox:
                    socket.recv()
                    if (new := self._new.get()) is None:
                        self._end(monitors)
                        return
                    monitor = self._context.socket(zmq.PAIR)
                    monitor.connect(_monitor(new[0]))
                    monitors[monitor] = new
                    poller.register(monitor, zmq.POLLIN)
                elif socket is self._zap.zap_socket:
                    await self._zap.handle_zap_message(socket.recv_multipart())
                elif not self._heard(*monitors[socket], recv_monitor_message(socket)):
                    poller.unregister(socket)
                    del monitors[socket]
                    socket.close()

    def _end(self, monitors: dict[zmq.Socket[Any], tuple[int, str]]) -> None:
        for socket in (*monitors, self._inbox):
            socket.close()
        self._zap.stop()

    def _heard(self, number: int, peer: str, message: Any) -> bool:
        """Takes what a monitor says; False when it will say no more."""
        event = message["event"]
        if event == zmq.EVENT_MONITOR_STOPPED:
            return False
        if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            self._refused.discard(number)
            return True
        self._refused.add(number)
        reason = reason_of(event, message["value"])
        endpoint = message["endpoint"].decode(errors="replace")
        self._say("handshake failed", reason=f"{peer} {reason}", address=endpoint)
        return True


def _monitor(number: int) -> str:
    return f"inproc://monitor-{number}"


def reason_of(event: int, value: int) -> str:
    """What a failed handshake means, said of the peer."""
    if event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
        return "was refused, or refuses this process: the key is not known, or of another role"
    if event == zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL:
        if value == _MECHANISM:
            return "runs without keys_dir, this process with it"
        if value == _CRYPTOGRAPHIC:
            return "expects another public key than this process has"
        return f"does not speak the protocol, ZeroMQ's error {value:#x}"
    return "broke off the handshake: it has no keys, or others than are known here"
