"""The link between two stores as something that can be broken: a relay for one TCP connection after
another, which can be cut, healed, and told to flip bytes of what it carries.

It knows ZeroMQ's framing, so that a flip hits a message's bytes and not the length before them. What the
messages mean, and whether a flip has mattered, is for `tap` to say.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Sequence
from random import Random
from typing import Protocol

from baton.chaos.tap import SHORT_BYTES, Bodies, Span, Tally, Tap

CHUNK_BYTES = 1 << 16


class Link(Protocol):
    """Whatever carries pages from prefill's host to decode's: a relay here, a network elsewhere."""

    def cut(self) -> None:
        """Nothing arrives any more, in either direction, and nobody is told."""
        ...

    def heal(self) -> None: ...

    def close(self) -> None: ...


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

    def apply(self, data: bytearray, spans: Sequence[Span]) -> list[tuple[Span, int]]:
        """Changes `data` in place; gives where."""
        changed: list[tuple[Span, int]] = []
        for span in spans:
            if not self.left:
                break
            room = span.end - span.begin
            if self._gap_bytes >= room or (self._short and span.body_bytes > SHORT_BYTES):
                self._gap_bytes = max(0, self._gap_bytes - room)
                continue
            at = span.begin + (self._rng.randrange(room) if self._short else self._gap_bytes)
            data[at] ^= self._rng.randrange(1, 256)
            self.left, self.flipped = self.left - 1, self.flipped + 1
            self.flipped_short += span.body_bytes <= SHORT_BYTES
            changed.append((span, at))
            self._draw()
        return changed


class Relay:
    """Listens on a TCP port of its own and forwards to a unix socket, on a thread of its own."""

    def __init__(self, target: str, flipper: Flipper | None = None) -> None:
        self._target, self.flipper = target, flipper
        self._open = threading.Event()
        self._open.set()
        self.tally = Tally()
        self.taps: set[Tap] = set()  # of the connections that are open
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
        tap = Tap(self.tally)
        self.taps.add(tap)
        pipes = [
            asyncio.ensure_future(self._forward(reader, back_writer, tap, asked=True)),
            asyncio.ensure_future(self._forward(back_reader, writer, tap, asked=False)),
        ]
        try:
            await asyncio.wait(pipes, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for pipe in pipes:
                pipe.cancel()
            await asyncio.gather(*pipes, return_exceptions=True)
            self.taps.discard(tap)
            tap.close()
            back_writer.transport.abort()

    async def _forward(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, tap: Tap, *, asked: bool
    ) -> None:
        """One direction, until its end; bytes are flipped in what is `asked` of the store. While the
        link is cut, what comes is lost."""
        bodies = Bodies()
        while data := await reader.read(CHUNK_BYTES):
            if not self._open.is_set():
                continue
            changed, spans = bytearray(data), bodies.spans(data)
            if not asked:
                tap.answered(data, spans)
            else:
                tap.asked(data, spans, self.flipper.apply(changed, spans) if self.flipper else ())
            writer.write(changed)
            await writer.drain()
