"""Pages in one process's own memory, for those who compute without a store: the reference, benchmarks
and tests. Knows neither records nor leases; nobody else reads them."""

from __future__ import annotations

import mmap

import numpy as np
from numpy.typing import NDArray

from services import _native
from services.kv.arena import geometry
from services.kv.layout import KvLayout


class HeapPages:
    """`count` pages, laid out as in an arena: [ headers | pages ], the pages on a page boundary.

    fill: what every byte is at first. mapped: the memory is a mapping of its own, as an arena's is.
    """

    def __init__(
        self, layout: KvLayout, count: int, *, fill: int = 0, mapped: bool = False
    ) -> None:
        self._layout = layout
        offset = -(-count * _native.PAGE_HEADER_BYTES // mmap.PAGESIZE) * mmap.PAGESIZE
        size = offset + count * layout.page_bytes
        self.buffer: NDArray[np.uint8] = (
            np.frombuffer(mmap.mmap(-1, size), np.uint8) if mapped else np.zeros(size, np.uint8)
        )
        if fill:
            self.buffer[:] = fill
        pages = self.buffer[offset:].view(layout.dtype)
        self.array: NDArray[np.generic] = pages.reshape(count, *layout.page_shape)
        self.native = _native.Arena(self.buffer, geometry(layout, 0, offset, count))

    @property
    def layout(self) -> KvLayout:
        return self._layout

    @property
    def table(self) -> NDArray[np.uint32]:
        """[1, blocks, groups]: all pages, for one sequence."""
        ids = np.arange(len(self.array), dtype=np.uint32)
        return ids.reshape(1, -1, self._layout.groups)

    def page(self, page_id: int) -> NDArray[np.generic]:
        page: NDArray[np.generic] = self.array[page_id]
        return page
