"""What a store takes from the KV stream and what it refuses, message by message, over a real socket and
a real store; and that no message whatever ends it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import zmq
import zmq.asyncio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from baton.v1 import store_pb2
from services.engine.identity import identify
from services.kv.layout import PAGE_TOKENS, blocks_for
from services.kv.record import StreamRecord
from services.kv_store import report
from services.kv_store.config import KvStoreConfig
from services.kv_store.ingest import Ingest
from services.kv_store.runtime import KvStore
from services.ops.errors import ConfigError
from services.wire.memory_medium import MemoryMedium
from services.wire.session import hello_of
from services.wire.stream import (
    MESSAGES,
    Ack,
    Code,
    Fetch,
    First,
    Hello,
    Message,
    Offer,
    Open,
    Pages,
    Refused,
    Status,
    Welcome,
    pack,
    unpack,
)
from tests.support import arenas
from tests.support.media import Clock, Setting, endpoint, open_both
from tests.unit.test_stream_header import values

PROMPT, ATTEMPT = 150, 8


@dataclass
class Sender:
    """A prefill's end of the stream, with a record of 150 tokens open at the store."""

    store: KvStore
    socket: zmq.asyncio.Socket
    slot: int
    greeted: bool = False

    async def ask(self, message: Message, frames: Sequence[bytes] = ()) -> Message:
        await self.socket.send_multipart([pack(message), *frames])
        assert await self.socket.poll(5000), "no answer"
        answer, *_ = await self.socket.recv_multipart()
        return unpack(answer)

    async def hello(self) -> None:
        answer = await self.ask(Hello(**vars(hello_of(self.store.arena.plan)) | {"session": 1}))
        assert isinstance(answer, Welcome)
        self.greeted = True

    async def send(self, kind: type[Message] = Pages, **fields: object) -> Message:
        """The answer to a good message with some fields changed."""
        if not self.greeted:
            await self.hello()
        good: dict[str, object] = {"session": 1, "sequence": 2, "slot": self.slot}
        good |= {"attempt": ATTEMPT}
        if kind is Pages:
            good |= {"group": 0, "tokens": PAGE_TOKENS, "first_block": 0, "blocks": 1}
        if kind is First:
            good |= {"token": 5, "logprob": -1.0}
        message = kind(**{**good, **fields})  # type: ignore[arg-type]
        frames = self.frames(message) if isinstance(message, Pages) else []
        answer = await self.ask(message, frames)
        assert (answer.session, answer.sequence) == (message.session, message.sequence)
        return answer

    def frames(self, message: Pages) -> list[bytes]:
        """Zeroes for K and V, with their true checksums, as a prefill would have them."""
        arena, record = self.store.arena, StreamRecord(self.store.arena, self.slot)
        identity = arenas.identity_of(np.array(record.tokens[:PROMPT]), record.root)
        scratch = arena.page_id(arena.plan.blocks - 1, min(message.group, 1))
        arena.page(scratch)[...] = 0
        sums = np.zeros((message.blocks, PAGE_TOKENS), np.uint32)
        for block in range(message.blocks):
            begin = (message.first_block + block) * PAGE_TOKENS
            seeds = identity.seeds[begin : begin + PAGE_TOKENS]
            if len(seeds):
                arenas.stamp(arena, scratch, seeds, min(message.group, 1))
                sums[block] = arena.headers["row_crc"][scratch]
        return [sums.tobytes(), bytes(message.blocks * arena.layout.page_bytes)]

    def ready(self, group: int = 0) -> int:
        return StreamRecord(self.store.arena, self.slot).ready(group)[1]


Scene = Callable[[Sender], Coroutine[None, None, None]]


def new_store(directory: Path, **options: object) -> KvStore:
    identity = identify(
        "models/pico", kv_dtype="auto", layers_per_group=4, prefill_device="cpu",
        decode_device="cpu",
    )  # fmt: skip
    config = KvStoreConfig(arena_dir=str(directory), arena_bytes=16 << 20, **options)  # type: ignore[arg-type]
    return KvStore(config, identity)


@pytest.fixture
def play(tmp_path: Path) -> Callable[[Scene], None]:
    """Runs a scene against a real store's socket."""
    store = new_store(tmp_path)
    opened = store.open(
        store_pb2.OpenStreamRequest(
            request_id="r", token_ids=range(PROMPT), max_new_tokens=5, epoch=7, attempt=ATTEMPT
        )
    )

    async def run(scene: Scene) -> None:
        ingest = Ingest(store, "tcp://127.0.0.1:*", "")
        task = asyncio.create_task(ingest.run())
        context = zmq.asyncio.Context()
        socket = context.socket(zmq.DEALER)
        socket.linger = 0
        socket.connect(ingest.address)
        try:
            await scene(Sender(store, socket, opened.slot))
            assert not task.done(), task.exception()
        finally:
            socket.close()
            context.term()
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            ingest.close()

    return lambda scene: asyncio.run(run(scene))


def refusal(answer: Message, code: Code) -> Refused:
    assert isinstance(answer, Refused), answer
    assert answer.code == code, answer
    return answer


def test_pages_are_stored_and_acknowledged(play: Callable[[Scene], None]) -> None:
    """In order, group by group; the same again changes nothing and is acknowledged too."""

    async def scene(sender: Sender) -> None:
        assert isinstance(await sender.send(), Ack)
        assert isinstance(await sender.send(first_block=1, blocks=2, tokens=150), Ack)
        assert sender.ready() == 150
        assert isinstance(await sender.send(), Ack)
        assert (sender.ready(0), sender.ready(1)) == (150, 0)
        status = await sender.send(Open)
        assert isinstance(status, Status)
        assert not status.first

    play(scene)


def test_a_hole_is_refused(play: Callable[[Scene], None]) -> None:
    """What follows lost pages would make them look complete: the answer says where to go on."""

    async def scene(sender: Sender) -> None:
        hole = refusal(await sender.send(first_block=1, tokens=128), Code.GAP)
        assert (hole.group, hole.tokens) == (0, 0)
        assert sender.ready() == 0
        refusal(await sender.send(First), Code.GAP)
        assert not StreamRecord(sender.store.arena, sender.slot).first()[1]
        assert isinstance(await sender.send(blocks=3, tokens=150), Ack)
        assert refusal(await sender.send(First), Code.GAP).group == 1
        assert isinstance(await sender.send(group=1, blocks=3, tokens=150), Ack)
        assert isinstance(await sender.send(First), Ack)
        assert StreamRecord(sender.store.arena, sender.slot).first()[1]

    play(scene)


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        ({"attempt": 7}, Code.STALE, "attempt: 7"),
        ({"attempt": 9}, Code.STALE, "attempt: 9"),
        ({"slot": 100_000}, Code.LAYOUT, "slot: 100000"),
        ({"group": 9}, Code.LAYOUT, "group 9"),
        ({"tokens": 0}, Code.LAYOUT, "end at 0"),
        ({"tokens": 200, "blocks": 4}, Code.LAYOUT, "tokens 200 "),
        ({"blocks": 3}, Code.LAYOUT, "3 blocks"),
        ({"first_block": 1, "blocks": 1}, Code.LAYOUT, "blocks"),
        ({"session": 9}, Code.HELLO, "session"),
        ({"kind": Ack, "slot": None, "attempt": None}, Code.LAYOUT, "ACK"),
        ({"kind": Fetch, "group": 0, "first_block": 0, "blocks": 1, "tokens": 64}, Code.GAP, "64"),
        ({"kind": Fetch, "group": 9, "first_block": 0, "blocks": 1}, Code.LAYOUT, "fetch"),
        ({"kind": Fetch, "group": 0, "first_block": 0, "blocks": 2**31}, Code.LAYOUT, "fetch"),
        ({"kind": Offer, "source": "nowhere", "group": 0, "tokens": 64, "source_slot": 0,
          "source_attempt": 1}, Code.UNAVAILABLE, "nowhere"),
    ],
    ids=str,
)  # fmt: skip
def test_what_cannot_be_taken_is_refused_in_words(
    play: Callable[[Scene], None], change: dict[str, object], code: Code, words: str
) -> None:
    """A fenced attempt's, or outside the stream: answered at once, nothing is stored, and the socket
    goes on."""

    async def scene(sender: Sender) -> None:
        fields = dict(change)
        kind = fields.pop("kind", Pages)
        if kind is Ack:
            await sender.hello()
            answer = await sender.ask(Ack(session=1, sequence=2))
        else:
            answer = await sender.send(kind, **fields)  # type: ignore[arg-type]
        assert words in refusal(answer, code).words
        assert sender.ready() == 0
        assert isinstance(await sender.send(), Ack)

    play(scene)


def test_a_stranger_is_asked_to_say_hello(play: Callable[[Scene], None]) -> None:
    """Also one that this store has known before it was restarted."""

    async def scene(sender: Sender) -> None:
        sender.greeted = True
        refusal(await sender.send(), Code.HELLO)
        await sender.hello()
        assert isinstance(await sender.send(), Ack)

    play(scene)


def test_frames_that_do_not_fit_are_refused(play: Callable[[Scene], None]) -> None:
    """Fewer frames or bytes than announced, or no header at all: each is answered."""

    async def scene(sender: Sender) -> None:
        await sender.hello()
        pages = Pages(
            session=1,
            slot=sender.slot,
            attempt=ATTEMPT,
            group=0,
            tokens=64,
            first_block=0,
            blocks=1,
        )
        for frames in ([], [b"x" * 256], [b"x" * 256, b"short"], [b"", b""]):
            refusal(await sender.ask(pages, frames), Code.LAYOUT)
        await sender.socket.send_multipart([b"junk"])
        answer = unpack((await sender.socket.recv_multipart())[0])
        refusal(answer, Code.CORRUPT)
        assert isinstance(await sender.send(), Ack)
        assert sender.ready() == 64

    play(scene)


def test_every_flipped_byte_of_a_message_is_noticed(play: Callable[[Scene], None]) -> None:
    """Header, row checksums and pages: it is refused and counted, and the words of the arena stay."""

    async def scene(sender: Sender) -> None:
        await sender.hello()
        pages = Pages(
            session=1, sequence=2, slot=sender.slot, attempt=ATTEMPT, group=0, tokens=64,
            first_block=0, blocks=1,
        )  # fmt: skip
        message = [pack(pages), *sender.frames(pages)]
        rng, noticed = np.random.default_rng(3), 0
        for part, frame in enumerate(message):
            for at in sorted(rng.choice(len(frame), min(len(frame), 60), replace=False)):
                damaged = bytearray(frame)
                damaged[at] ^= 1 << int(rng.integers(8))
                sent = [*message[:part], bytes(damaged), *message[part + 1 :]]
                await sender.socket.send_multipart(sent)
                answer = unpack((await sender.socket.recv_multipart())[0])
                assert isinstance(answer, Refused)
                assert sender.ready() == 0
                noticed += 1
                assert report.pages(sender.store, "").corrupt_messages == noticed
        assert isinstance(await sender.send(), Ack)
        assert report.pages(sender.store, "").corrupt_messages == noticed

    play(scene)


def test_a_window_smaller_than_two_pages_stops_the_store(tmp_path: Path) -> None:
    """By the name of the field."""
    store = new_store(tmp_path, ingest_bytes_inflight_max=1000)
    with pytest.raises(ConfigError, match=r"^ingest_bytes_inflight_max: "):
        Ingest(store, "tcp://127.0.0.1:*", "")


# --- anything at all ---

frames_of = st.lists(st.binary(max_size=600), max_size=3)
any_message = st.one_of([values(kind) for kind in MESSAGES])


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(any_message | st.binary(max_size=200), frames_of), max_size=6))
def test_no_message_whatever_ends_the_receiver(
    tmp_path: Path, messages: list[tuple[Message | bytes, list[bytes]]]
) -> None:
    """Well-formed headers with any numbers in them, from a peer that has been welcomed, and noise:
    nothing is raised, nothing is announced, and a good message is taken afterwards."""
    if not (tmp_path / "arena").exists():
        arenas.small_arena(tmp_path)
    arena = arenas.Arena(tmp_path)
    tokens = arenas.some_tokens(PROMPT)
    record = open_both(arena, tokens, range(blocks_for(PROMPT)), 0, attempt=ATTEMPT)
    medium = MemoryMedium()
    listener = medium.listen("store")
    store = endpoint(arena, medium, listener, Clock(virtual=True), Setting())
    before = record.ready(0), record.ready(1), record.first()
    connection = medium.connect("store")
    hello = Hello(**vars(hello_of(arena.plan)) | {"session": 2**64 - 1, "client": b"x" * 16})
    connection.send([pack(hello)])
    for message, frames in messages:
        if isinstance(message, Message):
            object.__setattr__(message, "session", 2**64 - 1)
        head = pack(message) if isinstance(message, Message) else message
        connection.send([head, *frames])
    connection.send([])
    for _ in range(3):
        store.turn()
    assert (record.ready(0), record.ready(1), record.first()) == before
    connection.send([pack(Open(session=2**64 - 1, sequence=9, slot=0, attempt=ATTEMPT))])
    store.turn()
    answers = []
    while (answer := connection.receive()) is not None:
        answers.append(unpack(answer[0]))
    assert isinstance(answers[-1], Status)
