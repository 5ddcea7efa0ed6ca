"""The link between two stores as something that can be broken: a relay for one TCP connection after
another, which can be cut, healed, and told to flip bytes of what it carries.

It knows ZeroMQ's framing (ZMTP 3.x, rfc.zeromq.org/spec/23), so that a flip hits a message's bytes and
not the length before them; it does not know what the messages mean.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Sequence
from random import Random
from typing import NamedTuple, Protocol

GREETING_BYTES = 64
CHUNK_BYTES = 1 << 16
SHORT_BYTES = 1024  # headers and row checksums are shorter, pages longer
_LONG, _COMMAND = 0x02, 0x04


class Link(Protocol):
    """Whatever carries pages from prefill's host to decode's: a relay here, a network elsewhere."""

    def cut(self) -> None:
        """Nothing arrives any more, in either direction, and nobody is told."""
        ...

    def heal(self) -> None: ...

    def close(self) -> None: ...


class Span(NamedTuple):
    """The part [begin, end) of a chunk; it belongs to a body of `body_bytes`."""

    begin: int
    end: int
    body_bytes: int


class Bodies:
    """Finds the message bytes in one direction of a ZMTP connection, over any cut into chunks.

    [ greeting | flags, length, body | flags, length, body | ... ]
    """

    def __init__(self) -> None:
        self._head = b""
        self._left = self._length = GREETING_BYTES
        self._is_body = False

    def spans(self, data: bytes | bytearray) -> list[Span]:
        """The parts of `data` that are bodies of messages, not of commands."""
        found: list[Span] = []
        at = 0
        while at < len(data):
            if self._left:
                end = min(len(data), at + self._left)
                if self._is_body:
                    found.append(Span(at, end, self._length))
                self._left -= end - at
                at = end
                continue
            self._head += data[at : at + 1]
            at += 1
            self._begin_frame()
        return found

    def _begin_frame(self) -> None:
        flags, length_bytes = self._head[0], 8 if self._head[0] & _LONG else 1
        if len(self._head) <= length_bytes:
            return
        self._left = self._length = int.from_bytes(self._head[1:], "big")
        self._is_body = not flags & _COMMAND
        self._head = b""


class Flipper:
    """Flips single bytes of message bodies, at random distances. Half of them wait for the next short
    body, a message's header or its checksums: they are few among the bytes of pages."""

    def __init__(self, rng: Random, mean_gap_bytes: int) -> None:
        self._rng, self._mean_gap_bytes = rng, mean_gap_bytes
        self._gap_bytes = 0  # until the next flip is due
        self._short = False  # whether that one is for a short body
        self.left = 0
        self.flipped = 0
        self.flipped_short = 0

    def arm(self, count: int) -> None:
        """The next `count` flips."""
        self.left = count
        self._draw()

    def _draw(self) -> None:
        self._gap_bytes = self._rng.randrange(2 * self._mean_gap_bytes)
        self._short = self._rng.random() < 0.5

    def apply(self, data: bytearray, spans: Sequence[Span]) -> None:
        """Changes `data` in place."""
        for span in spans:
            if not self.left:
                return
            room = span.end - span.begin
            if self._gap_bytes >= room or (self._short and span.body_bytes > SHORT_BYTES):
                self._gap_bytes = max(0, self._gap_bytes - room)
                continue
            at = span.begin + (self._rng.randrange(room) if self._short else self._gap_bytes)
            data[at] ^= self._rng.randrange(1, 256)
            self.left, self.flipped = self.left - 1, self.flipped + 1
            self.flipped_short += span.body_bytes <= SHORT_BYTES
            self._draw()


class Relay:
    """Listens on a TCP port of its own and forwards to a unix socket, on a thread of its own."""

    def __init__(self, target: str, flipper: Flipper | None = None) -> None:
        self._target, self.flipper = target, flipper
        self._open = threading.Event()
        self._open.set()
        self._pipes: set[asyncio.Task[None]] = set()
        self._loop = asyncio.new_event_loop()
        started: threading.Event = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(started.set,), daemon=True)
        self._thread.start()
        started.wait()

    @property
    def address(self) -> str:
        """What the sender is to connect to."""
        return f"tcp://127.0.0.1:{self._port}"

    def cut(self) -> None:
        self._open.clear()

    def heal(self) -> None:
        """What was under way is lost: connections that were cut break now, as by a time-out."""
        self._call(self._drop)
        self._open.set()

    def close(self) -> None:
        self._call(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _call(self, work: Callable[[], None]) -> None:
        self._loop.call_soon_threadsafe(work)

    def _drop(self) -> None:
        for pipe in self._pipes:
            pipe.cancel()

    def _run(self, started: Callable[[], None]) -> None:
        asyncio.set_event_loop(self._loop)
        server = self._loop.run_until_complete(asyncio.start_server(self._serve, "127.0.0.1", 0))
        self._port = server.sockets[0].getsockname()[1]
        started()
        self._loop.run_forever()
        server.close()
        self._drop()
        self._loop.run_until_complete(asyncio.gather(*self._pipes, return_exceptions=True))

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._pipes.add(task)
        try:
            with contextlib.suppress(OSError, asyncio.CancelledError):
                await self._connect(reader, writer)
        finally:
            self._pipes.discard(task)
            writer.transport.abort()

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        back_reader, back_writer = await asyncio.open_unix_connection(self._target)
        pipes = [
            asyncio.ensure_future(self._forward(reader, back_writer, self.flipper)),
            asyncio.ensure_future(self._forward(back_reader, writer, None)),
        ]
        try:
            await asyncio.wait(pipes, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for pipe in pipes:
                pipe.cancel()
            await asyncio.gather(*pipes, return_exceptions=True)
            back_writer.transport.abort()

    async def _forward(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, flipper: Flipper | None
    ) -> None:
        """One direction, until its end. While the link is cut, what comes is lost."""
        bodies = Bodies()
        while data := await reader.read(CHUNK_BYTES):
            if not self._open.is_set():
                continue
            changed = bytearray(data)
            spans = bodies.spans(changed)
            if flipper is not None:
                flipper.apply(changed, spans)
            writer.write(changed)
            await writer.drain()
