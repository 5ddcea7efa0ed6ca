"""The file of packed weights: written whole or not at all, mapped in milliseconds.

    [ magic 8 | header bytes u32 | CRC32C of the header u32 ][ JSON header, padded with spaces ]
    [ matrix | to 4096 ][ matrix | to 4096 ] ...

The header holds the recipe, the file's size, and each matrix's format, shape, offset, size and CRC32C.
A file is written under another name, synced and renamed: what has the right name was complete once.
Checksums tell what became of it since; they are read once after each boot, because every later worker
sees the same pages in memory. What a matrix's bytes mean is for `engine/packed.py`.

Pages are huge where the file system has such, since a step reads them all: what was written is dropped
from memory, and comes back through a mapping that asks for huge pages.
"""

from __future__ import annotations

import errno
import json
import mmap
import os
import struct
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from services import _native
from services.engine.packed import PackedMatrix
from services.ops.errors import ConfigError

MAGIC = b"BATONWT1"
ALIGNMENT = 4096
HEADER_BYTES_MAX = 64 << 20
_FIXED = struct.Struct("<8sII")
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class BadPack(Exception):
    """Not the packed weights that are wanted: torn, truncated, flipped, or made by another recipe."""


@dataclass(frozen=True)
class Recipe:
    """What packed weights are made from, and how: equal recipes give equal files.

    weights: `Checkpoint.digest()`. group, head_group: columns under one scale, 0 without scales.
    packing: the version of a packed matrix's layout. rounding: that of the quantiser.
    """

    weights: str
    format: str
    group: int
    head_group: int
    packing: int
    rounding: int

    @property
    def file_name(self) -> str:
        groups = f"g{self.group}h{self.head_group}"
        version = f"p{self.packing}-r{self.rounding}"
        return f"{self.weights[:16]}-{self.format}-{groups}-{version}.weights"


def write(path: Path, recipe: Recipe, names: list[str], matrices: Iterable[PackedMatrix]) -> None:
    """Makes the file from matrices in the order of `names`, one in memory at a time.

    The caller holds the lock. Raises ConfigError naming the path when the disk is full or refuses.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with _named(path):
        for left in path.parent.glob(f".{path.name}.*"):
            left.unlink()  # of a packer that died
    try:
        with _named(path), temporary.open("wb") as file:
            _write(file, recipe, names, matrices)
            file.flush()
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        with _named(path):
            temporary.replace(path)
            _sync_directory(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def attach(path: Path, recipe: Recipe) -> dict[str, PackedMatrix]:
    """Maps the file read-only; raises BadPack, saying why, or FileNotFoundError.

    The matrices, by their names, keep the mapping alive. Nobody may write to the file while it has
    this name.
    """
    with path.open("rb") as file:
        facts = os.fstat(file.fileno())
        if facts.st_size < _FIXED.size:
            raise BadPack(f"{path}: {facts.st_size} bytes are too few")
        mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    with suppress(OSError):  # a kernel without huge pages
        mapping.madvise(mmap.MADV_HUGEPAGE)
    header = _read_header(path, mapping)
    if header.get("recipe") != asdict(recipe):
        raise BadPack(f"{path}: made by another recipe, {header.get('recipe')}")
    if header["file_bytes"] != facts.st_size:
        raise BadPack(f"{path}: {facts.st_size} bytes, but the header says {header['file_bytes']}")
    matrices = {
        name: _view(path, mapping, name, entry) for name, entry in header["matrices"].items()
    }
    mark = path.with_name(path.name + ".verified")
    state = f"{_BOOT_ID.read_text().strip()} {facts.st_ino} {facts.st_mtime_ns} {facts.st_size}"
    if not (mark.exists() and mark.read_text() == state):
        for name, matrix in matrices.items():
            if _native.crc32c(matrix.data) != header["matrices"][name]["crc32c"]:
                raise BadPack(f"{path}: {name}: its bytes do not fit their checksum")
        with suppress(OSError):  # a directory that others wrote is read each time
            mark.write_text(state)
    return matrices


def _write(
    file: BinaryIO, recipe: Recipe, names: list[str], matrices: Iterable[PackedMatrix]
) -> None:
    header_bytes = _aligned(_FIXED.size + 1024 + 256 * len(names)) - _FIXED.size
    offset = _FIXED.size + header_bytes
    entries: dict[str, Any] = {}
    for name, matrix in zip(names, matrices, strict=True):
        file.seek(offset)
        file.write(matrix.data.data)
        entries[name] = {
            "format": matrix.format, "rows": matrix.rows, "cols": matrix.cols,
            "group": matrix.group, "offset": offset, "bytes": matrix.data.size,
            "crc32c": _native.crc32c(matrix.data),
        }  # fmt: skip
        offset = _aligned(offset + matrix.data.size)
    file.truncate(offset)
    header = {"recipe": asdict(recipe), "file_bytes": offset, "matrices": entries}
    text = json.dumps(header).encode().ljust(header_bytes)
    assert len(text) == header_bytes, "room for the header was reckoned too small"
    file.seek(0)
    file.write(_FIXED.pack(MAGIC, header_bytes, _native.crc32c(text)) + text)


def _read_header(path: Path, mapping: mmap.mmap) -> dict[str, Any]:
    magic, length, checksum = _FIXED.unpack(mapping[: _FIXED.size])
    if magic != MAGIC:
        raise BadPack(f"{path}: not a file of packed weights")
    text = mapping[_FIXED.size : _FIXED.size + min(length, HEADER_BYTES_MAX)]
    if len(text) != length or _native.crc32c(text) != checksum:
        raise BadPack(f"{path}: its header does not fit its checksum")
    header: dict[str, Any] = json.loads(text)
    return header


def _view(path: Path, mapping: mmap.mmap, name: str, entry: dict[str, Any]) -> PackedMatrix:
    start, count = entry["offset"], entry["bytes"]
    if start % ALIGNMENT or start + count > len(mapping):
        raise BadPack(f"{path}: {name}: outside the file")
    data = np.frombuffer(mapping, np.uint8, count, start)
    return PackedMatrix(entry["format"], entry["rows"], entry["cols"], entry["group"], data)


def _aligned(offset: int) -> int:
    return -(-offset // ALIGNMENT) * ALIGNMENT


def _sync_directory(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Turns an OSError into a ConfigError that names the option and the path."""
    try:
        yield
    except OSError as error:
        reason = "the disk is full" if error.errno == errno.ENOSPC else error.strerror
        raise ConfigError(f"weights_cache: cannot write {path}: {reason}") from error
