"""What passes over a relayed connection of the KV stream, message by message, so that of a flipped byte
it is known whether anybody has relied on it. What it cannot read, as with CURVE, it leaves out.

    prefill --- PAGES 7 (a byte flipped) ---> store     remembered until it is answered
            <-- ACK 7, or REFUSED 7 corrupt --          a `Hit`: taken, or noticed
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from services.kv.layout import PAGE_TOKENS, KvLayout
from services.ops.errors import BatonError
from services.wire.stream import Ack, Code, Message, Open, Pages, Refused, Status, unpack

GREETING_BYTES = 64
SHORT_BYTES = 1024  # headers and row checksums are shorter, pages longer
_MORE, _LONG, _COMMAND = 0x01, 0x02, 0x04


class Span(NamedTuple):
    """The part [begin, end) of a chunk, which belongs to a frame of `body_bytes`."""

    begin: int
    end: int
    body_bytes: int
    message: int = 0  # its number on this connection
    frame: int = 0  # its number in the message
    offset: int = 0  # of `begin` in the frame
    more: bool = False  # another frame of the same message follows


class Bodies:
    """Finds the message bytes in one direction of a ZMTP connection (3.x, rfc.zeromq.org/spec/23), over
    any cut into chunks.

    [ greeting | flags, length, body | flags, length, body | ... ]
    """

    def __init__(self) -> None:
        self._head = b""
        self._left = self._length = GREETING_BYTES
        self._is_body = self._more = False
        self._message, self._frame = 0, -1

    def spans(self, data: bytes | bytearray) -> list[Span]:
        """The parts of `data` that are bodies of messages, not of commands."""
        found: list[Span] = []
        at = 0
        while at < len(data):
            if self._left:
                end = min(len(data), at + self._left)
                if self._is_body:
                    found.append(self._span(at, end))
                self._left -= end - at
                at = end
                continue
            self._head += data[at : at + 1]
            at += 1
            self._begin_frame()
        return found

    def _span(self, begin: int, end: int) -> Span:
        offset = self._length - self._left
        return Span(begin, end, self._length, self._message, self._frame, offset, self._more)

    def _begin_frame(self) -> None:
        flags, length_bytes = self._head[0], 8 if self._head[0] & _LONG else 1
        if len(self._head) <= length_bytes:
            return
        self._left = self._length = int.from_bytes(self._head[1:], "big")
        self._is_body = not flags & _COMMAND
        self._head = b""
        if self._is_body:
            first = not self._more
            self._message += first
            self._frame = 0 if first else self._frame + 1
            self._more = bool(flags & _MORE)


@dataclass
class Passed:
    """One message: its first two frames as far as they are short, and the sizes of all."""

    number: int
    frames: list[bytearray] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)

    def header(self) -> Message | None:
        """None where it cannot be read."""
        try:
            return unpack(bytes(self.frames[0]) if self.frames else b"")
        except BatonError:
            return None


class Messages:
    """Puts the messages of one direction together."""

    def __init__(self) -> None:
        self._now = Passed(0)

    def take(self, data: bytes | bytearray, spans: Sequence[Span]) -> list[Passed]:
        """Those that are complete with this chunk."""
        done = []
        for span in spans:
            if span.message != self._now.number:
                self._now = Passed(span.message)
            if not span.offset:
                self._now.sizes.append(span.body_bytes)
                self._now.frames += [bytearray()] if len(self._now.frames) < 2 else []
            if span.frame < 2 and span.body_bytes <= SHORT_BYTES:
                self._now.frames[span.frame] += data[span.begin : span.end]
            if span.offset + span.end - span.begin == span.body_bytes and not span.more:
                done.append(self._now)
        return done


@dataclass(frozen=True)
class Hit:
    """Flipped bytes of one PAGES message that has been answered."""

    pages: Pages
    sizes: tuple[int, ...]  # of its frames
    flips: tuple[tuple[int, int], ...]  # (frame, offset in it)
    have: int  # tokens of its layer group that were complete before
    taken: bool  # acknowledged
    noticed: bool  # refused as corrupt

    def matters(self, layout: KvLayout) -> bool:
        """Whether the receiver relied on one of the bytes. On none, if it refused the message for
        another reason: then it has not looked."""
        looked = self.taken or self.noticed
        return looked and any(self._relied_on(layout, *flip) for flip in self.flips)

    def _relied_on(self, layout: KvLayout, frame: int, offset: int) -> bool:
        """row checksums uint32[blocks, 64] | pages, cut anywhere; rows in [have, tokens) are new"""
        if frame == 1:
            row = offset // 4
        else:
            at = sum(self.sizes[2:frame]) + offset
            page, byte = divmod(at, layout.page_bytes)
            place = np.unravel_index(byte // layout.dtype.itemsize, layout.page_shape)
            if place[0] >= len(layout.layers_of(self.pages.group)):
                return False  # the last group may have fewer layers than its pages have room for
            row = page * PAGE_TOKENS + int(place[3])
        return self.have <= self.pages.first_block * PAGE_TOKENS + row < self.pages.tokens


@dataclass
class Tally:
    """What became of all flips, over all connections."""

    hits: list[Hit] = field(default_factory=list)
    headers: int = 0  # messages with a flipped header that were refused
    dropped: int = 0  # messages with flips whose connection ended before they were answered
    have: dict[tuple[int, int, int], int] = field(default_factory=dict)  # (slot, attempt, group)

    def take(self) -> Tally:
        """What has come since the last time."""
        taken = Tally(self.hits, self.headers, self.dropped)
        self.hits, self.headers, self.dropped = [], 0, 0
        return taken


class Tap:
    """One connection."""

    def __init__(self, tally: Tally) -> None:
        self._tally = tally
        self._asked, self._answers = Messages(), Messages()
        self._flips: dict[int, list[tuple[int, int]]] = {}  # message -> (frame, offset)
        self._open: dict[tuple[int, int], Passed] = {}  # (session, sequence) -> not answered yet
        self.unread = 0  # messages with a flipped header that nobody has refused yet

    def asked(
        self, data: bytes, spans: Sequence[Span], flips: Sequence[tuple[Span, int]]
    ) -> None:  # fmt: skip
        """A chunk on its way to the store, as it was before these places in it were flipped."""
        for span, at in flips:
            place = (span.frame, span.offset + at - span.begin)
            self._flips.setdefault(span.message, []).append(place)
        for passed in self._asked.take(data, spans):
            header = passed.header()
            if any(frame == 0 for frame, _ in self._flips.get(passed.number, ())):
                self.unread += header is not None
            elif header is not None:
                self._open[header.session, header.sequence] = passed

    def answered(self, data: bytes, spans: Sequence[Span]) -> None:
        """A chunk of what the store says."""
        for passed in self._answers.take(data, spans):
            answer = passed.header()
            if isinstance(answer, Refused) and not answer.session:
                self._tally.headers += 1
                self.unread -= 1
            elif answer is not None:
                asked = self._open.pop((answer.session, answer.sequence), None)
                if asked is not None:
                    self._pair(asked, answer, passed)

    def _pair(self, asked: Passed, answer: Message, passed: Passed) -> None:
        header, have = asked.header(), self._tally.have
        if isinstance(header, Open) and isinstance(answer, Status):
            for group, tokens in enumerate(np.frombuffer(bytes(passed.frames[1]), np.uint32)):
                have[header.slot, header.attempt, group] = int(tokens)
        if not isinstance(header, Pages):
            return
        place, taken = (header.slot, header.attempt, header.group), isinstance(answer, Ack)
        before = have.get(place, 0)
        if flips := self._flips.pop(asked.number, []):
            noticed = isinstance(answer, Refused) and answer.code == Code.CORRUPT
            sizes = tuple(asked.sizes)
            self._tally.hits.append(Hit(header, sizes, tuple(flips), before, taken, noticed))
        if taken:
            have[place] = max(before, header.tokens)

    def close(self) -> None:
        """The connection has ended; what was on its way has perhaps never arrived."""
        damaged = sum(passed.number in self._flips for passed in self._open.values())
        self._tally.dropped += damaged + self.unread
        self.unread = 0
