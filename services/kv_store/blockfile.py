"""One block of 64 tokens as a file: how it is written, and read back into the arena. Blocking I/O;
knows no index and no limits.

    [ head 64 B | per layer group: row checksums 256 B, page | CRC32C of all before, 4 B ]

A file is written under another name and renamed, so what has a block's name was complete once. The
checksum at its end tells what became of it since: a torn, truncated or flipped file is never read as
KV. The row checksums travel with the page, so whoever attaches verifies its rows against the tokens.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from pathlib import Path

from services import _native
from services.kv.arena import Arena
from services.kv.layout import PAGE_TOKENS

SUFFIX, UNFINISHED = ".kv", ".new"
_HEAD = struct.Struct("<8s16s16sII16x")  # magic, fingerprint, key, groups, page_bytes
_TAIL = struct.Struct("<I")
_MAGIC = b"BATONBK1"


class BadFile(Exception):
    """Not the block that its name says: torn, truncated, flipped, or of another fingerprint."""


@dataclass(frozen=True)
class BlockFiles:
    """The files of one arena's blocks. Any thread may call; a block has one caller at a time."""

    directory: Path
    arena: Arena
    keep_halves: bool = False  # control: what a failed write has left behind stays

    @property
    def file_bytes(self) -> int:
        layout = self.arena.layout
        per_group = PAGE_TOKENS * 4 + layout.page_bytes
        return _HEAD.size + layout.groups * per_group + _TAIL.size

    def path(self, key: bytes) -> Path:
        return self.directory / (key.hex() + SUFFIX)

    def key_of(self, path: Path) -> bytes:
        """The key that a file's name says. Raises BadFile."""
        try:
            key = bytes.fromhex(path.stem)
        except ValueError:
            key = b""
        if path.suffix != SUFFIX or len(key) != 16:
            raise BadFile(f"{path.name}: not a block's name")
        return key

    def _head(self, key: bytes) -> bytes:
        plan, layout = self.arena.plan, self.arena.layout
        fingerprint = bytes.fromhex(plan.fingerprint)
        return _HEAD.pack(_MAGIC, fingerprint, key, layout.groups, layout.page_bytes)

    def _parts(self, block: int) -> list[memoryview]:
        """The block's bytes in the arena: row checksums and page of each layer group in turn."""
        parts = []
        for group in range(self.arena.layout.groups):
            crcs = self.arena.headers["row_crc"][self.arena.page_id(block, group)]
            parts += [memoryview(crcs).cast("B"), self.arena.run(group, block, 1)]
        return parts

    def write(self, key: bytes, block: int) -> None:
        """Stores a sealed block that nobody may change meanwhile. Raises OSError; then nothing of it
        is left behind."""
        parts = [memoryview(self._head(key)), *self._parts(block)]
        path = self.path(key)
        unfinished = path.with_suffix(UNFINISHED)
        try:
            with unfinished.open("wb") as file:
                for part in parts:
                    file.write(part)
                file.write(_TAIL.pack(_crc(parts)))
            unfinished.rename(path)
        except OSError:
            if not self.keep_halves:
                unfinished.unlink(missing_ok=True)
            raise

    def read(self, key: bytes, block: int) -> None:
        """Fills and seals a block that nobody reads yet. Raises BadFile or OSError: then the block
        holds rubbish, unsealed."""
        head, tail = bytearray(_HEAD.size), bytearray(_TAIL.size)
        pages = self._parts(block)
        fd = os.open(self.path(key), os.O_RDONLY)
        try:
            got = os.preadv(fd, [head, *pages, tail], 0)
            size = os.fstat(fd).st_size
        finally:
            os.close(fd)
        if got != self.file_bytes or size != self.file_bytes:
            raise BadFile(f"{key.hex()}: {size} bytes instead of {self.file_bytes}")
        if bytes(head) != self._head(key):
            raise BadFile(f"{key.hex()}: another block, layout or fingerprint")
        if _TAIL.unpack(tail) != (_crc([memoryview(head), *pages]),):
            raise BadFile(f"{key.hex()}: checksum differs")
        for group in range(self.arena.layout.groups):
            page = self.arena.page_id(block, group)
            self.arena.native.seal(page, group, PAGE_TOKENS, key)

    def look(self, path: Path) -> bytes:
        """The key of a file that may be taken into an index: name, head and length fit. Its content
        is verified when it is read. Raises BadFile or OSError."""
        key = self.key_of(path)
        with path.open("rb") as file:
            head = file.read(_HEAD.size)
            size = os.fstat(file.fileno()).st_size
        if head != self._head(key) or size != self.file_bytes:
            raise BadFile(f"{path.name}: another layout or fingerprint, or torn")
        return key


def _crc(parts: list[memoryview]) -> int:
    crc = 0
    for part in parts:
        crc = _native.crc32c(part, crc)
    return crc
