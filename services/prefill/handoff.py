"""How computed KV leaves prefill: one interface, whatever lies beneath.

`LocalHandoff`: decode maps the same arena. The pages are where they must be; the record's words say
how far they are complete, and ZeroMQ only wakes.

`RemoteHandoff`: decode sits in another arena. Runs of whole pages go out straight from this arena's
memory, or are offered to the other store to fetch; they stay leased until it has acknowledged them. A
thread of its own sends them, so computing never waits for the network.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from services.kv.record import StreamRecord
from services.kv.runs import read_pages
from services.ops.errors import BatonError, StaleEpoch
from services.prefill.transfer import Carrier
from services.wire.push import OfferedPush, Push, Target
from services.wire.session import Buffer
from services.wire.stream import FRAME_BYTES_MAX, Announce, pack

Ended = Callable[[BatonError | None], None]
Notify = Callable[[str, bytes], None]


class Handoff(Protocol):
    """Where a prefill's results go. Raises StaleEpoch when this attempt has been fenced, and whatever
    the transfer has failed with."""

    announce: str  # the decode to wake; may change while prefill runs

    def ready(self, group: int, tokens: int) -> None:
        """Tokens up to `tokens` of this layer group are complete in this worker's pages."""
        ...

    def first(self, token: int, logprob: float) -> None: ...

    def end(self, ended: Ended, *, cancel: bool = False) -> None:
        """Nothing more will come. `ended` is called once nobody needs this worker's pages any more, on
        any thread, with the error if it has failed; at `cancel` as soon as nothing reads them."""
        ...

    def cancel(self) -> None:
        """Takes back what is still on its way, after `end` too. From any thread."""
        ...


@dataclass
class LocalHandoff:
    """Announces in the shared arena; an empty `announce` wakes nobody."""

    record: StreamRecord
    attempt: int
    fingerprint: bytes
    notify: Notify
    announce: str = ""

    def ready(self, group: int, tokens: int) -> None:
        if not self.record.set_ready(group, self.attempt, tokens):
            raise StaleEpoch(f"attempt: {self.attempt} has been fenced")
        self._wake(group, tokens)

    def first(self, token: int, logprob: float) -> None:
        if not self.record.publish_first(self.attempt, token, logprob):
            raise StaleEpoch(f"attempt: {self.attempt} has been fenced")
        self._wake(0, self.record.number("prompt_tokens"))

    def end(self, ended: Ended, *, cancel: bool = False) -> None:
        ended(None)

    def cancel(self) -> None:
        return

    def _wake(self, group: int, tokens: int) -> None:
        if not self.announce:
            return
        announce = Announce(
            slot=self.record.slot, attempt=self.attempt, group=group, tokens=tokens,
            fingerprint=self.fingerprint,
        )  # fmt: skip
        self.notify(self.announce, pack(announce))


@dataclass(frozen=True)
class Destination:
    """The same stream at decode's store. `source` is where that store can fetch from this arena's; if
    it is empty, pages are pushed."""

    ingest: str
    slot: int
    attempt: int
    source: str = ""


def push_of(
    record: StreamRecord, attempt: int, to: Destination, frame_bytes_max: int = FRAME_BYTES_MAX
) -> Push:
    """The transfer of a prefill's stream out of its arena, whose `ready` is still to be told."""
    arena = record.arena
    target = Target(
        slot=to.slot, attempt=to.attempt, groups=arena.layout.groups,
        page_bytes=arena.layout.page_bytes, prompt_tokens=record.number("prompt_tokens"),
    )  # fmt: skip
    if to.source:
        return OfferedPush(target, to.source, record.slot, attempt)

    def read(group: int, first_block: int, blocks: int) -> Sequence[Buffer]:
        table = np.array(record.prefill_table[first_block : first_block + blocks])
        return read_pages(arena, group, table)

    return Push(target, read, frame_bytes_max)


class RemoteHandoff:
    """Sends pages to another arena's store, after announcing them in this one for reuse. `announce`
    wakes nobody here: the other store does."""

    def __init__(
        self, local: LocalHandoff, push: Push, to: Destination, transfers: Carrier
    ) -> None:
        self._local, self._push, self._transfers = local, push, transfers
        self.announce = ""
        transfers.begin(to.ingest, push)

    def ready(self, group: int, tokens: int) -> None:
        self._local.ready(group, tokens)
        self._check()
        self._transfers.ready(self._push, group, tokens, self.announce)

    def first(self, token: int, logprob: float) -> None:
        self._local.first(token, logprob)
        self._check()
        self._transfers.first(self._push, token, logprob, self.announce)

    def _check(self) -> None:
        if self._push.given_up is not None:
            raise self._push.given_up

    def end(self, ended: Ended, *, cancel: bool = False) -> None:
        if cancel:
            self.cancel()
        self._transfers.end(self._push, ended)

    def cancel(self) -> None:
        self._transfers.cancel(self._push)
