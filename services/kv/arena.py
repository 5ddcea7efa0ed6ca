"""The arena: one file in shared memory that holds every page, its header and the stream records.

    [ superblock 4 KiB | page headers | stream records | pages ]

The kv-store creates it; prefill and decode map it. It outlives all of them: it is a plain file with
`mmap`, never `multiprocessing.shared_memory`, whose tracker unlinks the segment of a killed reader.
Page ids run group by group, `group * blocks + block`, so that neighbouring blocks of one layer group
are one contiguous run, for reading and for coalesced transfer.
"""

from __future__ import annotations

import json
import mmap
import os
import struct
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from services import _native
from services.kv import locks
from services.kv.layout import PAGE_TOKENS, KvLayout, blocks_for
from services.ops.errors import ConfigError, LayoutMismatch, Unavailable

MAGIC = b"BATONKV4"
SUPERBLOCK_BYTES = 4096
FREE, OPEN, SEALED = range(3)

# The first cache line of a page's header: written by the kv-store alone.
OWN = np.dtype(
    [
        ("magic", "<u4"),
        ("version", "<u2"),
        ("group", "<u2"),
        ("block", "<u4"),
        ("lease", "<u4"),
        ("owner", "<u8"),
        ("stamp", "<u8"),
        ("writer", "V16"),
        ("epoch", "<u4"),
        ("quarantined", "<u4"),
        ("own_crc", "<u4"),
        ("own_padding", "<u4"),
    ]
)
HEADER = np.dtype(
    [
        *OWN.descr,
        ("state", "<u4"),
        ("tokens", "<u4"),
        ("key", "V16"),
        ("checksum", "<u4"),
        ("padding", "V36"),
        ("row_crc", "<u4", (PAGE_TOKENS,)),
    ]
)
assert OWN.itemsize == 64
assert HEADER.itemsize == _native.PAGE_HEADER_BYTES
PAGE_MAGIC = 0x31475042


@dataclass(frozen=True)
class ArenaPlan:
    """Where everything lies in an arena file; all offsets in bytes."""

    layout: KvLayout
    blocks: int
    streams: int
    record_bytes: int
    max_context: int
    fingerprint: str
    store_id: str
    one_class: bool = True  # prefill and decode compute the same bits
    headers_offset: int = SUPERBLOCK_BYTES

    @cached_property
    def pages(self) -> int:
        return self.blocks * self.layout.groups

    @cached_property
    def records_offset(self) -> int:
        return self.headers_offset + _align(self.pages * HEADER.itemsize, 4096)

    @cached_property
    def pages_offset(self) -> int:
        return self.records_offset + _align(self.streams * self.record_bytes, 4096)

    @property
    def total_bytes(self) -> int:
        return self.pages_offset + self.pages * self.layout.page_bytes

    @property
    def max_blocks(self) -> int:
        return blocks_for(self.max_context)


def _align(n: int, to: int) -> int:
    return -(-n // to) * to


def plan_arena(
    layout: KvLayout,
    *,
    arena_bytes: int,
    streams: int,
    record_bytes: int,
    max_context: int,
    fingerprint: str,
    store_id: str,
    one_class: bool = True,
) -> ArenaPlan:
    """Fits as many blocks as `arena_bytes` allow. Raises ConfigError when not even one request fits."""

    def plan(blocks: int) -> ArenaPlan:
        return ArenaPlan(
            layout, blocks, streams, record_bytes, max_context, fingerprint, store_id, one_class
        )

    per_block = layout.groups * (layout.page_bytes + HEADER.itemsize)
    blocks = max(0, (arena_bytes - plan(0).total_bytes) // per_block)
    while blocks > 0 and plan(blocks).total_bytes > arena_bytes:
        blocks -= 1
    if blocks < 2:
        raise ConfigError(f"arena_bytes: {arena_bytes} holds fewer than two blocks of 64 tokens")
    return plan(blocks)


def create_arena(directory: Path, plan: ArenaPlan) -> Arena:
    """Makes the arena file, all its memory reserved, visible only when it is complete.

    Raises ConfigError when the file system is too small.
    """
    directory.mkdir(parents=True, exist_ok=True)
    locks.prepare(directory)
    path, unfinished = directory / "arena", directory / "arena.new"
    fd = os.open(unfinished, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o660)
    try:
        os.posix_fallocate(fd, 0, plan.total_bytes)
    except OSError as error:
        os.close(fd)
        unfinished.unlink()
        raise ConfigError(
            f"arena_bytes: {plan.total_bytes} bytes do not fit into {directory}: {error.strerror}"
        ) from error
    text = json.dumps({**asdict(plan)}).encode()
    os.pwrite(fd, MAGIC + struct.pack("<I", len(text)) + text, 0)
    os.close(fd)
    arena = Arena(directory, unfinished.name)
    own = arena.own_headers
    own["magic"] = PAGE_MAGIC
    own["version"] = 1
    own["group"] = np.repeat(np.arange(plan.layout.groups), plan.blocks)
    own["block"] = np.tile(np.arange(plan.blocks), plan.layout.groups)
    own["own_crc"] = own_crcs(own)
    unfinished.rename(path)
    return arena


def own_crcs(own: NDArray[np.void]) -> NDArray[np.uint32]:
    """What `own_crc` of each of these `OWN` headers must be."""
    size = int(OWN.fields["own_crc"][1])  # type: ignore[index]
    raw = np.ascontiguousarray(own).view(np.uint8).reshape(-1, OWN.itemsize)[:, :size]
    return np.array([_native.crc32c(bytes(line), 0) for line in raw], np.uint32)


def read_plan(path: Path) -> ArenaPlan:
    """The plan in a file's superblock. Raises Unavailable or LayoutMismatch."""
    try:
        with path.open("rb") as file:
            head = file.read(SUPERBLOCK_BYTES)
    except FileNotFoundError:
        raise Unavailable(f"arena_dir: no arena at {path}") from None
    if head[: len(MAGIC)] != MAGIC:
        raise LayoutMismatch(f"arena_dir: {path} is not an arena of this version")
    (size,) = struct.unpack_from("<I", head, len(MAGIC))
    fields = json.loads(head[len(MAGIC) + 4 : len(MAGIC) + 4 + size])
    return ArenaPlan(**{**fields, "layout": KvLayout(**fields["layout"])})


def geometry(
    layout: KvLayout, headers_offset: int, pages_offset: int, pages: int
) -> _native.Geometry:
    """Where the native code finds so many pages in a buffer."""
    return _native.Geometry(
        header_offset=headers_offset, pages_offset=pages_offset, page_bytes=layout.page_bytes,
        page_count=pages, layers=layout.layers, layers_per_group=layout.layers_per_group,
        kv_heads=layout.kv_heads, head_dim=layout.head_dim, element_bytes=layout.dtype.itemsize,
    )  # fmt: skip


class Arena:
    """A mapping of one arena. Any number of processes hold one; each page has one writer at a time."""

    def __init__(self, directory: Path, name: str = "arena") -> None:
        self.directory = directory
        self.plan = read_plan(directory / name)
        with (directory / name).open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), self.plan.total_bytes)
        plan, layout = self.plan, self.plan.layout
        self.headers: NDArray[np.void] = np.ndarray(
            (plan.pages,), HEADER, self._map, plan.headers_offset
        )
        self.row_crcs: NDArray[np.uint32] = self.headers["row_crc"]
        # Only the kv-store may write these.
        self.own_headers: NDArray[np.void] = np.ndarray(
            (plan.pages,), OWN, self._map, plan.headers_offset, (HEADER.itemsize,)
        )
        self._pages: NDArray[np.generic] = np.ndarray(
            (plan.pages, *layout.page_shape), layout.dtype, self._map, plan.pages_offset
        )
        self.native = _native.Arena(
            self._map,
            geometry(layout, plan.headers_offset, plan.pages_offset, plan.pages),
        )

    @property
    def layout(self) -> KvLayout:
        return self.plan.layout

    @property
    def buffer(self) -> mmap.mmap:
        return self._map

    def page_id(self, block: int, group: int) -> int:
        return group * self.plan.blocks + block

    def page(self, page_id: int) -> NDArray[np.generic]:
        """A writable view of one page; only its leaseholder may write it."""
        return self._pages[page_id]  # type: ignore[no-any-return]

    def run(self, group: int, block: int, count: int) -> memoryview:
        """The bytes of `count` neighbouring blocks of one group, as one contiguous frame."""
        start = self.plan.pages_offset + self.page_id(block, group) * self.layout.page_bytes
        return memoryview(self._map)[start : start + count * self.layout.page_bytes]

    def table(self, blocks: NDArray[np.uint32]) -> NDArray[np.uint32]:
        """uint32[len(blocks), groups]: the page ids of these blocks."""
        groups = np.arange(self.layout.groups, dtype=np.uint32) * np.uint32(self.plan.blocks)
        return blocks[:, None] + groups[None, :]

    def require(self, layout: KvLayout, fingerprint: str) -> None:
        """Refuses, with words, an arena of another layout, model, codec or numerics class."""
        if self.layout != layout:
            raise LayoutMismatch(
                f"layout: arena has {self.layout.describe()}, this process {layout.describe()}"
            )
        if self.plan.fingerprint != fingerprint:
            raise LayoutMismatch(
                f"fingerprint: arena has {self.plan.fingerprint}, this process {fingerprint}; "
                "model, dtype or device class differ"
            )
