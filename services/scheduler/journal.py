"""The request journal: an append-only file of checksummed records, written before anyone is told.

    record = [length u32][crc32c u32][JournalRecord]

A torn record at the end is what a crash leaves; it and nothing before it is dropped. `write()` makes a
record survive the death of the process; with `fsync` it also survives the loss of power.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path

from baton.v1 import journal_pb2
from services._native import crc32c
from services.ops.private import private_directory

_HEAD = struct.Struct("<II")


def read(path: Path) -> Iterator[journal_pb2.JournalRecord]:
    """All intact records, oldest first; stops at the first torn or damaged one."""
    data = path.read_bytes() if path.exists() else b""
    at = 0
    while at + _HEAD.size <= len(data):
        length, checksum = _HEAD.unpack_from(data, at)
        body = data[at + _HEAD.size : at + _HEAD.size + length]
        if len(body) < length or crc32c(body) != checksum:
            return
        yield journal_pb2.JournalRecord.FromString(body)
        at += _HEAD.size + length


def frame(record: journal_pb2.JournalRecord) -> bytes:
    body: bytes = record.SerializeToString()
    return _HEAD.pack(len(body), crc32c(body)) + body


class Journal:
    """Appends to `<directory>/journal`. One process at a time."""

    def __init__(self, directory: Path, fsync: bool) -> None:
        private_directory(directory, "journal_dir")
        self.path = directory / "journal"
        self._fsync = fsync
        self._fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o660)

    def append(self, records: Iterable[journal_pb2.JournalRecord]) -> None:
        data = b"".join(map(frame, records))
        if not data:
            return
        before = os.fstat(self._fd).st_size
        written = os.write(self._fd, data)
        if written != len(data):
            os.ftruncate(self._fd, before)  # a torn record would hide all that follow it
            raise OSError(f"journal: {written} of {len(data)} bytes written")
        if self._fsync:
            os.fdatasync(self._fd)

    def rewrite(self, records: Iterable[journal_pb2.JournalRecord]) -> None:
        """Replaces the file by these records, in one step: what is forgotten takes no more room."""
        fresh = self.path.with_suffix(".new")
        fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o660)
        os.write(fd, b"".join(map(frame, records)))
        os.fsync(fd)
        fresh.rename(self.path)
        os.close(self._fd)
        self._fd = fd

    def close(self) -> None:
        os.close(self._fd)
