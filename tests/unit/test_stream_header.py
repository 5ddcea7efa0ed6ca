"""The KV stream's messages: every kind comes back as it was sent, and nothing else is taken for one."""

from __future__ import annotations

import contextlib
import dataclasses
import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services._native import crc32c
from services.ops.errors import BatonError, CorruptKv, LayoutMismatch
from services.wire.stream import (
    MESSAGES,
    TEXT_BYTES_MAX,
    VERSION,
    Ack,
    Announce,
    Hello,
    Kind,
    Message,
    Pages,
    ids,
    pack,
    unpack,
)

FIELDS: dict[tuple[str, str], st.SearchStrategy[Any]] = {
    ("int", "<"): st.integers(0, 2**32 - 1),
    ("bytes", "<"): st.binary(min_size=16, max_size=16),
    ("str", "<"): st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=40),
    ("float", "<"): st.floats(width=32, allow_nan=False),
}


def values(kind: type[Message]) -> st.SearchStrategy[Message]:
    fields = {f.name: FIELDS[str(f.type), "<"] for f in dataclasses.fields(kind)}
    fields |= {"session": st.integers(0, 2**64 - 1), "sequence": st.integers(0, 2**64 - 1)}
    if "token" in fields:
        fields["token"] = st.integers(-(2**31), 2**31 - 1)
    return st.builds(kind, **fields)


def sample(kind: type[Message]) -> Message:
    example: dict[str, Any] = {"int": 3, "bytes": b"0123456789abcdef", "str": "tcp://d:1"}
    example["float"] = -0.5
    return kind(**{f.name: example[str(f.type)] for f in dataclasses.fields(kind)})


every_kind = pytest.mark.parametrize("kind", MESSAGES, ids=lambda kind: kind.__name__)


def test_every_kind_has_one_message() -> None:
    """None is missing and none has two."""
    assert sorted(kind.kind for kind in MESSAGES) == sorted(Kind)


@given(st.one_of([values(kind) for kind in MESSAGES]))
def test_a_message_comes_back_as_it_was(message: Message) -> None:
    """Every field of every kind."""
    assert unpack(pack(message)) == message


@every_kind
def test_a_message_can_be_read_by_people(kind: type[Message]) -> None:
    """Printed, it names its kind and its fields."""
    text = repr(sample(kind))
    print(text)
    assert kind.__name__ in text
    for field in dataclasses.fields(kind):
        assert f"{field.name}=" in text


@every_kind
def test_every_field_is_sent(kind: type[Message]) -> None:
    """A change in any field changes the bytes."""
    plain = sample(kind)
    other: dict[str, Any] = {"int": 4, "bytes": b"f" * 16, "str": "tcp://e:1", "float": -1.0}
    for field in dataclasses.fields(kind):
        changed = dataclasses.replace(plain, **{field.name: other[str(field.type)]})
        assert pack(changed) != pack(plain), field.name


@every_kind
def test_any_flipped_bit_is_noticed(kind: type[Message]) -> None:
    """In magic, version and kind as in every field: it is never taken for another message."""
    data = pack(sample(kind))
    for bit in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(CorruptKv):
            unpack(bytes(flipped))


@every_kind
def test_another_length_is_noticed(kind: type[Message]) -> None:
    """Cut off or with more behind it."""
    data = pack(sample(kind))
    for size in range(len(data)):
        with pytest.raises(CorruptKv):
            unpack(data[:size])
    with pytest.raises(CorruptKv):
        unpack(data + b"\0")


def header(version: int, kind: int, body: bytes) -> bytes:
    """An intact one."""
    parts = (0x3153564B, version, kind)
    checksum = crc32c(struct.pack("<IHHIQQ", *parts, 0, 7, 8) + body)
    return struct.pack("<IHHIQQ", *parts, checksum, 7, 8) + body


def test_another_version_is_named() -> None:
    """An intact header of another version: refused with both numbers, and it can be answered."""
    other = header(VERSION + 1, Kind.HELLO, b"whatever it has")
    with pytest.raises(LayoutMismatch, match=f"version: the peer speaks {VERSION + 1}"):
        unpack(other)
    assert ids(other) == (7, 8)
    assert ids(b"short") == (0, 0)


@pytest.mark.parametrize(
    ("kind", "body"),
    [(99, b""), (Kind.ACK, b"more"), (Kind.OPEN, b"1234567"), (Kind.PAGES, b"\xff" * 30)],
    ids=["unknown", "longer", "shorter", "no text"],
)
def test_an_intact_header_of_no_message_is_refused(kind: int, body: bytes) -> None:
    """A peer's mistake, not the wire's."""
    with pytest.raises(LayoutMismatch):
        unpack(header(VERSION, kind, body))


@given(st.binary(max_size=300), st.sampled_from([*Kind, 0, 77]), st.booleans())
def test_any_bytes_are_a_message_or_refused(body: bytes, kind: int, whole: bool) -> None:
    """Whatever a peer sends: no other exception, so that one message cannot end the receiver."""
    data = header(VERSION, kind, body) if whole else body
    with contextlib.suppress(BatonError):
        assert unpack(data).kind == kind


def test_what_does_not_fit_is_not_cut_off() -> None:
    """A fingerprint or an address of another length would reach the wrong peer, or the right one with
    the wrong name."""
    announce = Announce(slot=0, attempt=0, group=0, tokens=0, fingerprint=b"short")
    pages = Pages(slot=0, attempt=0, group=0, tokens=0, first_block=0, blocks=0)
    too_long = dataclasses.replace(pages, announce="x" * (TEXT_BYTES_MAX + 1))
    two = dataclasses.replace(pages, announce="a\0b")
    hello = Hello(fingerprint=b"f" * 17, layout="")
    for message in (announce, too_long, two, hello, Ack(sequence=1 << 64)):
        with pytest.raises((AssertionError, struct.error)):
            pack(message)


@given(last=st.integers(64, 2**40), before=st.sets(st.integers(1, 64), max_size=63))
def test_an_acknowledgement_names_all_it_covers(last: int, before: set[int]) -> None:
    """Oldest first, and no other request."""
    ack = unpack(pack(Ack(sequence=last, before=sum(1 << back - 1 for back in before))))
    assert isinstance(ack, Ack)
    assert list(ack.sequences()) == sorted([last, *(last - back for back in before)])
