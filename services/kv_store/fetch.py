"""Cached blocks of other stores, copied into this one's arena by their keys: so a prompt's blocks that a
decode has written on another host are found where prefill needs them.

    LOOKUP keys -> LOAN n   the leading n blocks stay where they are, on loan
    FETCH -> CONTENT ...    pages and row checksums, under a checksum of the whole message
    RETURN                  the loan is over; without a word it ends by itself

The tokens are not known here, so rows cannot be verified against them: whoever attaches to the blocks
does that. What is checked here is that they are what the other store sealed.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from services.kv.arena import Arena
from services.kv.layout import PAGE_TOKENS
from services.kv.runs import ROW_SUMS_BYTES, checksum_of, copy_runs
from services.ops import log
from services.ops.errors import BatonError, CorruptKv, Unavailable
from services.wire.client import Client
from services.wire.push import DAMAGED_MAX, Cancelled
from services.wire.session import RETRY_S, Exchange, Request
from services.wire.stream import (
    FRAME_BYTES_MAX,
    Ack,
    Content,
    Fetch,
    Loan,
    Lookup,
    Message,
    Return,
)

_logger = log.get("fetch")
KEYS_MAX = 4096  # of one fetch
SHUN_S = 1.0  # a store that did not answer is not asked for so long: an open does not wait for it


@dataclass(frozen=True)
class _Piece:
    group: int
    first: int
    count: int


class KeyFetch(Exchange):
    """Fills `blocks` of the arena with what the store has under the leading `keys`. They are its own to
    write until it is over."""

    def __init__(
        self, arena: Arena, keys: Sequence[bytes], blocks: Sequence[int],
        frame_bytes_max: int = FRAME_BYTES_MAX,
    ) -> None:  # fmt: skip
        assert len(blocks) >= len(keys) > 0
        super().__init__()
        self._arena, self._keys = arena, list(keys)
        self._blocks = np.array(blocks[: len(keys)], np.uint32)
        self._per_piece = max(1, frame_bytes_max // arena.layout.page_bytes)
        self._loan = 0
        self._stage = _LOOKUP
        self._todo: deque[_Piece] = deque()
        self._missing: set[_Piece] = set()
        self._have = np.zeros((arena.layout.groups, len(keys)), bool)
        self.damaged = 0

    @property
    def leading(self) -> int:
        """How many leading blocks are complete in every group, and sealed."""
        missing = np.flatnonzero(~self._have.all(axis=0))
        return int(missing[0]) if len(missing) else len(self._keys)

    @property
    def done(self) -> bool:
        return self._stage == _DONE

    def next(self, room_bytes: int) -> Request | None:
        if self._stage == _LOOKUP:
            self._stage = _LOOKED
            keys = b"".join(self._keys)
            return Request(Lookup(), lambda: [keys])
        if self._stage == _RETURN:
            self._stage = _RETURNED
            return Request(Return(loan=self._loan))
        if not self._todo:
            return None
        piece = self._todo[0]
        payload = piece.count * (self._arena.layout.page_bytes + ROW_SUMS_BYTES)
        if payload > room_bytes:
            return None
        self._todo.popleft()
        fetch = Fetch(
            loan=self._loan, group=piece.group, first_block=piece.first, blocks=piece.count
        )
        return Request(fetch, payload_bytes=payload)

    def answered(self, sent: Request, answer: Message, frames: Sequence[memoryview]) -> None:
        message = sent.message
        if isinstance(message, Lookup) and isinstance(answer, Loan):
            self._borrowed(answer)
        elif isinstance(message, Return) and isinstance(answer, Ack):
            self._stage = _DONE
        elif isinstance(message, Fetch):
            piece = _Piece(message.group, message.first_block, message.blocks)
            if isinstance(answer, Content) and self._intact(answer, piece, frames):
                self._store(piece, frames)
            elif piece in self._missing:
                self._again(piece)
        else:
            self.fail(Unavailable(f"stream: {answer} is no answer"))

    def _borrowed(self, loan: Loan) -> None:
        self._loan, found = loan.loan, min(loan.blocks, len(self._keys))
        self._stage = _DONE if not loan.loan or not found else _FETCHING
        for first in range(0, found, self._per_piece):
            for group in range(self._arena.layout.groups):
                piece = _Piece(group, first, min(self._per_piece, found - first))
                self._todo.append(piece)
                self._missing.add(piece)

    def _intact(self, content: Content, piece: _Piece, frames: Sequence[memoryview]) -> bool:
        sizes = [len(frame) for frame in frames]
        want = [piece.count * ROW_SUMS_BYTES, piece.count * self._arena.layout.page_bytes]
        whole = bool(sizes) and [sizes[0], sum(sizes[1:])] == want
        return whole and checksum_of(frames) == content.checksum

    def _store(self, piece: _Piece, frames: Sequence[memoryview]) -> None:
        if piece not in self._missing:
            return
        self._missing.discard(piece)
        span = slice(piece.first, piece.first + piece.count)
        blocks = self._blocks[span]
        copy_runs(self._arena, piece.group, blocks, frames[1:])
        pages = blocks + np.uint32(piece.group * self._arena.plan.blocks)
        sums = np.frombuffer(frames[0], np.uint32).reshape(-1, PAGE_TOKENS)
        self._arena.headers["row_crc"][pages] = sums
        for page, key in zip(pages.tolist(), self._keys[span], strict=True):
            self._arena.native.seal(page, piece.group, PAGE_TOKENS, key)
        self._have[piece.group, span] = True
        if not self._missing:
            self._stage = _RETURN

    def _again(self, piece: _Piece) -> None:
        self.damaged += 1
        if self.damaged >= DAMAGED_MAX:
            self.fail(CorruptKv(f"fetch: {DAMAGED_MAX} messages came damaged"))
        self._todo.appendleft(piece)

    def restart(self) -> None:
        """A loan is not bound to a session; should the store be another, it says that it has ended."""
        self._stage = {_LOOKED: _LOOKUP, _RETURNED: _RETURN}.get(self._stage, self._stage)
        self._todo = deque(sorted(self._missing, key=lambda piece: (piece.first, piece.group)))

    def unanswered(self, now: float, quiet_s: float) -> None:
        if quiet_s >= RETRY_S and any(now - s.at >= RETRY_S for s in self.inflight.values()):
            self.inflight.clear()
            self.restart()


_LOOKUP, _LOOKED, _FETCHING, _RETURN, _RETURNED, _DONE = range(6)


@dataclass
class PeerCaches:
    """The caches of other stores. `poke` sees to it that somebody polls `client` soon."""

    arena: Arena
    client: Client
    poke: Callable[[], None]
    clock: Callable[[], float] = time.monotonic
    blocks_fetched: int = 0
    corrupt: int = 0  # messages that came damaged
    _shunned: dict[str, float] = field(default_factory=dict)  # address -> until when

    def at(self, addresses: Sequence[str]) -> PeerSource:
        return PeerSource(self, list(addresses))

    async def fetch(self, address: str, keys: Sequence[bytes], blocks: Sequence[int]) -> int:
        """How many leading blocks could be had from there, sealed."""
        now = self.clock()
        self._shunned = {a: until for a, until in self._shunned.items() if until > now}
        if address in self._shunned:
            return 0
        exchange = KeyFetch(self.arena, keys[:KEYS_MAX], blocks)
        over = asyncio.Event()
        try:
            self.client.begin(address, exchange, lambda _: over.set())
            self.poke()
            await over.wait()
        except BatonError as error:
            exchange.fail(error)
        finally:
            exchange.fail(Cancelled("fetch: cancelled"))  # it writes no more, whatever comes
        if exchange.error is not None:
            self._shunned[address] = self.clock() + SHUN_S
            _logger.warning("fetch failed", peer=address, reason=exchange.error.message)
        self.blocks_fetched += exchange.leading
        self.corrupt += exchange.damaged
        return exchange.leading


@dataclass(frozen=True)
class PeerSource:
    """Some stores' caches as a source of prefixes, one after the other."""

    caches: PeerCaches
    addresses: list[str]

    async def load(self, keys: Sequence[bytes], blocks: Sequence[int]) -> int:
        """Copies the blocks named by the leading keys into these arena blocks, checksums verified,
        sealed; gives how many leading ones it could. Never raises for a miss."""
        have = 0
        for address in self.addresses:
            if have < len(keys):
                have += await self.caches.fetch(address, keys[have:], blocks[have:])
        return have
