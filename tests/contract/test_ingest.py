"""What a store takes from the KV stream, and what it refuses by silence."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import zmq
import zmq.asyncio

from baton.v1 import store_pb2
from services.engine.identity import identify
from services.kv.layout import PAGE_TOKENS
from services.kv.record import StreamRecord
from services.kv_store.config import KvStoreConfig
from services.kv_store.ingest import Ingest
from services.kv_store.runtime import KvStore
from services.wire.stream import Kind, StreamHeader

SILENCE_S = 0.2


@dataclass
class Sender:
    """A prefill's end of the stream, with a record of 150 tokens open at the store."""

    store: KvStore
    socket: zmq.asyncio.Socket
    slot: int
    attempt: int = 8

    async def send(self, kind: Kind = Kind.PAGES, **fields: object) -> bool:
        """Whether the message was acknowledged."""
        good: dict[str, object] = {
            "sequence": 1, "slot": self.slot, "attempt": self.attempt, "group": 0,
            "fingerprint": bytes.fromhex(self.store.identity.fingerprint), "first_block": 0,
            "blocks": 1, "tokens": PAGE_TOKENS,
        }  # fmt: skip
        header = StreamHeader(kind, **{**good, **fields})  # type: ignore[arg-type]
        page = bytes(header.blocks * self.store.arena.layout.page_bytes)
        crcs = np.zeros((header.blocks, PAGE_TOKENS), np.uint32).tobytes()
        frames = [crcs, page] if kind is Kind.PAGES else []
        await self.socket.send_multipart([header.pack(), *frames])
        if not await self.socket.poll(int(SILENCE_S * 1000)):
            return False
        return StreamHeader.unpack(await self.socket.recv()).sequence == header.sequence

    def ready(self, group: int = 0) -> int:
        return StreamRecord(self.store.arena, self.slot).ready(group)[1]


Scene = Callable[[Sender], Coroutine[None, None, None]]


@pytest.fixture
def play(tmp_path: Path) -> Callable[[Scene], None]:
    """Runs a scene against a real store's socket."""
    identity = identify(
        "models/pico", kv_dtype="auto", layers_per_group=4, prefill_device="cpu",
        decode_device="cpu",
    )  # fmt: skip
    store = KvStore(KvStoreConfig(arena_dir=str(tmp_path), arena_bytes=16 << 20), identity)
    opened = store.open(
        store_pb2.OpenStreamRequest(
            request_id="r", token_ids=range(150), max_new_tokens=5, epoch=7, attempt=8
        )
    )

    async def run(scene: Scene) -> None:
        ingest = Ingest(store, "tcp://127.0.0.1:*", "")
        task = asyncio.create_task(ingest.run())
        with zmq.asyncio.Context() as context:
            socket = context.socket(zmq.DEALER)
            socket.linger = 0
            socket.connect(ingest.address)
            await scene(Sender(store, socket, opened.slot))
            socket.close()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        ingest.close()

    return lambda scene: asyncio.run(run(scene))


def test_pages_are_stored_and_acknowledged(play: Callable[[Scene], None]) -> None:
    """In order, group by group; the same again changes nothing and is acknowledged too."""

    async def scene(sender: Sender) -> None:
        assert await sender.send()
        assert await sender.send(first_block=1, blocks=2, tokens=150)
        assert sender.ready() == 150
        assert await sender.send()
        assert (sender.ready(0), sender.ready(1)) == (150, 0)

    play(scene)


def test_a_hole_is_refused(play: Callable[[Scene], None]) -> None:
    """What follows lost pages would make them look complete: it is not taken before they are."""

    async def scene(sender: Sender) -> None:
        assert not await sender.send(first_block=1, tokens=128)
        assert sender.ready() == 0
        assert not await sender.send(Kind.FIRST, token=5)
        assert not StreamRecord(sender.store.arena, sender.slot).first()[1]
        assert await sender.send(blocks=3, tokens=150)
        assert await sender.send(group=1, blocks=3, tokens=150)
        assert await sender.send(Kind.FIRST, token=5)
        assert StreamRecord(sender.store.arena, sender.slot).first()[1]

    play(scene)


@pytest.mark.parametrize(
    "change",
    [
        {"fingerprint": b"another model..."},
        {"attempt": 7},
        {"attempt": 9},
        {"slot": 100_000},
        {"group": 9},
        {"first_block": 0, "blocks": 9},
        {"kind": Kind.ACK},
    ],
    ids=str,
)
def test_foreign_messages_are_refused(
    play: Callable[[Scene], None], change: dict[str, object]
) -> None:
    """Another model's, a fenced attempt's, or outside the stream: nothing is stored, and the socket
    goes on."""

    async def scene(sender: Sender) -> None:
        assert not await sender.send(**change)  # type: ignore[arg-type]
        assert sender.ready() == 0
        assert await sender.send()

    play(scene)


def test_frames_that_do_not_fit_are_refused(play: Callable[[Scene], None]) -> None:
    """Fewer frames or bytes than announced, or no header at all."""

    async def scene(sender: Sender) -> None:
        header = StreamHeader(
            Kind.PAGES, slot=sender.slot, attempt=8, blocks=1, tokens=64,
            fingerprint=bytes.fromhex(sender.store.identity.fingerprint),
        ).pack()  # fmt: skip
        for message in ([header], [header, b"x" * 256], [header, b"x" * 256, b"short"], [b"junk"]):
            await sender.socket.send_multipart(message)
        assert await sender.send()
        assert sender.ready() == 64

    play(scene)
