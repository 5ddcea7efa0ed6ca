"""What the relay can tell of a flipped byte: whether a receiver relied on it, and what became of it."""

from __future__ import annotations

import pytest

from baton.chaos.tap import Bodies, Tally, Tap
from services.kv.layout import KvLayout
from services.wire.stream import Ack, Code, Message, Open, Pages, Refused, Status, pack

# Three layers in groups of two: the second group's pages are half empty.
LAYOUT = KvLayout(layers=3, layers_per_group=2, kv_heads=2, head_dim=8, kv_dtype="f32")
ROW_BYTES = 8 * 4
PAGES = Pages(
    session=5, sequence=7, slot=1, attempt=2, group=0, tokens=100, first_block=0, blocks=2
)


def zmtp(frames: list[bytes]) -> bytes:
    """A message as ZeroMQ frames it."""
    out = b""
    for number, body in enumerate(frames):
        more = int(number < len(frames) - 1)
        long = len(body) > 255
        length = len(body).to_bytes(8 if long else 1, "big")
        out += bytes([more | 2 * long]) + length + body
    return out


class Wire:
    """Both directions of one connection, after the greetings."""

    def __init__(self) -> None:
        self.tally = Tally()
        self.tap = Tap(self.tally)
        self._out, self._back = Bodies(), Bodies()
        self._out.spans(bytes(64))
        self._back.spans(bytes(64))

    def ask(self, header: Message, frames: list[bytes], *flips: tuple[int, int], step: int) -> None:
        """Sends in pieces of `step` bytes; flips are (frame, offset)."""
        data = zmtp([pack(header), *frames])
        for at in range(0, len(data), step):
            chunk = data[at : at + step]
            spans = self._out.spans(chunk)
            hit = [
                (span, span.begin + offset - span.offset)
                for span in spans
                for frame, offset in flips
                if span.frame == frame and 0 <= offset - span.offset < span.end - span.begin
            ]
            self.tap.asked(chunk, spans, hit)

    def answer(self, header: Message, *frames: bytes) -> None:
        data = zmtp([pack(header), *frames])
        self.tap.answered(data, self._back.spans(data))


def sent(*flips: tuple[int, int], pages: Pages = PAGES, step: int = 1000) -> Wire:
    """A PAGES message of two blocks, its pages cut in the middle of the second one."""
    wire = Wire()
    wire.ask(Open(session=5, sequence=6, slot=1, attempt=2), [], step=step)
    ready = (40).to_bytes(4, "little") + (0).to_bytes(4, "little")
    wire.answer(Status(session=5, sequence=6, slot=1, attempt=2, first=0), ready)
    content, cut = bytes(2 * LAYOUT.page_bytes), LAYOUT.page_bytes + 1000
    wire.ask(pages, [bytes(512), content[:cut], content[cut:]], *flips, step=step)
    return wire


ACK = Ack(session=5, sequence=7)
CORRUPT = Refused(session=5, sequence=7, code=Code.CORRUPT)
GAP = Refused(session=5, sequence=7, code=Code.GAP)


@pytest.mark.parametrize("step", [7, 1000, 1 << 20])
@pytest.mark.parametrize(
    ("frame", "offset", "matters"),
    [
        (1, 4 * 39, False),  # the checksum of a row that was complete before
        (1, 4 * 40, True),
        (1, 4 * 99 + 3, True),
        (1, 4 * 100, False),  # a row that does not come with this message
        (2, ROW_BYTES * 39, False),
        (2, ROW_BYTES * 40, True),
        (2, ROW_BYTES * 64 * 4 + ROW_BYTES * 40, True),  # of the second layer
        (2, LAYOUT.page_bytes + 8, True),  # the second page's first row
        (3, 0, True),
        (3, ROW_BYTES * 5, False),  # its row 36, beyond the tokens
    ],
)
def test_a_byte_matters_where_its_row_is_new(
    step: int, frame: int, offset: int, *, matters: bool
) -> None:
    """Neither what was there before nor what lies beyond the tokens is read by anybody."""
    wire = sent((frame, offset), step=step)
    wire.answer(CORRUPT)
    [hit] = wire.tally.take().hits
    assert hit.matters(LAYOUT) == matters


def test_layers_that_a_group_has_not_got_matter_to_nobody() -> None:
    """The last group is shorter than its pages."""
    pages = Pages(
        session=5, sequence=7, slot=1, attempt=2, group=1, tokens=100, first_block=0, blocks=2
    )
    for offset, matters in [(0, True), (LAYOUT.page_bytes // 2, False)]:
        wire = sent((2, offset), pages=pages)
        wire.answer(ACK)
        [hit] = wire.tally.take().hits
        assert hit.matters(LAYOUT) == matters


@pytest.mark.parametrize(("answer", "matters"), [(ACK, True), (CORRUPT, True), (GAP, False)])
def test_what_was_refused_for_another_reason_was_not_looked_at(
    answer: Message, *, matters: bool
) -> None:
    """It comes again; what was taken in spite of its damage counts as unnoticed."""
    wire = sent((1, 4 * 50))
    wire.answer(answer)
    [hit] = wire.tally.take().hits
    assert hit.matters(LAYOUT) == matters
    assert hit.noticed == (answer is CORRUPT)


def test_what_came_before_does_not_matter() -> None:
    """A repeated message changes nothing in the arena."""
    wire = sent()
    wire.answer(ACK)
    wire.ask(PAGES, [bytes(512), bytes(2 * LAYOUT.page_bytes)], (1, 4 * 50), step=1000)
    wire.answer(ACK)
    [hit] = wire.tally.take().hits
    assert not hit.matters(LAYOUT)


def test_a_damaged_header_is_refused_without_a_name() -> None:
    """Nobody can tell whose it was; until then it counts as unread."""
    wire = sent((0, 30))
    assert wire.tap.unread == 1
    wire.answer(Refused(code=Code.CORRUPT))
    assert wire.tap.unread == 0
    assert wire.tally.take() == Tally(headers=1)


def test_what_was_never_answered_is_perhaps_lost() -> None:
    """With its connection; what was answered is not."""
    wire = sent((1, 200))
    wire.tap.close()
    assert wire.tally.dropped == 1
    wire = sent((0, 30))
    wire.tap.close()
    assert wire.tally.dropped == 1
    wire = sent((1, 200))
    wire.answer(ACK)
    wire.tap.close()
    assert wire.tally.dropped == 0
