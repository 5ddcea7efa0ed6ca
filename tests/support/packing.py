"""Weights packed by plain rounding: for tests of kernels, not of accuracy."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from services.engine.checkpoint import EMBEDDING, WeightView
from services.engine.model import ModelConfig
from services.engine.native_backend import Weight
from services.engine.packed import PackedMatrix

FORMATS = ("bf16", "int8", "int4")


def packed(format: str, matrix: NDArray[np.float32], group: int = 64) -> PackedMatrix:
    """A float32 matrix in `format`, each group scaled by its largest value."""
    if format == "bf16":
        wide = np.ascontiguousarray(matrix, np.float32).view(np.uint32)
        return PackedMatrix.of_bf16(((wide + 0x7FFF + ((wide >> 16) & 1)) >> 16).astype(np.uint16))
    top = 7 if format == "int4" else 127
    groups = -(-matrix.shape[1] // group)
    padded = np.pad(matrix, ((0, 0), (0, groups * group - matrix.shape[1])))
    cut = padded.reshape(len(matrix), groups, group)
    scales = (np.abs(cut).max(-1) / top).astype(np.float16)
    codes = np.rint(cut / np.maximum(scales, np.float16(1e-7))[..., None].astype(np.float32))
    flat = np.clip(codes, -top, top).astype(np.int8).reshape(padded.shape)[:, : matrix.shape[1]]
    return PackedMatrix.of_codes(format, np.ascontiguousarray(flat), scales, group)


def pack_model(
    config: ModelConfig, weights: Mapping[str, WeightView], format: str, group: int = 64
) -> dict[str, Weight]:
    """All matrices of a float32 model packed, but for the embedding."""
    return {
        name: packed(format, view.array, group)
        if len(view.shape) == 2 and name != EMBEDDING
        else view
        for name, view in weights.items()
    }


def unpack_model(weights: Mapping[str, Weight]) -> dict[str, WeightView]:
    """The same weights as plain float32 matrices."""
    return {
        name: WeightView("F32", (weight.rows, weight.cols), weight.unpacked())
        if isinstance(weight, PackedMatrix)
        else weight
        for name, weight in weights.items()
    }


def random_model(
    config: ModelConfig, shapes: Mapping[str, tuple[int, ...]], seed: int
) -> dict[str, WeightView]:
    """Float32 weights drawn so that activations stay near 1."""
    rng = np.random.default_rng(seed)
    weights = {}
    for name, shape in shapes.items():
        drawn = rng.standard_normal(shape, np.float32)
        if len(shape) == 1:
            drawn = (0.2 * drawn + (1 if "norm" in name else 0)).astype(np.float32)
        else:
            drawn /= np.float32(1 if name == EMBEDDING else shape[1] ** 0.5)
        weights[name] = WeightView("F32", shape, drawn)
    return weights
