"""How a matrix's bytes lie in the packed file: for the native kernels, or plainly, to be read again.

    native   what `_native.pack` gives: interleaved for the kernels, the same on every instruction set
    plain    [ codes int8, row-major ][ scales float16, row-major ], or bfloat16 row-major

The plain one serves the reference backends and the tests; both hold the same codes and scales.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from services import _native
from services.engine.weights.formats import QuantisedMatrix, groups_of
from services.engine.weights.packedfile import PackedMatrix

Bf16Matrix = NDArray[np.uint16]


class Packing(Protocol):
    """A layout, by a name and a version that is raised when its bytes change."""

    name: str
    version: int

    def pack(self, matrix: QuantisedMatrix | Bf16Matrix) -> PackedMatrix: ...


@dataclass(frozen=True)
class NativePacking:
    """The kernels' own layout."""

    name: str = "native"
    version: int = getattr(_native, "PACK_VERSION", 0)

    def pack(self, matrix: QuantisedMatrix | Bf16Matrix) -> PackedMatrix:
        format, codes, scales, group = _parts(matrix)
        data = np.frombuffer(_native.pack(format, codes, scales, group), np.uint8)
        return PackedMatrix(format, len(codes), codes.shape[1], group, data)


@dataclass(frozen=True)
class PlainPacking:
    """Codes, then scales."""

    name: str = "plain"
    version: int = 1

    def pack(self, matrix: QuantisedMatrix | Bf16Matrix) -> PackedMatrix:
        format, codes, scales, group = _parts(matrix)
        parts = [codes] if scales is None else [codes, scales]
        data = np.concatenate([part.reshape(-1).view(np.uint8) for part in parts])
        return PackedMatrix(format, len(codes), codes.shape[1], group, data)


def unpack(packed: PackedMatrix) -> QuantisedMatrix | Bf16Matrix:
    """What `PlainPacking` packed."""
    shape = (packed.rows, packed.cols)
    if packed.format == "bf16":
        return packed.data.view(np.uint16).reshape(shape)
    count = packed.rows * packed.cols
    codes = packed.data[:count].view(np.int8).reshape(shape)
    scales = packed.data[count:].copy().view(np.float16)  # after odd sizes they are not aligned
    scales = scales.reshape(packed.rows, groups_of(packed.cols, packed.group))
    return QuantisedMatrix(packed.format, codes, scales, packed.group)


def _parts(matrix: QuantisedMatrix | Bf16Matrix) -> tuple[str, Any, Any, int]:
    if isinstance(matrix, QuantisedMatrix):
        return matrix.format, matrix.codes, matrix.scales, matrix.group
    return "bf16", np.ascontiguousarray(matrix), None, 0
