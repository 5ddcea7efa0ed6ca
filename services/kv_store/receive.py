"""A store's side of the KV stream: takes each message, answers each message, refuses with words.

It knows the arena, the records and who may write them; it knows no socket. What it cannot take leaves
nothing behind: the words of the records move only behind rows that have been verified.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from services.kv.arena import Arena
from services.kv.identity import KEY_BYTES
from services.kv.layout import blocks_for
from services.kv.runs import ROW_SUMS_BYTES, checksum_of, read_pages
from services.kv_store.landing import Landing, NotTaken
from services.kv_store.loans import BLOCKS_MAX, Loans
from services.kv_store.pull import Pulls
from services.ops import log
from services.ops.errors import BatonError, CorruptKv, LayoutMismatch, StaleEpoch, Unavailable
from services.wire.client import Client
from services.wire.session import Buffer, Tracker, code_of, hello_of
from services.wire.stream import (
    FRAME_BYTES_MAX,
    Ack,
    Announce,
    Code,
    Content,
    Fetch,
    First,
    Hello,
    Loan,
    Lookup,
    Message,
    Offer,
    Open,
    Pages,
    Refused,
    Return,
    Status,
    Welcome,
    ids,
    number,
    pack,
    unpack,
)

_logger = log.get("ingest")
ACKS_MAX = 4  # requests of a peer that are acknowledged together
ACK_SPAN = 64  # their numbers are at most so far apart
FORGET_S = 30.0  # a peer without a word for this long has to introduce itself again
WINDOW_BYTES_MAX = 16 << 20  # granted to one peer

Reply = Callable[[bytes, Sequence[Buffer]], Tracker | None]
Notify = Callable[[str, bytes], None]


class Cache(Protocol):
    """What is lent to other stores."""

    def borrow(self, keys: Sequence[bytes]) -> list[int]:
        """The blocks of the leading keys, held until each is given back."""
        ...

    def give_back(self, block: int) -> None: ...


@dataclass
class _Peer:
    client: bytes
    session: int
    window_bytes: int
    heard_at: float


@dataclass
class Counts:
    """What has come since the start."""

    messages: int = 0
    refused: dict[str, int] = field(default_factory=dict)  # by name of the code
    corrupt_headers: int = 0  # of messages that were refused for it
    content_bytes: int = 0


class Receiver:
    """`inflight_bytes_max` bounds what all peers together may have on its way to this store."""

    def __init__(
        self, arena: Arena, cache: Cache, *, reply: Reply, notify: Notify, client: Client,
        inflight_bytes_max: int, verify: bool = True, clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self._arena, self._cache = arena, cache
        self._reply, self._notify, self._clock = reply, notify, clock
        self._inflight_bytes_max = inflight_bytes_max
        self._peers: dict[bytes, _Peer] = {}
        self._acks: dict[bytes, list[Message]] = {}  # by peer, for one turn at most
        self.hello = hello_of(arena.plan)
        self.landing = Landing(arena, verify=verify)
        self.loans = Loans(cache.give_back)
        self.pulls = Pulls(client, self.landing, self._answer, self._wake)
        self.counts = Counts()

    def handle(self, peer: bytes, frames: Sequence[memoryview]) -> None:
        """One message of a peer. Never raises for what came."""
        self.counts.messages += 1
        try:
            message = unpack(frames[0] if frames else b"")
        except CorruptKv as error:  # whose it was cannot be told: its sender will ask
            self.counts.corrupt_headers += 1
            self._refuse(peer, Message(), Code.CORRUPT, error.message)
            return
        except BatonError as error:
            session, _ = ids(frames[0])
            self._refuse(peer, Message(session=session), code_of(error), error.message)
            return
        try:
            self._take(peer, message, frames[1:])
        except NotTaken as error:
            again = {"group": error.group, "tokens": error.tokens, "block": error.block}
            self._refuse(peer, message, error.code, error.words, **again)
        except BatonError as error:
            self._refuse(peer, message, code_of(error), error.message)

    def _refuse(
        self, peer: bytes, message: Message, code: Code, words: str, **again: int
    ) -> None:  # fmt: skip
        self.counts.refused[code.name] = self.counts.refused.get(code.name, 0) + 1
        if code is not Code.HELLO:
            _logger.warning("stream message refused", code=code.name, reason=words)
        refused = Refused(code=code, words=words[:512], **again)
        self._answer(peer, message, refused)

    def _answer(
        self, peer: bytes, asked: Message, answer: Message, frames: Sequence[Buffer] = ()
    ) -> Tracker | None:
        if isinstance(answer, Ack):
            self._acknowledge(peer, asked)
            return None
        self._flush(peer)  # answers go out in order
        number(answer, asked.session, asked.sequence)
        return self._reply(peer, [pack(answer), *frames])

    def _acknowledge(self, peer: bytes, asked: Message) -> None:
        """Together with what follows at once."""
        waiting = self._acks.get(peer)
        if waiting and not waiting[-1].sequence < asked.sequence <= waiting[0].sequence + ACK_SPAN:
            self._flush(peer)
        waiting = self._acks.setdefault(peer, [])
        waiting.append(asked)
        if len(waiting) == ACKS_MAX:
            self._flush(peer)

    def _flush(self, peer: bytes) -> None:
        waiting = self._acks.pop(peer, None)
        if waiting:
            *earlier, last = waiting
            ack = Ack(before=sum(1 << last.sequence - 1 - one.sequence for one in earlier))
            number(ack, last.session, last.sequence)
            self._reply(peer, [pack(ack)])

    def flush(self) -> None:
        """Acknowledges what has been stored; comes at the end of each turn."""
        for peer in list(self._acks):
            self._flush(peer)

    def _take(self, peer: bytes, message: Message, frames: Sequence[memoryview]) -> None:
        if isinstance(message, Hello):
            self._hello(peer, message)
            return
        known = self._peers.get(peer)
        if known is None or known.session != message.session:
            self._refuse(peer, message, Code.HELLO, "session: not known here, say hello")
            return
        known.heard_at = self._clock()
        if isinstance(message, Pages):
            self._pages(peer, message, frames)
        elif isinstance(message, First):
            self._first(peer, message)
        elif isinstance(message, Open):
            self._open(peer, message)
        elif isinstance(message, Offer):
            self.pulls.offer(peer, message)
        elif isinstance(message, Fetch):
            self._fetch(peer, message)
        elif isinstance(message, Lookup):
            self._lookup(peer, message, frames)
        elif isinstance(message, Return):
            self.loans.end(message.loan)
            self._answer(peer, message, Ack())
        else:
            raise LayoutMismatch(f"stream: {message.kind.name} is not for a store")

    # --- sessions ---

    def _hello(self, peer: bytes, hello: Hello) -> None:
        """The same session again is welcomed again; an older one is a ghost."""
        for name in ("layout", "codec", "fingerprint"):
            theirs, mine = getattr(hello, name), getattr(self.hello, name)
            if theirs != mine:
                if isinstance(theirs, bytes):
                    theirs, mine = theirs.hex(), mine.hex()
                raise LayoutMismatch(f"{name}: the peer has {theirs}, this store {mine}")
        mine = {name: p for name, p in self._peers.items() if p.client == hello.client}
        if any(p.session > hello.session for p in mine.values()):
            return
        known = self._peers.get(peer)
        if known is None or known.session < hello.session:
            for name in mine:  # connections that it does not have any more
                del self._peers[name]
            window = self._grant()
            known = _Peer(hello.client, hello.session, window, self._clock())
            self._peers[peer] = known
        self._answer(peer, hello, Welcome(window_bytes=known.window_bytes))

    def _grant(self) -> int:
        """What is left of the bound, at most WINDOW_BYTES_MAX. Raises NotTaken when that does not hold
        two pages, after peers that have been quiet have lost theirs."""
        least = 2 * (self._arena.layout.page_bytes + ROW_SUMS_BYTES)
        most = max(least, min(WINDOW_BYTES_MAX, self._inflight_bytes_max))
        for name in sorted(self._peers, key=lambda name: self._peers[name].heard_at):
            quiet_s = self._clock() - self._peers[name].heard_at
            if self._room() >= most or quiet_s < 1.0:
                break
            del self._peers[name]
        window = min(most, self._room())
        if window < least:
            words = f"ingest_bytes_inflight_max: {len(self._peers)} peers use it all"
            raise NotTaken(Code.BUSY, 0, 0, words)
        return window

    def _room(self) -> int:
        return self._inflight_bytes_max - sum(p.window_bytes for p in self._peers.values())

    @property
    def idle(self) -> bool:
        """Nothing is on its way in, and nothing is lent."""
        return not self.pulls.open and self.loans.idle

    def tick(self) -> None:
        """Forgets peers and loans that nobody has spoken of in a long time."""
        now = self._clock()
        for name in [n for n, p in self._peers.items() if now - p.heard_at > FORGET_S]:
            del self._peers[name]
        self.loans.tick(now)
        self.pulls.tick()

    # --- streams ---

    def _open(self, peer: bytes, message: Open) -> None:
        record = self.landing.record(message.slot, message.attempt)
        groups = range(self._arena.layout.groups)
        ready = np.array([record.ready(group)[1] for group in groups], np.uint32)
        first = int(record.first()[1])
        answer = Status(slot=message.slot, attempt=message.attempt, first=first)
        self._answer(peer, message, answer, [ready.tobytes()])

    def _pages(self, peer: bytes, message: Pages, frames: Sequence[memoryview]) -> None:
        record = self.landing.record(message.slot, message.attempt)
        if message.first_block + message.blocks != blocks_for(message.tokens):
            raise LayoutMismatch(f"pages: {message.blocks} blocks do not end at {message.tokens}")
        self.landing.pages(
            record, message.attempt, message.group, message.first_block, message.tokens, frames
        )
        self._answer(peer, message, Ack())
        self._wake(message.announce, message.slot, message.attempt, message.group, message.tokens)

    def _first(self, peer: bytes, message: First) -> None:
        record = self.landing.record(message.slot, message.attempt)
        self.landing.first(record, message.attempt, message.token, message.logprob)
        self._answer(peer, message, Ack())
        prompt = record.number("prompt_tokens")
        self._wake(message.announce, message.slot, message.attempt, 0, prompt)

    def _wake(self, address: str, slot: int, attempt: int, group: int, tokens: int) -> None:
        """Tells the waiting decode; a lost wake costs it one look at the arena."""
        if address.startswith(("tcp://", "ipc://")):
            announce = Announce(
                slot=slot, attempt=attempt, group=group, tokens=tokens,
                fingerprint=self.hello.fingerprint,
            )  # fmt: skip
            self._notify(address, pack(announce))

    # --- pages for other stores ---

    def _fetch(self, peer: bytes, message: Fetch) -> None:
        """Sent out of this arena without a copy. A stream's pages stay leased because its prefill goes
        on until it has been acknowledged; should it die, the checksums tell."""
        last = message.first_block + message.blocks
        most = max(1, FRAME_BYTES_MAX // self._arena.layout.page_bytes)
        if message.group >= self._arena.layout.groups or not 0 < message.blocks <= most:
            raise LayoutMismatch(f"fetch: group {message.group}, {message.blocks} blocks")
        if message.loan:
            table = np.array(self.loans.use(message.loan, self._clock())[:last], np.uint32)
            if len(table) < last:
                raise Unavailable(
                    f"loan: {message.loan} has ended, or is shorter than {last} blocks"
                )
        else:
            table = self._stream_table(message, last)
        blocks = table[message.first_block : last]
        frames = read_pages(self._arena, message.group, blocks)
        checksum = checksum_of(frames) if message.loan else 0
        content = Content(
            group=message.group, first_block=message.first_block, blocks=message.blocks,
            checksum=checksum,
        )  # fmt: skip
        tracker = self._answer(peer, message, content, frames)
        self.counts.content_bytes += message.blocks * self._arena.layout.page_bytes
        if message.loan:
            self.loans.sending(message.loan, tracker)

    def _stream_table(self, message: Fetch, last: int) -> np.ndarray:
        record = self.landing.record(message.slot, message.attempt)
        owner, have = record.ready(message.group)
        if owner != message.attempt:
            raise StaleEpoch(f"attempt: {message.attempt} has been fenced")
        if message.tokens > have or last > blocks_for(message.tokens):
            words = f"group {message.group}: {message.tokens} tokens are not complete"
            raise NotTaken(Code.GAP, message.group, have, words)
        return np.array(record.prefill_table[:last])

    def _lookup(self, peer: bytes, message: Lookup, frames: Sequence[memoryview]) -> None:
        """The leading keys that are cached here, lent under a number."""
        if (
            len(frames) != 1
            or len(frames[0]) % KEY_BYTES
            or len(frames[0]) > BLOCKS_MAX * KEY_BYTES
        ):
            raise LayoutMismatch("lookup: not a frame of keys")
        data = bytes(frames[0])
        keys = [data[at : at + KEY_BYTES] for at in range(0, len(data), KEY_BYTES)]
        blocks = self._cache.borrow(keys)
        number = self.loans.lend(blocks, self._clock())
        self._answer(peer, message, Loan(loan=number, blocks=len(blocks) if number else 0))
