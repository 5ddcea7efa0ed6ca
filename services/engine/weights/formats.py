"""The weight formats, in numpy: what a quantised matrix is and what a product with it is, bit by bit.

    as-is   the checkpoint's own matrices, in place
    bf16    bfloat16, 16 bits a weight
    int8    codes -127..127 and a float16 scale for each group of columns of a row
    int4    codes -8..7 and a signed float16 scale likewise; the head is int8

                      group 0      group 1          last group, short if it does not divide cols
    codes  [rows]  [ c c .. c | c c .. c | ... | c .. ]        weight = code * scale of its group
    scales [rows]  [    s     |    s     | ... |  s   ]

A row of activations is quantised to int8 as it arrives, with a scale for the same columns. Integer
products are exact, so a result is the same on every instruction set and in every batch. This module is
the definition; the native kernels are tested against it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

F32 = NDArray[np.float32]

GROUPS = {"bf16": 0, "int8": 64, "int4": 64}  # columns under one scale
HEAD_GROUP = 32
ACTIVATION_CODE_MAX = np.float32(127)
ACTIVATION_MIN = np.float32(1e-30)  # a group whose largest magnitude is below it counts as zero
CODE_RANGE = {"int8": (-127, 127), "int4": (-8, 7)}


@dataclass(frozen=True, eq=False)
class QuantisedMatrix:
    """codes: int8[rows, cols]. scales: float16[rows, ceil(cols / group)], finite, of either sign."""

    format: str
    codes: NDArray[np.int8]
    scales: NDArray[np.float16]
    group: int

    def __post_init__(self) -> None:
        assert self.format in CODE_RANGE
        assert self.codes.dtype == np.int8
        assert self.scales.dtype == np.float16
        assert self.scales.shape == (len(self.codes), groups_of(self.codes.shape[1], self.group))

    @property
    def shape(self) -> tuple[int, int]:
        rows, cols = self.codes.shape
        return rows, cols

    @property
    def bits_per_weight(self) -> float:
        """Scales counted, padding not."""
        code_bits = 4 if self.format == "int4" else 8
        return code_bits + 16 * self.scales.size / max(self.codes.size, 1)

    def dequantised(self) -> F32:
        """float32[rows, cols]; every product of a code and a scale is exact."""
        rows, cols = self.shape
        values = grouped(self.codes, self.group).astype(np.float32) * self.scales[
            :, :, None
        ].astype(np.float32)
        return values.reshape(rows, -1)[:, :cols]


def groups_of(cols: int, group: int) -> int:
    return -(-cols // group)


def grouped(matrix: NDArray[np.generic], group: int) -> NDArray[np.generic]:
    """[rows, groups, group] of [rows, cols]; a short last group is filled with zeros."""
    rows, cols = matrix.shape
    padded = groups_of(cols, group) * group
    if padded != cols:
        matrix = np.concatenate((matrix, np.zeros((rows, padded - cols), matrix.dtype)), axis=1)
    return matrix.reshape(rows, -1, group)


def quantise_rows(x: F32, group: int) -> tuple[NDArray[np.int8], F32]:
    """Activations float32[rows, cols] as codes int8[rows, groups, group] and scales [rows, groups].

        scale = max|x| / 127      code = x * (127 / max|x|), rounded to the nearest, ties to even

    all in float32. A group of (almost) zeros has scale and codes 0; one with a value that is not
    finite has the scale NaN, so that its row fails visibly.
    """
    values = grouped(x, group).astype(np.float32)
    largest = np.abs(values).max(axis=2)
    usable = np.isfinite(largest) & (largest >= ACTIVATION_MIN)
    inverse = np.zeros_like(largest)
    np.divide(ACTIVATION_CODE_MAX, largest, out=inverse, where=usable)
    with np.errstate(invalid="ignore"):
        codes = np.where(usable[:, :, None], np.rint(values * inverse[:, :, None]), 0)
    scales = np.where(usable, largest / ACTIVATION_CODE_MAX, np.float32(0))
    scales[~np.isfinite(largest)] = np.nan
    return codes.astype(np.int8), scales


def product(x: F32, matrix: QuantisedMatrix) -> F32:
    """float32[R, rows]: x [R, cols] times the matrix, transposed.

    Over the groups in ascending order, from 0:  sum = fma(dot, x scale * weight scale, sum)

    where `dot` is the exact integer product of the group's codes, which float32 holds exactly
    (128 * 127 * 127 < 2**24), and the product of the scales is rounded to float32.
    """
    codes, scales = quantise_rows(x, matrix.group)
    weight_codes = grouped(matrix.codes, matrix.group)
    total = np.zeros((len(x), len(matrix.codes)), np.float32)
    for at in range(scales.shape[1]):
        here = codes[:, at].astype(np.float32)
        dot = here @ weight_codes[:, at].T.astype(np.float32)
        factor = scales[:, at, None] * matrix.scales[None, :, at].astype(np.float32)
        total = fused_multiply_add(dot, factor, total)
    return total


def fused_multiply_add(a: F32, b: F32, c: F32) -> F32:
    """a * b + c in float32, rounded once.

    The product is exact in float64. Their sum is rounded to odd there, which keeps what the second
    rounding needs to know (Boldo and Melquiond 2008, "Emulation of FMA and correctly rounded sums").
    """
    exact, addend = a.astype(np.float64) * b, c.astype(np.float64)
    total = exact + addend
    back = total - exact
    error = (exact - (total - back)) + (addend - back)  # Knuth's two-sum: what `total` lacks
    bits = total.view(np.int64)
    even = (bits & 1) == 0
    grows = (error > 0) == (total > 0)
    step = np.where(grows, 1, -1) * ((error != 0) & even)
    rounded: F32 = (bits + step).view(np.float64).astype(np.float32)
    return rounded


def round_to_bf16(x: F32) -> NDArray[np.uint16]:
    """The nearest bfloat16, ties to even, as its bits. Not for NaN."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = (bits + (np.uint32(0x7FFF) + ((bits >> 16) & 1))) >> 16
    return rounded.astype(np.uint16)


def from_bf16(bits: NDArray[np.uint16]) -> F32:
    return (bits.astype(np.uint32) << 16).view(np.float32)
