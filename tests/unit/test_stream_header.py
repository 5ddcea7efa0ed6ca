"""The KV stream's header: every kind comes back as it was sent, and nothing else is taken for one."""

from __future__ import annotations

import contextlib
import dataclasses
import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.ops.errors import LayoutMismatch
from services.wire.stream import Kind, StreamHeader

u32 = st.integers(0, 2**32 - 1)
headers = st.builds(
    StreamHeader, st.sampled_from(Kind), sequence=st.integers(0, 2**64 - 1), slot=u32, attempt=u32,
    group=u32, from_tokens=u32, tokens=u32, first_block=u32, blocks=u32,
    token=st.integers(0, 2**31 - 1), logprob=st.floats(width=32, allow_nan=False),
    fingerprint=st.binary(min_size=16, max_size=16), source=st.binary(min_size=16, max_size=16),
    announce=st.text(st.characters(codec="ascii", min_codepoint=33), max_size=64),
)  # fmt: skip
SIZE = len(StreamHeader(Kind.ACK).pack())


@given(headers)
def test_a_header_comes_back_as_it_was(header: StreamHeader) -> None:
    """Every field of every kind, in always the same number of bytes."""
    assert len(header.pack()) == SIZE
    assert StreamHeader.unpack(header.pack()) == header


@pytest.mark.parametrize("kind", Kind)
def test_a_header_can_be_read_by_people(kind: Kind) -> None:
    """Printed, it names its kind and its fields."""
    text = repr(StreamHeader(kind, slot=31, announce="tcp://d:1"))
    assert kind.name in text
    assert "slot=31" in text
    assert "tcp://d:1" in text


def test_every_field_is_sent() -> None:
    """A change in any field changes the bytes."""
    plain = StreamHeader(Kind.PAGES)
    changed = {"kind": Kind.FIRST, "logprob": -1.0, "fingerprint": b"f" * 16, "source": b"s" * 16}
    changed["announce"] = "tcp://d:1"
    for field in dataclasses.fields(StreamHeader):
        value = changed.get(field.name, 1)
        assert dataclasses.replace(plain, **{field.name: value}).pack() != plain.pack(), field.name  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [0, 4, SIZE - 1, SIZE + 1])
def test_another_size_is_refused(size: int) -> None:
    """A short or long message says how long it is."""
    with pytest.raises(LayoutMismatch, match=f"{size} bytes"):
        StreamHeader.unpack(StreamHeader(Kind.ACK).pack().ljust(size, b"\0")[:size])


@pytest.mark.parametrize(("at", "words"), [(0, "magic"), (4, "version"), (6, "kind")])
def test_another_version_or_kind_is_refused(at: int, words: str) -> None:
    """One flipped bit in magic, version or kind."""
    data = bytearray(StreamHeader(Kind.ANNOUNCE).pack())
    data[at] ^= 0x40
    with pytest.raises(LayoutMismatch, match=words):
        StreamHeader.unpack(bytes(data))


@given(st.binary(min_size=SIZE - 8, max_size=SIZE - 8), st.sampled_from(Kind))
def test_any_bytes_are_a_header_or_refused(rest: bytes, kind: Kind) -> None:
    """Whatever a peer sends: no other exception, so that one message cannot end the receiver."""
    magic_and_version = StreamHeader(kind).pack()[:6]
    data = magic_and_version + struct.pack("<H", kind) + rest
    with contextlib.suppress(LayoutMismatch):
        assert StreamHeader.unpack(data).kind is kind


def test_what_does_not_fit_is_not_cut_off() -> None:
    """An address or a fingerprint of another length would reach the wrong peer, or the right one with
    the wrong name."""
    too_long: tuple[dict[str, Any], ...] = (
        {"announce": "tcp://" + "x" * 59},
        {"fingerprint": b"f" * 17},
        {"source": b"s" * 17},
    )
    for fields in too_long:
        with pytest.raises((ValueError, AssertionError, LayoutMismatch, struct.error)):
            StreamHeader(Kind.ANNOUNCE, **fields).pack()
