"""Prefill's part of a transfer: pages of one stream to another arena's store, layer group by layer
group, or the offer of them. Pure but for reading the pages it sends.

Each group is a line of its own, sent in order; whatever turns out to be missing is sent again from
there (go back N), and the others go on:

    group g:   | stored | sent, unanswered | complete here | not computed |
               0        ^ a gap or a damaged message sets `sent` back to what the store has
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum

import numpy as np

from services.kv.layout import PAGE_TOKENS, blocks_for
from services.kv.runs import ROW_SUMS_BYTES
from services.ops.errors import BatonError, CorruptKv, Unavailable
from services.wire.session import RETRY_S, Buffer, Exchange, Request
from services.wire.stream import (
    FRAME_BYTES_MAX,
    Ack,
    Code,
    First,
    Message,
    Offer,
    Open,
    Pages,
    Refused,
    Status,
)

DAMAGED_MAX = (
    16  # times that one place may arrive damaged before its source is not believed any more
)

Read = Callable[[int, int, int], Sequence[Buffer]]  # (group, first block, blocks) -> frames


class Stage(Enum):
    UNSENT = 0
    SENT = 1
    STORED = 2


@dataclass(frozen=True)
class Target:
    """A stream at the receiving store: its record there, and its shape."""

    slot: int
    attempt: int
    groups: int
    page_bytes: int
    prompt_tokens: int


class Push(Exchange):
    """`read` gives the row checksums and the runs of whole pages; it is called when they are sent."""

    def __init__(self, target: Target, read: Read, frame_bytes_max: int = FRAME_BYTES_MAX) -> None:
        super().__init__()
        self.target, self._read = target, read
        self._frame_bytes_max = frame_bytes_max
        self.announce = ""  # the decode to wake; may change on the way
        self.given_up: BatonError | None = None  # nobody tries again
        self.complete = [0] * target.groups  # tokens that may be sent
        self.sent = [0] * target.groups
        self.stored = [0] * target.groups
        self._furthest = [0] * target.groups
        self._back_until = [0] * target.groups  # refusals of messages up to this one are old news
        self._damaged: dict[tuple[int, int], int] = {}
        self._first: tuple[int, float] | None = None
        self._first_stage = Stage.UNSENT
        self._known = False  # how far the store has it
        self._ask = True
        self.messages_sent = self.sent_again = 0

    # --- what there is to send ---

    def ready(self, group: int, tokens: int) -> None:
        """Tokens up to `tokens` of this layer group are complete in the pages that `read` reads."""
        self.complete[group] = max(self.complete[group], tokens)

    def first(self, token: int, logprob: float) -> None:
        self._first = (token, logprob)

    def cancel(self) -> None:
        """Nobody wants it any more, and it is not tried again."""
        waits = self.error is None or isinstance(self.error, Unavailable)
        if not self.done and self.given_up is None and waits:
            self.error = Cancelled("stream: cancelled")

    def try_again(self) -> None:
        """What it has failed with may pass: it begins anew, and asks how far the store is."""
        assert self.error is not None
        self.error = None
        self.inflight.clear()
        self.restart()

    @property
    def done(self) -> bool:
        return self._first_stage is Stage.STORED and min(self.stored) >= self.target.prompt_tokens

    # --- sending ---

    def next(self, room_bytes: int) -> Request | None:
        t = self.target
        if self._ask:
            self._ask = False
            return Request(Open(slot=t.slot, attempt=t.attempt))
        if not self._known:
            return None
        for group in range(t.groups):
            if self.sent[group] < self.complete[group]:
                return self._part(group, room_bytes)
        if self._first and self._first_stage is Stage.UNSENT and self._all_sent():
            self._first_stage = Stage.SENT
            token, logprob = self._first
            return Request(
                First(
                    slot=t.slot, attempt=t.attempt, token=token, logprob=logprob,
                    announce=self.announce,
                )
            )  # fmt: skip
        return None

    def _all_sent(self) -> bool:
        return min(self.sent) >= self.target.prompt_tokens

    def _part(self, group: int, room_bytes: int) -> Request | None:
        """The next run of blocks of one group, as many as may go out at once."""
        t, begin = self.target, self.sent[group] // PAGE_TOKENS
        block_bytes = t.page_bytes + ROW_SUMS_BYTES
        most = max(1, self._frame_bytes_max // t.page_bytes)
        count = min(blocks_for(self.complete[group]) - begin, most, room_bytes // block_bytes)
        if count < 1:
            return None
        upto = min(self.complete[group], (begin + count) * PAGE_TOKENS)
        self.sent_again += self.sent[group] < self._furthest[group]
        self.sent[group] = upto
        self._furthest[group] = max(self._furthest[group], upto)
        self.messages_sent += 1
        message = Pages(
            slot=t.slot, attempt=t.attempt, group=group, tokens=upto, first_block=begin,
            blocks=count, announce=self.announce,
        )  # fmt: skip
        return Request(message, lambda: self._read(group, begin, count), count * block_bytes)

    # --- answers ---

    def answered(self, sent: Request, answer: Message, frames: Sequence[memoryview]) -> None:
        message = sent.message
        if isinstance(answer, Status) and isinstance(message, Open):
            self._status(message.sequence, answer, frames)
        elif isinstance(answer, Ack):
            self._stored(message)
        elif isinstance(answer, Refused):
            self._go_back(message, answer)
        if not isinstance(answer, Status) and self._overtaken(message.sequence):
            self._ask = True

    def _overtaken(self, answered: int) -> bool:
        """Answers come in order: an older message without one is lost, or its answer is."""
        for sequence, sent in self.inflight.items():
            if sequence > answered:
                return False
            if not self._patient(sent.request):
                return True
        return False

    def _patient(self, request: Request) -> bool:
        """Whether an answer may come later than those of later messages."""
        return isinstance(request.message, Open)

    def _status(self, asked: int, status: Status, frames: Sequence[memoryview]) -> None:
        """What was sent before the question and is not in the answer has been lost."""
        if len(frames) != 1 or len(frames[0]) != 4 * self.target.groups:
            self._ask = True
            return
        self._known = True
        for sequence in [n for n in self.inflight if n < asked]:
            self.inflight.take(sequence)
        ahead = [0] * self.target.groups
        later = [s.request.message for s in self.inflight.values()]
        for message in later:
            if isinstance(message, Pages | Offer):
                ahead[message.group] = max(ahead[message.group], message.tokens)
        for group, tokens in enumerate(np.frombuffer(frames[0], np.uint32).tolist()):
            self.stored[group] = max(self.stored[group], tokens)
            self.sent[group] = max(tokens, ahead[group])
        if status.first:
            self._first_stage = Stage.STORED
        elif not any(isinstance(message, First) for message in later):
            self._first_stage = Stage.UNSENT

    def _stored(self, message: Message) -> None:
        if isinstance(message, Pages | Offer):
            self.stored[message.group] = max(self.stored[message.group], message.tokens)
        elif isinstance(message, First):
            self._first_stage = Stage.STORED

    def _go_back(self, message: Message, refused: Refused) -> None:
        """Sends again from where the store stands; once for all messages that were on their way."""
        if isinstance(message, First):
            self._first_stage = Stage.UNSENT
        if refused.group >= self.target.groups:
            self._ask = True
            return
        if refused.code == Code.CORRUPT:
            self._count_damage(refused)
        if message.sequence > self._back_until[refused.group]:
            self._back_until[refused.group] = max([message.sequence, *self.inflight])
            self.sent[refused.group] = min(self.sent[refused.group], refused.tokens)

    def _count_damage(self, refused: Refused) -> None:
        place = (refused.group, refused.tokens)
        self._damaged[place] = self._damaged.get(place, 0) + 1
        if self._damaged[place] >= DAMAGED_MAX:
            words = f"{refused.words}, {DAMAGED_MAX} times: it is damaged where it comes from"
            self.fail(CorruptKv(words, blocks=[refused.block]))

    # --- faults ---

    def restart(self) -> None:
        self._known, self._ask = False, True
        if self._first_stage is Stage.SENT:
            self._first_stage = Stage.UNSENT

    def unanswered(self, now: float, quiet_s: float) -> None:
        """Asks how far the store is; a question that is itself unanswered is asked again."""
        if quiet_s < RETRY_S or not self.inflight:
            return
        asked = [n for n, sent in self.inflight.items() if isinstance(sent.request.message, Open)]
        for sequence in asked:
            if now - self.inflight[sequence].at < RETRY_S:
                return
            self.inflight.take(sequence)
        self._ask = True


class OfferedPush(Push):
    """The store fetches the pages itself, out of `source`'s arena: only offers travel from here. They
    are acknowledged when their pages have been stored, so nothing is free before."""

    def __init__(self, target: Target, source: str, source_slot: int, source_attempt: int) -> None:
        super().__init__(target, lambda group, first, count: ())
        self._source = source
        self._source_slot, self._source_attempt = source_slot, source_attempt

    def _part(self, group: int, room_bytes: int) -> Request | None:
        self.sent[group] = self.complete[group]
        self.messages_sent += 1
        t = self.target
        return Request(
            Offer(
                slot=t.slot, attempt=t.attempt, group=group, tokens=self.complete[group],
                source_slot=self._source_slot, source_attempt=self._source_attempt,
                source=self._source, announce=self.announce,
            )
        )  # fmt: skip

    def _all_sent(self) -> bool:
        return min(self.stored) >= self.target.prompt_tokens

    def _patient(self, request: Request) -> bool:
        return not isinstance(request.message, First)


class Cancelled(BatonError):
    """Whoever had asked for it has taken it back."""

    code = "CANCELLED"
