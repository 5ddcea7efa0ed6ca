"""The KV stream: the one place where its messages are defined. `[header, frame, ...]`, never pickle.

    ANNOUNCE  prefill or store -> decode   tokens of a layer group are complete in the arena
    PAGES     prefill -> remote store      whole pages of one layer group, with their row checksums
    FIRST     prefill -> remote store      the first token
    ACK       store -> prefill             the message `sequence` has been stored

An announcement carries no state: the words in the arena do, and whoever misses one looks within 50 ms.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import zmq

from services.ops.errors import LayoutMismatch

MAGIC = 0x3153564B  # "KVS1"
VERSION = 1
FRAME_BYTES_MAX = 1 << 20  # runs are coalesced up to this: the best frame size measured


class Kind(IntEnum):
    ANNOUNCE = 1
    PAGES = 2
    FIRST = 3
    ACK = 4


_FORMAT = struct.Struct("<IHHQIIIIIIIif16s16s64s")


@dataclass(frozen=True)
class StreamHeader:
    """The first frame of every message. Token counts are absolute positions of the stream."""

    kind: Kind
    sequence: int = 0  # of the sender's message, for ACK
    slot: int = 0  # of the record in the receiver's arena
    attempt: int = 0
    group: int = 0
    from_tokens: int = 0
    tokens: int = 0  # complete up to here
    first_block: int = 0
    blocks: int = 0
    token: int = 0
    logprob: float = 0.0
    fingerprint: bytes = b""  # 16 bytes; a peer of another layout, model or codec is refused
    source: bytes = b""  # 16 bytes: the sending worker
    announce: str = ""  # whom to wake when the pages are in

    def pack(self) -> bytes:
        assert len(self.fingerprint) in (0, 16), "fingerprint: 16 bytes"
        assert len(self.source) in (0, 16), "source: 16 bytes"
        assert len(self.announce.encode()) <= 64, "announce: an address of at most 64 bytes"
        return _FORMAT.pack(
            MAGIC, VERSION, self.kind, self.sequence, self.slot, self.attempt, self.group,
            self.from_tokens, self.tokens, self.first_block, self.blocks, self.token, self.logprob,
            self.fingerprint, self.source, self.announce.encode(),
        )  # fmt: skip

    @classmethod
    def unpack(cls, data: bytes) -> StreamHeader:
        """Raises LayoutMismatch on anything that is not a header of this version."""
        if len(data) != _FORMAT.size:
            raise LayoutMismatch(f"stream header: {len(data)} bytes, expected {_FORMAT.size}")
        magic, version, kind, *rest = _FORMAT.unpack(data)
        if magic != MAGIC or version != VERSION:
            raise LayoutMismatch(f"stream header: magic {magic:#x} version {version}")
        if kind not in Kind._value2member_map_:
            raise LayoutMismatch(f"stream header: unknown kind {kind}")
        *values, announce = rest
        try:
            address = announce.rstrip(b"\0").decode()
        except UnicodeDecodeError:
            raise LayoutMismatch("stream header: announce is not text") from None
        fields = [Kind(kind), *values, address]
        return cls(*fields)


def bound_address(socket: zmq.Socket[Any], advertise: str) -> str:
    """Where a bound socket can be reached: `advertise` if given, else the address it got."""
    endpoint = socket.getsockopt(zmq.LAST_ENDPOINT)
    assert isinstance(endpoint, bytes)
    return advertise or endpoint.rstrip(b"\0").decode()
