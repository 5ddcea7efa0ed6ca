"""A matrix packed for the native engine: codes and scales in the order in which its kernels read them.

The layout is `native/packed.h`. Knows nothing of files: the bytes may be an array or a mapping.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from services import _native

PACK_VERSION: int = _native.PACK_VERSION


@dataclass(frozen=True)
class PackedMatrix:
    """A matrix [rows, cols] in `format`: bf16, int8 or int4.

    group: columns under one scale, 32, 64 or 128; 0 for bf16.
    data: the packed bytes, on 64 bytes, read-only to everybody.
    """

    format: str
    rows: int
    cols: int
    group: int
    data: NDArray[np.uint8]

    @classmethod
    def of_codes(
        cls, format: str, codes: NDArray[np.int8], scales: NDArray[np.float16], group: int
    ) -> PackedMatrix:
        """Packs codes [rows, cols] with scales [rows, ceil(cols / group)]: weight = code * scale.

        ValueError for codes out of the format's range, -127..127 or -8..7, or another shape.
        """
        return cls._packed(format, codes, scales, group)

    @classmethod
    def of_bf16(cls, weights: NDArray[np.uint16]) -> PackedMatrix:
        """Packs bf16 weights, given as their bits, [rows, cols]."""
        return cls._packed("bf16", weights, None, 0)

    @classmethod
    def _packed(cls, format: str, matrix: Any, scales: Any, group: int) -> PackedMatrix:
        rows, cols = matrix.shape
        data = aligned_bytes(_native.packed_bytes(format, rows, cols, group))
        _native.pack(format, matrix, scales, group, data)
        return cls(format, rows, cols, group, data)

    def unpacked(self) -> NDArray[np.float32]:
        """The weights, float32[rows, cols]."""
        weights: NDArray[np.float32] = _native.unpack(
            self.format, self.data, self.rows, self.cols, self.group
        )
        return weights

    def native(self) -> tuple[str, int, int, int, NDArray[np.uint8]]:
        """What the native engine takes."""
        return self.format, self.rows, self.cols, self.group, self.data


def aligned_bytes(size: int) -> NDArray[np.uint8]:
    """Fresh bytes on a cache line."""
    room = np.empty(size + 64, np.uint8)
    start = -room.ctypes.data % 64
    return room[start : start + size]
