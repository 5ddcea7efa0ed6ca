"""All sessions of one thread or event loop over a medium: moves messages between the pure sessions and
the connections, and tells whoever began an exchange when it is over.

    client = Client(ZmqMedium(), Hello(fingerprint=..., layout=...))
    client.begin("tcp://store:50062", push, over=lambda push: ...)
    client.carry(push)  # or poll it from a loop, as `prefill/transfer.py` does
"""

from __future__ import annotations

import dataclasses
import itertools
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from services.ops import log
from services.ops.errors import BatonError, CorruptKv
from services.wire.medium import Connection, Medium
from services.wire.session import Exchange, Session
from services.wire.stream import Hello, pack, unpack

_logger = log.get("stream")
TICK_S = 0.05  # how often sessions look at the clock while something is under way
MESSAGES_PER_LOOK = 32  # of one connection, before the others have their turn
WINDOW_BYTES = 16 << 20
RESET_S = 0.05  # how long an ended exchange waits for its frames to leave before it drops them
IDLE_CONNECTIONS_MAX = 16

Over = Callable[[Exchange], None]


@dataclass
class _Link:
    """One connection and the session over it."""

    connection: Connection
    session: Session
    ended_at: dict[Exchange, float] = field(default_factory=dict)


class Client:
    """`window_bytes` is what this end would have on its way at most; the store may grant less."""

    def __init__(
        self, medium: Medium, hello: Hello, *, clock: Callable[[], float] = time.monotonic,
        window_bytes: int = WINDOW_BYTES,
    ) -> None:  # fmt: skip
        self._medium, self._clock = medium, clock
        self._hello = dataclasses.replace(hello, client=uuid.uuid4().bytes)
        self._window_bytes = window_bytes
        self._links: dict[str, _Link] = {}
        self._over: dict[Exchange, Over] = {}
        self._numbers: Iterator[int] = itertools.count(1)
        self.damaged = 0  # messages whose header failed its checksum

    @property
    def idle(self) -> bool:
        return all(link.session.idle for link in self._links.values())

    @property
    def wait_s(self) -> float | None:
        """How long a `wait` of the medium may last: None while nothing is under way."""
        return None if self.idle else TICK_S

    def begin(self, address: str, exchange: Exchange, over: Over = lambda exchange: None) -> None:
        """Starts an exchange with the store at `address`; `over` is called once, from `poll`, when it
        has been achieved or has failed and none of its memory is being read any more."""
        self._link(address).session.exchanges.append(exchange)
        self._over[exchange] = over

    def _link(self, address: str) -> _Link:
        if address not in self._links:
            self._make_room()
            session = Session(self._hello, address, self._numbers, self._window_bytes)
            self._links[address] = _Link(self._medium.connect(address), session)
        return self._links[address]

    def _make_room(self) -> None:
        idle = [address for address, link in self._links.items() if link.session.idle]
        for address in idle[: max(0, len(self._links) - IDLE_CONNECTIONS_MAX + 1)]:
            self._links.pop(address).connection.close()

    def poll(self) -> int:
        """Takes what has come, sends what may be sent; how many messages have come. Never blocks."""
        came = 0
        for link in list(self._links.values()):
            if not link.session.idle or link.session.window_bytes:
                came += self._receive(link)
                self._send(link)
                self._end(link)
        return came

    def carry(self, exchange: Exchange) -> None:
        """Returns when it is over. Raises what it has failed with."""
        self.poll()
        while not exchange.over:
            self._medium.wait(TICK_S)
            self.poll()
        if exchange.error is not None:
            raise exchange.error

    def _receive(self, link: _Link) -> int:
        for came in range(MESSAGES_PER_LOOK):
            message = link.connection.receive()
            if message is None:
                return came
            try:
                header = unpack(message[0])
            except CorruptKv:
                self.damaged += 1
                continue
            except BatonError as error:
                link.session.fail(error)
                return came
            link.session.received(header, message[1:], self._clock())
        return MESSAGES_PER_LOOK

    def _send(self, link: _Link) -> None:
        for request, exchange in link.session.tick(self._clock()):
            tracker = link.connection.send([pack(request.message), *request.frames()])
            if exchange is not None and tracker is not None and not tracker.done:
                exchange.trackers.append(tracker)
        if link.session.wants_reset:
            link.session.wants_reset = False
            link.connection.reset()

    def _end(self, link: _Link) -> None:
        """Reports what is over. Frames of an ended exchange that a dead connection still holds are
        dropped with it: of one that has achieved all, they are repeats that nobody needs."""
        now = self._clock()
        for exchange in link.session.forget_over():
            link.ended_at.pop(exchange, None)
            self._over.pop(exchange)(exchange)
        for exchange in link.session.exchanges:
            ended = exchange.done or exchange.error
            if ended and now - link.ended_at.setdefault(exchange, now) > RESET_S:
                link.ended_at[exchange] = now
                link.connection.reset()
                link.session.begin_again()
                return

    def close(self) -> None:
        """Drops everything; exchanges that are not over never will be."""
        for link in self._links.values():
            link.connection.close()
        self._links.clear()
        self._over.clear()
