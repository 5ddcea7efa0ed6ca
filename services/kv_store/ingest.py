"""Page frames from another arena: checked, copied once into this one, acknowledged.

Only the prefill attempt that owns the record may write; a header of another layout, model or codec,
or of a fenced attempt, is refused by silence, and its sender finds out from the scheduler.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import zmq
import zmq.asyncio

from services.kv.identity import RowIdentity
from services.kv.layout import PAGE_TOKENS, blocks_for
from services.kv.record import StreamRecord
from services.kv_store.runtime import KvStore
from services.ops import log
from services.ops.errors import BatonError, LayoutMismatch, StaleEpoch, Unavailable
from services.wire.stream import Kind, StreamHeader, bound_address

_logger = log.get("ingest")


class Ingest:
    """The store's ROUTER socket and what comes in on it."""

    def __init__(self, store: KvStore, listen: str, advertise: str) -> None:
        self._store = store
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.linger = 0
        self._bind(listen)
        self.address = bound_address(self._socket, advertise)
        self._wakes: dict[str, zmq.asyncio.Socket] = {}
        self._fingerprint = bytes.fromhex(store.identity.fingerprint)

    def _bind(self, listen: str) -> None:
        """Binds, if `listen` leaves the port open to the one that the store before this one had:
        senders then find their way back by themselves and send again what was not acknowledged."""
        remembered = self._store.arena.directory / "ingest"
        if listen.endswith(":*") and remembered.exists():
            try:
                self._socket.bind(remembered.read_text())
                return
            except zmq.ZMQError as error:
                _logger.warning("ingest port taken", reason=str(error))
        self._socket.bind(listen)
        remembered.write_text(bound_address(self._socket, ""))

    async def run(self) -> None:
        """Takes messages until cancelled."""
        while True:
            peer, head, *frames = await self._socket.recv_multipart(copy=False)
            try:
                header = StreamHeader.unpack(head.bytes)
                self._take(header, frames)
            except BatonError as error:
                _logger.warning("stream message refused", reason=error.message)
                continue
            ack = StreamHeader(Kind.ACK, sequence=header.sequence)
            with contextlib.suppress(zmq.Again):
                await self._socket.send_multipart([peer.bytes, ack.pack()], zmq.DONTWAIT)
            if header.announce:
                self._wake(header)
            await asyncio.sleep(0)

    def _take(self, header: StreamHeader, frames: Sequence[zmq.Frame]) -> None:
        """Stores one message. Raises LayoutMismatch or StaleEpoch."""
        if header.fingerprint != self._fingerprint:
            raise LayoutMismatch("stream: the peer has another model, layout, codec or numerics")
        if not 0 <= header.slot < self._store.arena.plan.streams:
            raise LayoutMismatch(f"stream: slot {header.slot} is outside this arena")
        record = StreamRecord(self._store.arena, header.slot)
        if record.first()[0] != header.attempt:
            raise StaleEpoch(f"stream: attempt {header.attempt} does not own slot {header.slot}")
        if header.kind is Kind.FIRST:
            self._no_hole(record.ready_tokens(), record.number("prompt_tokens"))
            record.publish_first(header.attempt, header.token, header.logprob)
        elif header.kind is Kind.PAGES:
            self._take_pages(record, header, frames)
        else:
            raise LayoutMismatch(f"stream: {header.kind.name} is not for a store")

    def _take_pages(
        self, record: StreamRecord, header: StreamHeader, frames: Sequence[zmq.Frame]
    ) -> None:
        """frames: the row checksums uint32[blocks, 64], then the pages in runs of whole pages."""
        arena, group = self._store.arena, header.group
        last = header.first_block + header.blocks
        if group >= arena.layout.groups or last > blocks_for(record.number("prompt_tokens")):
            raise LayoutMismatch(f"stream: group {group} or block {last} is outside the stream")
        if len(frames) < 2 or len(frames[0]) != header.blocks * PAGE_TOKENS * 4:
            raise LayoutMismatch(f"stream: {len(frames)} frames do not carry {header.blocks} pages")
        self._no_hole(record.ready(group)[1], header.first_block * PAGE_TOKENS)
        crcs = np.frombuffer(frames[0].buffer, np.uint32).reshape(header.blocks, PAGE_TOKENS)
        table = record.prefill_table[header.first_block : last]
        ids = [arena.page_id(int(block), group) for block in table]
        page_bytes = arena.layout.page_bytes
        if sum(len(frame) for frame in frames[1:]) != header.blocks * page_bytes:
            raise LayoutMismatch(f"stream: {header.blocks} pages announced, other bytes came")
        at = 0
        for frame in frames[1:]:
            run = np.frombuffer(frame.buffer, arena.layout.dtype)
            run = run.reshape(-1, *arena.layout.page_shape)
            for page in run:
                arena.page(ids[at])[...] = page
                at += 1
        arena.headers["row_crc"][ids] = crcs
        self._seal(record, header, ids)
        record.set_ready(group, header.attempt, header.tokens)

    @staticmethod
    def _no_hole(have: int, begins: int) -> None:
        """What came before was lost with a connection, or with the store before this one: without an
        acknowledgement it all comes again, in order."""
        if begins > have:
            raise Unavailable(f"stream: tokens {have} to {begins} have not come")

    def _seal(self, record: StreamRecord, header: StreamHeader, ids: list[int]) -> None:
        arena = self._store.arena
        tokens = np.array(record.tokens[: header.tokens])
        identity = RowIdentity(record.root, tokens, len(tokens))
        for offset, page in enumerate(ids):
            block = header.first_block + offset
            if (block + 1) * PAGE_TOKENS <= header.tokens:
                arena.native.seal(page, header.group, PAGE_TOKENS, identity.key(block))

    def _wake(self, header: StreamHeader) -> None:
        """Tells the waiting decode; a lost wake costs it one look at the arena."""
        socket = self._wakes.get(header.announce)
        if socket is None:
            socket = self._context.socket(zmq.PUSH)
            socket.linger = 0
            socket.connect(header.announce)
            self._wakes[header.announce] = socket
        announce = StreamHeader(
            Kind.ANNOUNCE, slot=header.slot, attempt=header.attempt, group=header.group,
            tokens=header.tokens, fingerprint=self._fingerprint,
        )  # fmt: skip
        sent: asyncio.Future[Any] = socket.send(announce.pack(), zmq.DONTWAIT)  # type: ignore[assignment]
        sent.add_done_callback(lambda done: done.exception())

    def close(self) -> None:
        self._context.destroy(linger=0)
