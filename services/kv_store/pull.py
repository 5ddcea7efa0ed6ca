"""Pages that a prefill has offered: fetched by this store, out of the arena of prefill's own store, and
landed as if they had been pushed. The offer is acknowledged when its pages are in."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from services.kv.layout import PAGE_TOKENS, blocks_for
from services.kv.record import StreamRecord
from services.kv.runs import ROW_SUMS_BYTES
from services.kv_store.landing import Landing, NotTaken
from services.ops.errors import BatonError, CorruptKv, StaleEpoch
from services.wire.client import Client
from services.wire.push import DAMAGED_MAX
from services.wire.session import RETRY_S, Buffer, Exchange, Request, Tracker, code_of
from services.wire.stream import (
    FRAME_BYTES_MAX,
    Ack,
    Code,
    Content,
    Fetch,
    Message,
    Offer,
    Refused,
)

OFFERS_MAX = 1024  # waiting for one layer group of one stream


class Answer(Protocol):
    def __call__(
        self, peer: bytes, asked: Message, answer: Message, frames: Sequence[Buffer] = ()
    ) -> Tracker | None: ...


Wake = Callable[[str, int, int, int, int], None]


@dataclass
class _Waiting:
    peer: bytes
    offer: Offer


class Pull(Exchange):
    """All that has been offered of one stream and is not here yet."""

    def __init__(
        self, landing: Landing, record: StreamRecord, offer: Offer, stored: Stored
    ) -> None:
        super().__init__()
        self._landing, self._record, self._stored = landing, record, stored
        self.source = offer
        layout = record.arena.layout
        self._page_bytes = layout.page_bytes
        self.have = [record.ready(group)[1] for group in range(layout.groups)]
        self._asked = list(self.have)
        self.offered = list(self.have)
        self._back_until = [0] * layout.groups
        self._damaged: dict[tuple[int, int], int] = {}

    def offer(self, group: int, tokens: int) -> None:
        self.offered[group] = max(self.offered[group], tokens)

    @property
    def done(self) -> bool:
        return all(have >= offered for have, offered in zip(self.have, self.offered, strict=True))

    def next(self, room_bytes: int) -> Request | None:
        for group, asked in enumerate(self._asked):
            if asked >= self.offered[group]:
                continue
            begin, block_bytes = asked // PAGE_TOKENS, self._page_bytes + ROW_SUMS_BYTES
            most = max(1, FRAME_BYTES_MAX // self._page_bytes)
            left = blocks_for(self.offered[group]) - begin
            count = min(left, most, room_bytes // block_bytes)
            if count < 1:
                return None
            upto = min(self.offered[group], (begin + count) * PAGE_TOKENS)
            self._asked[group] = upto
            fetch = Fetch(
                slot=self.source.source_slot, attempt=self.source.source_attempt, group=group,
                tokens=upto, first_block=begin, blocks=count,
            )  # fmt: skip
            return Request(fetch, payload_bytes=count * block_bytes)
        return None

    def answered(self, sent: Request, answer: Message, frames: Sequence[memoryview]) -> None:
        fetch = sent.message
        assert isinstance(fetch, Fetch)
        if not isinstance(answer, Content):
            self._go_back(fetch)
            return
        try:
            self._land(fetch, frames)
        except NotTaken as error:
            if error.code is Code.CORRUPT:
                self._count_damage(error)
            self._go_back(fetch)
        except BatonError as error:
            self.fail(error)

    def _land(self, fetch: Fetch, frames: Sequence[memoryview]) -> None:
        attempt = self.source.attempt
        self._landing.record(self.source.slot, attempt)
        self._landing.pages(
            self._record, attempt, fetch.group, fetch.first_block, fetch.tokens, frames
        )
        self.have[fetch.group] = self._record.ready(fetch.group)[1]
        self._stored(fetch.group, self.have[fetch.group])

    def _count_damage(self, error: NotTaken) -> None:
        place = (error.group, error.tokens)
        self._damaged[place] = self._damaged.get(place, 0) + 1
        if self._damaged[place] >= DAMAGED_MAX:
            self.fail(CorruptKv(error.words, blocks=[error.block]))

    def _go_back(self, fetch: Fetch) -> None:
        """Asks again from what is here; once for all that were on their way."""
        group = fetch.group
        if fetch.sequence > self._back_until[group]:
            self._back_until[group] = max([fetch.sequence, *self.inflight])
            self._asked[group] = min(self._asked[group], self.have[group])

    def restart(self) -> None:
        self._asked = list(self.have)

    def unanswered(self, now: float, quiet_s: float) -> None:
        """All that is on its way is asked for again."""
        old = [n for n, sent in self.inflight.items() if now - sent.at >= RETRY_S]
        if quiet_s >= RETRY_S and old:
            self.inflight.clear()
            self.restart()


Stored = Callable[[int, int], None]


@dataclass
class Pulls:
    """One pull for each stream that pages are offered for."""

    client: Client
    landing: Landing
    answer: Answer
    wake: Wake
    open: dict[tuple[int, int], Pull] = field(default_factory=dict)
    _waiting: dict[tuple[int, int], dict[int, list[_Waiting]]] = field(default_factory=dict)

    def offer(self, peer: bytes, offer: Offer) -> None:
        """Raises LayoutMismatch, StaleEpoch, Unavailable; else answers when the pages are here, or
        cannot be had."""
        record = self.landing.record(offer.slot, offer.attempt)
        self.landing.check_place(record, offer.group, offer.tokens)
        if record.ready(offer.group)[1] >= offer.tokens:
            self.answer(peer, offer, Ack())
            return
        key = (offer.slot, offer.attempt)
        if key not in self.open:
            self.open[key] = self._begin(record, offer)
        waiting = self._waiting.setdefault(key, {}).setdefault(offer.group, [])
        waiting.append(_Waiting(peer, offer))
        del waiting[:-OFFERS_MAX]
        self.open[key].offer(offer.group, offer.tokens)

    def _begin(self, record: StreamRecord, offer: Offer) -> Pull:
        key = (offer.slot, offer.attempt)
        pull = Pull(self.landing, record, offer, lambda group, have: self._stored(key, group, have))
        self.client.begin(offer.source, pull, lambda _: self._over(key, pull))
        return pull

    def _stored(self, key: tuple[int, int], group: int, have: int) -> None:
        groups = self._waiting.get(key, {})
        waiting = groups.pop(group, [])
        if left := [one for one in waiting if one.offer.tokens > have]:
            groups[group] = left
        for one in waiting:
            if one.offer.tokens <= have:
                self.answer(one.peer, one.offer, Ack())
        if waiting:
            self.wake(waiting[-1].offer.announce, *key, group, have)

    def _over(self, key: tuple[int, int], pull: Pull) -> None:
        """Achieved, and more may be offered; or failed, and whoever waits is told why."""
        if self.open.get(key) is not pull:
            return
        del self.open[key]
        for waiting in itertools.chain(*self._waiting.pop(key, {}).values()):
            if pull.error is not None:
                code = code_of(pull.error)
                code = Code.UNAVAILABLE if code is Code.CORRUPT else code
                refused = Refused(code=code, group=waiting.offer.group, words=pull.error.message)
                self.answer(waiting.peer, waiting.offer, refused)

    def tick(self) -> None:
        """Ends the pulls of streams that have been closed or fenced."""
        for (slot, attempt), pull in self.open.items():
            try:
                self.landing.record(slot, attempt)
            except StaleEpoch as error:
                pull.fail(error)
