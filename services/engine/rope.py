"""Rotary position embedding: frequencies and tables, once per model, in numpy alone.

The formulas are those of `transformers.modeling_rope_utils`, step by step in float32, since one
unit in the last place of a frequency becomes a thousand of them at position 1000. Powers, cosines
and sines are taken in float64 and rounded once: a table does not depend on the instruction set.
Knows nothing of devices; a backend uploads the tables.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from services.engine.model import ModelConfig, RopeConfig

F32 = NDArray[np.float32]


def rope_frequencies(rope: RopeConfig, head_dim: int) -> tuple[F32, float]:
    """float32[head_dim // 2], radians per position, and the factor on cos and sin."""
    return _KINDS[rope.kind](rope, head_dim)


def rope_tables(config: ModelConfig, positions: int) -> tuple[F32, F32]:
    """cos and sin, float32[positions, head_dim // 2] each, for positions 0 .. positions - 1.

    Dimension i is rotated with dimension i + head_dim / 2 ("rotate half"):

        out[i]         = x[i] * cos[p, i] - x[i + D/2] * sin[p, i]
        out[i + D/2]   = x[i + D/2] * cos[p, i] + x[i] * sin[p, i]
    """
    frequencies, attention_factor = rope_frequencies(config.rope, config.head_dim)
    angles = np.arange(positions, dtype=np.float32)[:, None] * frequencies
    wide = angles.astype(np.float64)
    factor = np.float32(attention_factor)
    return np.cos(wide).astype(np.float32) * factor, np.sin(wide).astype(np.float32) * factor


def _periods(theta: float, head_dim: int) -> F32:
    """theta ** (2i / head_dim): radians are positions divided by these."""
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    power: F32 = np.power(np.float64(np.float32(theta)), exponents.astype(np.float64)).astype(
        np.float32
    )
    return power


def _default(rope: RopeConfig, head_dim: int) -> tuple[F32, float]:
    return np.float32(1) / _periods(rope.theta, head_dim), 1.0


def _linear(rope: RopeConfig, head_dim: int) -> tuple[F32, float]:
    """Positions are squeezed by the factor (Chen et al. 2023, position interpolation)."""
    return _default(rope, head_dim)[0] / np.float32(rope.factor), 1.0


def _dynamic(rope: RopeConfig, head_dim: int) -> tuple[F32, float]:
    """NTK scaling at the configured length, where it equals the unscaled frequencies.

    It grows the base only past `max_context`, and then a token's K would depend on how long its
    sequence has become: stored pages could not be reused. So the context ends at `max_context`.
    """
    return _default(rope, head_dim)


def _llama3(rope: RopeConfig, head_dim: int) -> tuple[F32, float]:
    """Long waves are slowed by the factor, short ones kept, those between interpolated."""
    plain = _default(rope, head_dim)[0]
    original, factor = np.float32(rope.original_context), np.float32(rope.factor)
    low, high = np.float32(rope.low_freq_factor), np.float32(rope.high_freq_factor)
    wavelength = np.float32(2 * math.pi) / plain
    long_wave = wavelength > np.float32(rope.original_context / rope.low_freq_factor)
    short_wave = wavelength < np.float32(rope.original_context / rope.high_freq_factor)
    smooth = (original / wavelength - low) / (high - low)
    between = (1 - smooth) * plain / factor + smooth * plain
    return np.where(long_wave, plain / factor, np.where(short_wave, plain, between)), 1.0


def _yarn(rope: RopeConfig, head_dim: int) -> tuple[F32, float]:
    """YaRN (Peng et al. 2023, arXiv 2309.00071), NTK by parts."""
    periods = _periods(rope.theta, head_dim)
    low, high = _yarn_range(rope, head_dim)
    steps = np.arange(head_dim // 2, dtype=np.float32)
    ramp = np.clip((steps - np.float32(low)) / np.float32(high - low), 0, 1)
    keep = 1 - ramp
    slowed = np.float32(1) / (np.float32(rope.factor) * periods)
    frequencies = slowed * (1 - keep) + (np.float32(1) / periods) * keep
    return frequencies.astype(np.float32), _yarn_attention_factor(rope)


def _yarn_range(rope: RopeConfig, head_dim: int) -> tuple[float, float]:
    """The dimensions between which the ramp runs, from the turns made in the original context."""

    def dimension(turns: float) -> float:
        span = math.log(rope.original_context / (turns * 2 * math.pi))
        return head_dim * span / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    return low, high + 0.001 if low == high else high


def _yarn_attention_factor(rope: RopeConfig) -> float:
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return _mscale(rope.factor, rope.mscale) / _mscale(rope.factor, rope.mscale_all_dim)
    return _mscale(rope.factor, 1.0)


def _mscale(factor: float, weight: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


_KINDS: dict[str, Callable[[RopeConfig, int], tuple[F32, float]]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
}
