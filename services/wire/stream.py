"""The KV stream: the one place where its messages are defined. `[header, frame, ...]`, never pickle.

    HELLO     peer -> store      version, layout, fingerprint and codec: the first of a connection
    WELCOME   store -> peer      how many bytes may be on their way unacknowledged
    REFUSED   store -> peer      a code and words: why a message has not been taken
    OPEN      prefill -> store   how far has this transfer come?
    STATUS    store -> prefill   frame: uint32[groups], tokens complete in each layer group
    PAGES     prefill -> store   frames: row checksums uint32[blocks, 64], then runs of whole pages
    FIRST     prefill -> store   the first token
    OFFER     prefill -> store   pages that the store may fetch out of the arena of prefill's store
    ACK       store -> prefill   PAGES, FIRST or OFFER has been stored, or several of them
    FETCH     store -> store     asks for pages of an open stream, or of a loan
    CONTENT   store -> store     frames as those of PAGES
    LOOKUP    store -> store     frame: block keys. Lends the leading blocks that are cached
    LOAN      store -> store     which blocks are lent, and under what number
    RETURN    store -> store     a loan is not needed any more
    ANNOUNCE  anyone -> decode   tokens of a layer group are complete in the arena

Every header carries a checksum of itself: a flipped byte in it never becomes another slot or token.
An announcement carries no state: the words in the arena do, and whoever misses one looks within 50 ms.
"""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from operator import attrgetter
from typing import Any, ClassVar

from services._native import crc32c
from services.ops.errors import CorruptKv, LayoutMismatch

MAGIC = 0x3153564B  # "KVS1"
VERSION = 3
CODEC = "raw"
# Runs are coalesced up to this; a larger frame has left the cache before it is copied.
FRAME_BYTES_MAX = 1 << 20
TEXT_BYTES_MAX = 1024

# What every version begins with, checksum included, so that another version can be told from damage
# and named; the rest is this version's.
_PREFIX = struct.Struct("<IHHIQQ")  # magic, version, kind, checksum, session, sequence
_CHECKSUM_AT = 8


class Kind(IntEnum):
    ANNOUNCE = 1
    PAGES = 2
    FIRST = 3
    ACK = 4
    HELLO = 5
    WELCOME = 6
    REFUSED = 7
    OPEN = 8
    STATUS = 9
    OFFER = 10
    FETCH = 11
    CONTENT = 12
    LOOKUP = 13
    LOAN = 14
    RETURN = 15


class Code(IntEnum):
    """Why a message was refused; the first three end a transfer, the others have a way on."""

    LAYOUT = 1  # another version, layout, model or codec, or outside what is open
    STALE = 2  # fenced by a later attempt
    UNAVAILABLE = 3  # something that the receiver needs does not answer
    HELLO = 4  # the receiver does not know this session: introduce yourself, begin again
    GAP = 5  # what came before is missing: go on from `tokens` of `group`
    CORRUPT = 6  # checksums differ: send again from `tokens` of `group`
    BUSY = 7  # no window is left to be granted: say hello again after a while


@dataclass(frozen=True, kw_only=True)
class Message:
    """A header. `sequence` is the sender's; an answer names the `session` and sequence it answers."""

    kind: ClassVar[Kind]
    numbers: ClassVar[struct.Struct] = struct.Struct("<")

    session: int = 0
    sequence: int = 0


@dataclass(frozen=True, kw_only=True)
class Hello(Message):
    """`client` names who connects, over all its connections one after the other."""

    kind = Kind.HELLO
    numbers = struct.Struct("<16s16s")
    fingerprint: bytes
    client: bytes = bytes(16)
    layout: str
    codec: str = CODEC


@dataclass(frozen=True, kw_only=True)
class Welcome(Message):
    kind = Kind.WELCOME
    numbers = struct.Struct("<Q")
    window_bytes: int


@dataclass(frozen=True, kw_only=True)
class Refused(Message):
    kind = Kind.REFUSED
    numbers = struct.Struct("<IIII")
    code: int
    group: int = 0
    tokens: int = 0
    block: int = 0  # of the sequence: whose checksums differ
    words: str = ""


@dataclass(frozen=True, kw_only=True)
class Open(Message):
    kind = Kind.OPEN
    numbers = struct.Struct("<II")
    slot: int
    attempt: int


@dataclass(frozen=True, kw_only=True)
class Status(Message):
    kind = Kind.STATUS
    numbers = struct.Struct("<III")
    slot: int
    attempt: int
    first: int  # 1: the first token is there


@dataclass(frozen=True, kw_only=True)
class Pages(Message):
    """Blocks [first_block, first_block + blocks) of the stream; `tokens` are complete with them."""

    kind = Kind.PAGES
    numbers = struct.Struct("<IIIIII")
    slot: int
    attempt: int
    group: int
    tokens: int
    first_block: int
    blocks: int
    announce: str = ""  # whom to wake when the pages are in


@dataclass(frozen=True, kw_only=True)
class First(Message):
    kind = Kind.FIRST
    numbers = struct.Struct("<IIif")
    slot: int
    attempt: int
    token: int
    logprob: float
    announce: str = ""


@dataclass(frozen=True, kw_only=True)
class Offer(Message):
    """`tokens` of `group` are complete in the stream that the store at `source` has in
    `source_slot`."""

    kind = Kind.OFFER
    numbers = struct.Struct("<IIIIII")
    slot: int
    attempt: int
    group: int
    tokens: int
    source_slot: int
    source_attempt: int
    source: str = ""
    announce: str = ""


@dataclass(frozen=True, kw_only=True)
class Ack(Message):
    """Bit n of `before`: the request with number `sequence` - 1 - n has been stored too."""

    kind = Kind.ACK
    numbers = struct.Struct("<Q")
    before: int = 0

    def sequences(self) -> Iterator[int]:
        """All that it acknowledges, oldest first."""
        before = self.before
        while before:
            bit = before.bit_length() - 1
            before ^= 1 << bit
            yield self.sequence - 1 - bit
        yield self.sequence


@dataclass(frozen=True, kw_only=True)
class Fetch(Message):
    """Of a loan if `loan` is not 0, else of the stream in `slot`, as far as it is complete."""

    kind = Kind.FETCH
    numbers = struct.Struct("<QIIIIII")
    loan: int = 0
    slot: int = 0
    attempt: int = 0
    group: int
    tokens: int = 0
    first_block: int
    blocks: int


@dataclass(frozen=True, kw_only=True)
class Content(Message):
    """`checksum`: CRC32C over all frames, for pages whose tokens the receiver does not know."""

    kind = Kind.CONTENT
    numbers = struct.Struct("<IIII")
    group: int
    first_block: int
    blocks: int
    checksum: int = 0


@dataclass(frozen=True, kw_only=True)
class Lookup(Message):
    kind = Kind.LOOKUP


@dataclass(frozen=True, kw_only=True)
class Loan(Message):
    kind = Kind.LOAN
    numbers = struct.Struct("<QI")
    loan: int
    blocks: int  # how many leading keys were found


@dataclass(frozen=True, kw_only=True)
class Return(Message):
    kind = Kind.RETURN
    numbers = struct.Struct("<Q")
    loan: int


@dataclass(frozen=True, kw_only=True)
class Announce(Message):
    kind = Kind.ANNOUNCE
    numbers = struct.Struct("<IIII16s")
    slot: int
    attempt: int
    group: int
    tokens: int
    fingerprint: bytes


MESSAGES: tuple[type[Message], ...] = (
    Hello, Welcome, Refused, Open, Status, Pages, First, Offer, Ack, Fetch, Content, Lookup, Loan,
    Return, Announce,
)  # fmt: skip
_BY_KIND: dict[int, type[Message]] = {message.kind: message for message in MESSAGES}
_OWN_FIELDS = {
    message: [f for f in dataclasses.fields(message) if f.name not in ("session", "sequence")]
    for message in MESSAGES
}
_NUMBERS = {m: [f.name for f in own if f.type != "str"] for m, own in _OWN_FIELDS.items()}
_TEXTS = {m: [f.name for f in own if f.type == "str"] for m, own in _OWN_FIELDS.items()}
_BYTES = {m: [f.name for f in own if f.type == "bytes"] for m, own in _OWN_FIELDS.items()}
_NAMES = {m: ["session", "sequence", *names] for m, names in _NUMBERS.items()}
_VALUES = {m: attrgetter(*names) for m, names in _NAMES.items()}
_HEADS = {m: struct.Struct(_PREFIX.format + m.numbers.format[1:]) for m in MESSAGES}
_CHECKSUM = struct.Struct("<I")
_OWN_AT = 4  # values of a head before the session: magic, version, kind, checksum


def pack(message: Message) -> bytes:
    """The header frame: prefix, numbers, texts with a zero byte between them."""
    kind = type(message)
    texts = "\0".join([getattr(message, name) for name in _TEXTS[kind]]).encode()
    assert len(texts) <= TEXT_BYTES_MAX, "texts: at most 1024 bytes"
    assert texts.count(b"\0") == max(0, len(_TEXTS[kind]) - 1), "texts: no zero bytes"
    values = _VALUES[kind](message)
    assert all(len(getattr(message, name)) == 16 for name in _BYTES[kind]), "16 bytes each"
    data = bytearray(_HEADS[kind].pack(MAGIC, VERSION, kind.kind, 0, *values))
    data += texts
    _CHECKSUM.pack_into(data, _CHECKSUM_AT, crc32c(data))
    return bytes(data)


def number(message: Message, session: int, sequence: int) -> None:
    """Gives a message its numbers, before it is sent: only whoever has just made it may do that."""
    object.__setattr__(message, "session", session)
    object.__setattr__(message, "sequence", sequence)


def ids(data: bytes | memoryview) -> tuple[int, int]:
    """(session, sequence) as far as anything can be made out, to answer what `unpack` refused."""
    if len(data) < _PREFIX.size:
        return 0, 0
    return _PREFIX.unpack_from(data)[4:]  # type: ignore[return-value]


def unpack(data: bytes | memoryview) -> Message:
    """Raises CorruptKv on anything damaged, LayoutMismatch on an intact header of another version."""
    data = bytes(data)
    if not _PREFIX.size <= len(data) <= _PREFIX.size + TEXT_BYTES_MAX + 64:
        raise CorruptKv(f"stream header: {len(data)} bytes")
    magic, version, number, checksum, _, _ = _PREFIX.unpack_from(data)
    zeroed = data[:_CHECKSUM_AT] + bytes(4) + data[_CHECKSUM_AT + 4 :]
    if magic != MAGIC or crc32c(zeroed) != checksum:
        raise CorruptKv(f"stream header: magic {magic:#x} version {version}: checksum differs")
    if version != VERSION:
        raise LayoutMismatch(f"version: the peer speaks {version}, this process {VERSION}")
    kind = _BY_KIND.get(number)
    if kind is None:
        raise LayoutMismatch(f"stream header: unknown kind {number}")
    return _body(kind, data)


def _body(kind: type[Message], data: bytes) -> Message:
    head, texts = _HEADS[kind], _TEXTS[kind]
    if len(data) < head.size or (len(data) > head.size and not texts):
        raise LayoutMismatch(f"stream header: {len(data)} bytes of {kind.kind.name}")
    fields: dict[str, Any] = dict(zip(_NAMES[kind], head.unpack_from(data)[_OWN_AT:], strict=True))
    if texts:
        fields |= _text_fields(kind, data[head.size :])
    return kind(**fields)


def _text_fields(kind: type[Message], data: bytes) -> dict[str, str]:
    try:
        texts = data.decode().split("\0")
    except UnicodeDecodeError:
        raise LayoutMismatch(f"stream header: a text of {kind.kind.name} is none") from None
    if len(texts) != len(_TEXTS[kind]):
        raise LayoutMismatch(f"stream header: {len(texts)} texts of {kind.kind.name}")
    return dict(zip(_TEXTS[kind], texts, strict=True))
