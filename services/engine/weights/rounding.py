"""From weights to codes and scales, by the weights alone.

int8 takes the scale from the largest weight of a group. With four bits that leaves too much behind, so
several scales are tried for each group, and the one with the least squared error is kept.

Every step is a float32 operation on single numbers, in a fixed order, so the same weights give the same
codes on every machine: hosts may pack for themselves and still share KV.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from services.engine.errors import ModelError
from services.engine.weights.formats import CODE_RANGE, F32, QuantisedMatrix, grouped, groups_of

# Which code the weight of the largest magnitude is tried at; past the range it is clipped.
INT4_DIVISORS = (5.8, 6.4, 7.0, 7.4, 7.8, 8.2, 8.6, 9.2)
SLICE_GROUPS = 8192  # groups that are worked on at once: 1 MiB of weights, which fits the cache
SCALE_MAX = np.float32(65504)
WEIGHT_MIN = np.float32(1e-30)  # a group of smaller ones is zero, as its scale is in float16


def quantise(format: str, weights: F32, group: int, threads: int = 1) -> QuantisedMatrix:
    """Rounds float32[rows, cols] to int8 or int4. Raises ModelError for weights it cannot hold."""
    if not np.isfinite(weights).all():
        raise ModelError("a weight is not a finite number")
    rows, cols = weights.shape
    by_group = grouped(weights, group).reshape(-1, group)
    codes = np.empty(by_group.shape, np.int8)
    scales = np.empty(len(by_group), np.float16)

    def round_slice(part: slice) -> None:
        columns = np.ascontiguousarray(by_group[part].T)
        found = best_scales(format, columns)
        scales[part] = found
        codes[part] = round_to(format, columns, found).T

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(round_slice, _slices(len(by_group))))
    return QuantisedMatrix(
        format,
        np.ascontiguousarray(codes.reshape(rows, -1)[:, :cols]),
        scales.reshape(rows, groups_of(cols, group)),
        group,
    )


def best_scales(format: str, columns: F32) -> NDArray[np.float16]:
    """float16[N]: a scale for each group of `columns` [group, N]."""
    at = np.abs(columns).argmax(axis=0)
    extreme = np.take_along_axis(columns, at[None], axis=0)[0]
    if format == "int8":
        largest, top = np.abs(extreme), np.float32(CODE_RANGE[format][1])
        scales = _as_scale(largest / top)
        short = largest > scales * (top + np.float32(0.5))  # tiny scales have few bits in float16
        return np.where(short, np.nextafter(scales, np.float16(1)), scales)
    return _as_scale(_search(columns, extreme))


def round_to(format: str, columns: F32, scales: NDArray[np.float16]) -> F32:
    """The codes, as whole float32 numbers, of `columns` [.., N] under scales [N]."""
    low, high = CODE_RANGE[format]
    wide = scales.astype(np.float32)
    inverse = np.zeros_like(wide)
    np.divide(np.float32(1), wide, out=inverse, where=wide != 0)
    codes = columns * inverse
    return np.clip(np.rint(codes, out=codes), low, high, out=codes)


def _search(columns: F32, extreme: F32) -> F32:
    """For each group the scale with the least squared error among those tried.

    For given codes q of weights w the best scale is sum(q w) / sum(q q), and it explains
    sum(q w)**2 / sum(q q) of the sum of squares: the largest such share wins.
    """
    low, high = (np.float32(code) for code in CODE_RANGE["int4"])
    best = np.full(columns.shape[1], -1, np.float32)
    scale = np.zeros_like(best)
    nonzero = np.abs(extreme) >= WEIGHT_MIN
    inverse, share = np.zeros_like(best), np.zeros_like(best)
    np.divide(np.float32(1), extreme, out=inverse, where=nonzero)
    for divisor in INT4_DIVISORS:
        factor = inverse * np.float32(-divisor)
        mixed, square = np.zeros_like(best), np.zeros_like(best)
        for column in columns:
            code = column * factor
            np.rint(code, out=code)
            np.maximum(code, low, out=code)
            np.minimum(code, high, out=code)
            square += code * code
            mixed += code * column
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            fitted = mixed / square
            np.multiply(mixed, fitted, out=share)
        better = nonzero & (square > 0) & (share > best)
        best[better], scale[better] = share[better], fitted[better]
    return scale


def _as_scale(scale: F32) -> NDArray[np.float16]:
    if (np.abs(scale) > SCALE_MAX).any():
        raise ModelError(f"a weight is too large: its scale is past {SCALE_MAX:.0f}")
    return scale.astype(np.float16)


def _slices(count: int) -> Iterator[slice]:
    for start in range(0, count, SLICE_GROUPS):
        yield slice(start, start + SLICE_GROUPS)
