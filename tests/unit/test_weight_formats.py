"""What the weight formats promise: exact arithmetic, bounded errors, the same codes everywhere."""

from __future__ import annotations

import ctypes
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.engine.checkpoint import LM_HEAD
from services.engine.errors import ModelError
from services.engine.packed import PackedMatrix
from services.engine.weights.formats import (
    CODE_RANGE,
    F32,
    QuantisedMatrix,
    from_bf16,
    fused_multiply_add,
    grouped,
    product,
    quantise_rows,
    round_to_bf16,
)
from services.engine.weights.names import ROUNDING_VERSION
from services.engine.weights.plan import group_of
from services.engine.weights.rounding import SLICE_GROUPS, quantise

every_format = pytest.mark.parametrize("format", sorted(CODE_RANGE))
seeds = st.integers(0, 2**32 - 1)


def draw(seed: int, *shape: int) -> F32:
    """Normal draws, some rows a thousand times as wide as others."""
    generator = np.random.default_rng(seed)
    wide = np.exp(generator.uniform(-4, 3, (shape[0], 1)))
    return (generator.standard_normal(shape) * wide).astype(np.float32)


@given(seeds)
def test_fused_multiply_add_rounds_once(seed: int) -> None:
    """It is the C library's fmaf, also where a sum in double precision would round twice."""
    generator = np.random.default_rng(seed)
    a, b = (generator.integers(-(2**24), 2**24, 64).astype(np.float32) for _ in "ab")
    scale = np.exp2(generator.integers(-40, 40, 64)).astype(np.float32)
    c = (generator.standard_normal(64) * scale * np.abs(a * b)).astype(np.float32)
    near = np.float32(1) + np.exp2(np.float32(-24))
    a, b, c = np.append(a, 1 + near), np.append(b, near), np.append(c, np.float32(2**-60))
    fmaf = ctypes.CDLL("libm.so.6").fmaf
    fmaf.restype, fmaf.argtypes = ctypes.c_float, [ctypes.c_float] * 3
    expected = np.array([fmaf(*three) for three in zip(a, b, c, strict=True)], np.float32)
    assert fused_multiply_add(a, b, c).tobytes() == expected.tobytes()


def test_a_sum_that_rounds_twice_in_double_is_met() -> None:
    """The case that a float64 product and sum get wrong, so that the test above can fail."""
    a, b, c = (np.array([x], np.float32) for x in (1 + 2**-23, 1 + 2**-23, 2**-78))
    a, b = a * np.float32(2**24), b  # a b = 2^24 + 4 + 2^-22, and half a unit is 1
    doubled = (a.astype(np.float64) * b + c).astype(np.float32)
    assert fused_multiply_add(a, b, c)[0] >= doubled[0]


@every_format
@given(seed=seeds, cols=st.integers(1, 100), group=st.sampled_from([32, 64, 128]))
def test_every_weight_is_near_its_code(format: str, seed: int, cols: int, group: int) -> None:
    """No weight is further from its value than half a step, but for those clipped at the range."""
    weights = draw(seed, 5, cols)
    weights[4] *= np.float32(1e-5)
    matrix = quantise(format, weights, group)
    low, high = CODE_RANGE[format]
    assert low <= matrix.codes.min() <= matrix.codes.max() <= high
    step = np.abs(np.repeat(matrix.scales, group, axis=1)[:, :cols].astype(np.float32))
    inside = (matrix.codes > low) & (matrix.codes < high)
    least = 8 * 2.0**-24  # a code's worth of float16's smallest scale
    error = np.abs(matrix.dequantised() - weights) - least
    assert (error[inside] <= step[inside] * 0.5001).all()
    assert (error[~inside] <= step[~inside] * (0.501 if format == "int8" else 2.0)).all()


@given(seeds)
def test_int4_is_better_than_rounding_to_the_largest_weight(seed: int) -> None:
    """The scale that was searched for leaves less than nine tenths of the plain scale's error."""
    weights = np.random.default_rng(seed).standard_normal((64, 128)).astype(np.float32)
    searched = quantise("int4", weights, 32).dequantised()
    by_group = grouped(weights, 32)
    scale = np.abs(by_group).max(-1, keepdims=True) / 7
    plain = (np.rint(by_group / scale).clip(-8, 7) * scale).reshape(weights.shape)
    assert np.square(searched - weights).sum() < 0.9 * np.square(plain - weights).sum()


@pytest.mark.parametrize(
    ("format", "tensor", "codes"),
    [("int8", "", 1217217764), ("int8", LM_HEAD, 641457102), ("int4", "", 3760511173)],
)
def test_other_codes_are_another_version(format: str, tensor: str, codes: int) -> None:
    """Two hosts whose codes differ must not call their weights by one name: who changes what this test
    pins raises ROUNDING_VERSION."""
    numbers = (np.arange(96 * 320, dtype=np.uint32) * np.uint32(2654435761)).astype(np.int32)
    weights = numbers.astype(np.float32).reshape(96, 320) / np.float32(2**31)
    matrix = quantise(format, weights * weights * weights, group_of(format, tensor))
    found = zlib.crc32(matrix.codes.tobytes() + matrix.scales.tobytes())
    assert (ROUNDING_VERSION, found) == (2, codes)


@every_format
def test_codes_do_not_depend_on_how_the_work_was_cut(format: str) -> None:
    """A row's codes are the same alone, in company, and with any number of threads."""
    weights = draw(3, SLICE_GROUPS + 70, 40)
    whole = quantise(format, weights, 32, threads=1)
    shared = quantise(format, weights, 32, threads=3)
    assert whole.codes.tobytes() == shared.codes.tobytes()
    assert whole.scales.tobytes() == shared.scales.tobytes()
    for row in (0, SLICE_GROUPS // 2, len(weights) - 1):
        alone = quantise(format, weights[row : row + 1], 32)
        assert alone.codes.tobytes() == whole.codes[row].tobytes()
        assert alone.scales.tobytes() == whole.scales[row].tobytes()


@every_format
def test_zeros_stay_zeros(format: str) -> None:
    """A group of zeros, or of numbers too small for a scale, is zero and not a NaN."""
    weights = np.array([[0.0] * 32 + [1e-40] * 32 + [1.0] * 7], np.float32)
    values = quantise(format, weights, 32).dequantised()
    assert (values[0, :64] == 0).all()
    assert np.allclose(values[0, 64:], 1, atol=1e-3)


@every_format
@pytest.mark.parametrize(("bad", "words"), [(np.nan, "finite"), (np.inf, "finite"), (1e9, "large")])
def test_weights_that_no_code_can_stand_for_are_refused(
    format: str, bad: float, words: str
) -> None:
    """Rather than served as something else."""
    weights = np.ones((2, 32), np.float32)
    weights[1, 5] = bad
    with pytest.raises(ModelError, match=words):
        quantise(format, weights, 32)


@every_format
@given(seed=seeds, cols=st.integers(1, 200))
def test_a_product_is_near_that_of_the_plain_numbers(format: str, seed: int, cols: int) -> None:
    """The integer arithmetic is that of the dequantised weights and activations."""
    x, matrix = draw(seed, 3, cols), quantise(format, draw(seed + 1, 7, cols), 32)
    codes, scales = quantise_rows(x, 32)
    plain = (codes * scales[:, :, None].astype(np.float64)).reshape(3, -1)[:, :cols]
    expected = plain @ matrix.dequantised().T.astype(np.float64)
    bound = np.abs(plain) @ np.abs(matrix.dequantised().T) * 1e-6
    assert (np.abs(product(x, matrix) - expected) <= bound).all()
    assert (np.abs(plain - x) <= np.abs(x).max(axis=1, keepdims=True) / 127 * 0.51).all()


def test_activations_that_are_not_finite_fail_visibly() -> None:
    """An infinity in one group makes its row NaN, and no other."""
    x = np.ones((2, 64), np.float32)
    x[1, 40] = np.inf
    result = product(x, quantise("int8", np.ones((4, 64), np.float32), 32))
    assert np.isfinite(result[0]).all()
    assert np.isnan(result[1]).all()


@every_format
@given(seed=seeds, rows=st.integers(1, 70), cols=st.integers(1, 150))
def test_a_packed_matrix_stands_for_the_same_numbers(
    format: str, seed: int, rows: int, cols: int
) -> None:
    """Packing moves codes about and changes none."""
    matrix = quantise(format, draw(seed, rows, cols), 32)
    packed = PackedMatrix.of_codes(format, matrix.codes, matrix.scales, matrix.group)
    assert packed.unpacked().tobytes() == np.ascontiguousarray(matrix.dequantised()).tobytes()


def test_bits_per_weight_count_the_scales() -> None:
    """8.5 and 4.5 bits for groups of 32."""
    shape = (4, 256)
    scales = np.ones((4, 8), np.float16)
    for format, expected in (("int8", 8.5), ("int4", 4.5)):
        matrix = QuantisedMatrix(format, np.zeros(shape, np.int8), scales, 32)
        assert matrix.bits_per_weight == expected


@given(seeds)
def test_bf16_is_the_nearest(seed: int) -> None:
    """No other bfloat16 is nearer, and ties go to the even one."""
    bits = np.random.default_rng(seed).integers(0, 2**31 - 2**24, 100, np.uint32)
    x = bits.view(np.float32)
    rounded = round_to_bf16(x).astype(np.int64)
    error = np.abs(from_bf16(rounded.astype(np.uint16)).astype(np.float64) - x)
    for other in (rounded - 1, rounded + 1):
        distance = np.abs(from_bf16(other.clip(0).astype(np.uint16)).astype(np.float64) - x)
        tie = distance == error
        assert (error <= distance).all()
        assert (rounded[tie & (other != rounded) & (other >= 0)] % 2 == 0).all()
