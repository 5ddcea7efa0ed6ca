"""How computed KV leaves prefill: two media behind one interface.

`LocalHandoff`: decode maps the same arena. The pages are where they must be; the record's words say
how far they are complete, and ZeroMQ only wakes.

`RemoteHandoff`: decode sits in another arena. Runs of whole pages go out as ZeroMQ frames straight
from this arena's memory; they stay leased until the other store has acknowledged them.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import zmq
from numpy.typing import NDArray

from services.kv.arena import Arena
from services.kv.layout import PAGE_TOKENS, blocks_for
from services.kv.record import StreamRecord
from services.ops.errors import StaleEpoch, Unavailable
from services.wire.stream import FRAME_BYTES_MAX, Kind, StreamHeader

RESEND_S = 0.05  # an unacknowledged message goes out again after this
ACK_S = 5.0  # and the hand-off fails after this


class Handoff(Protocol):
    """Where a prefill's results go. Raises StaleEpoch when this attempt has been fenced."""

    announce: str  # the decode to wake; may change while prefill runs

    def ready(self, group: int, tokens: int) -> None:
        """Tokens up to `tokens` of this layer group are complete in this worker's pages."""
        ...

    def first(self, token: int, logprob: float) -> None: ...

    def finish(self) -> None:
        """Returns when nobody needs this worker's pages any more. Raises Unavailable."""
        ...


class Sockets:
    """ZeroMQ sockets of one engine thread, by address, I/O thread on `io_core` if that is >= 0."""

    def __init__(self, io_core: int) -> None:
        self._context = zmq.Context()
        if io_core >= 0:
            self._context.set(zmq.THREAD_AFFINITY_CPU_ADD, io_core)
        self._sockets: dict[tuple[int, str], zmq.Socket[bytes]] = {}
        # Message numbers run over all hand-offs: a late acknowledgement of an earlier one that uses
        # the same socket must not be taken for one of this one's.
        self.sequence = itertools.count(1)

    def to(self, kind: int, address: str) -> zmq.Socket[bytes]:
        socket = self._sockets.get((kind, address))
        if socket is None:
            socket = self._context.socket(kind)
            socket.linger = 0
            socket.connect(address)
            self._sockets[kind, address] = socket
        return socket

    def close(self) -> None:
        self._context.destroy(linger=0)


@dataclass
class LocalHandoff:
    """Announces in the shared arena; an empty `announce` wakes nobody."""

    record: StreamRecord
    attempt: int
    fingerprint: bytes
    sockets: Sockets
    announce: str = ""

    def ready(self, group: int, tokens: int) -> None:
        if not self.record.set_ready(group, self.attempt, tokens):
            raise StaleEpoch(f"attempt: {self.attempt} has been fenced")
        self._wake(group, tokens)

    def first(self, token: int, logprob: float) -> None:
        if not self.record.publish_first(self.attempt, token, logprob):
            raise StaleEpoch(f"attempt: {self.attempt} has been fenced")
        self._wake(0, self.record.number("prompt_tokens"))

    def finish(self) -> None:
        return

    def _wake(self, group: int, tokens: int) -> None:
        if not self.announce:
            return
        header = StreamHeader(
            Kind.ANNOUNCE, slot=self.record.slot, attempt=self.attempt, group=group, tokens=tokens,
            fingerprint=self.fingerprint,
        )  # fmt: skip
        try:
            self.sockets.to(zmq.PUSH, self.announce).send(header.pack(), zmq.DONTWAIT)
        except zmq.Again:
            return  # nobody is there: the words in the arena say it all


@dataclass
class RemoteHandoff:
    """Streams pages to another arena's store, after announcing them locally for reuse."""

    arena: Arena
    local: LocalHandoff
    slot: int
    attempt: int
    ingest: str
    sent_tokens: list[int]  # per layer group: what the other side has
    announce: str = ""
    _unacked: dict[int, list[bytes | memoryview]] = field(default_factory=dict)

    def ready(self, group: int, tokens: int) -> None:
        self.local.ready(group, tokens)
        begin = self.sent_tokens[group] // PAGE_TOKENS
        end = blocks_for(tokens)
        while begin < end:
            count = min(end - begin, self._blocks_per_message)
            upto = min(tokens, (begin + count) * PAGE_TOKENS)
            self._send_pages(group, begin, count, upto)
            begin += count
        self.sent_tokens[group] = tokens
        self._collect(0)

    def first(self, token: int, logprob: float) -> None:
        self.local.first(token, logprob)
        self._send(Kind.FIRST, [], token=token, logprob=logprob)

    def finish(self) -> None:
        deadline = time.monotonic() + ACK_S
        while self._unacked:
            if not self._collect(RESEND_S):
                for message in self._unacked.values():
                    self._socket.send_multipart(message, copy=True)
            if time.monotonic() > deadline:
                raise Unavailable(f"ingest_address: {self.ingest} does not acknowledge")

    @property
    def _socket(self) -> zmq.Socket[bytes]:
        return self.local.sockets.to(zmq.DEALER, self.ingest)

    @property
    def _blocks_per_message(self) -> int:
        return max(1, FRAME_BYTES_MAX // self.arena.layout.page_bytes)

    def _send_pages(self, group: int, begin: int, count: int, tokens: int) -> None:
        blocks = np.array(self.local.record.prefill_table[begin : begin + count])
        ids = [self.arena.page_id(int(block), group) for block in blocks]
        crcs = self.arena.headers["row_crc"][ids].tobytes()
        frames: list[bytes | memoryview] = [crcs]
        frames += [self.arena.run(group, start, length) for start, length in runs(blocks)]
        self._send(Kind.PAGES, frames, group=group, first_block=begin, blocks=count, tokens=tokens)

    def _send(self, kind: Kind, frames: list[bytes | memoryview], **fields: int | float) -> None:
        sequence = next(self.local.sockets.sequence)
        header = StreamHeader(
            kind, sequence=sequence, slot=self.slot, attempt=self.attempt,
            fingerprint=self.local.fingerprint, announce=self.announce, **fields,  # type: ignore[arg-type]
        )  # fmt: skip
        message = [header.pack(), *frames]
        self._unacked[sequence] = message
        self._socket.send_multipart(message, copy=False)

    def _collect(self, timeout_s: float) -> bool:
        """Takes acknowledgements; waits for the first at most `timeout_s`. False: none came."""
        came = False
        while self._socket.poll(0 if came else int(timeout_s * 1000)):
            header = StreamHeader.unpack(self._socket.recv())
            self._unacked.pop(header.sequence, None)
            came = True
        return came


def runs(blocks: NDArray[np.uint32]) -> Iterator[tuple[int, int]]:
    """Neighbouring blocks as (first, count): one run is one contiguous frame."""
    start = length = -1
    for block in blocks:
        if block == start + length:
            length += 1
            continue
        if length > 0:
            yield start, length
        start, length = int(block), 1
    if length > 0:
        yield start, length
