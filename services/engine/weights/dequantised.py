"""Weights in a format as float32 tensors, or as codes and scales, for backends to compare with."""

from __future__ import annotations

from collections.abc import Mapping

from services.engine.checkpoint import WeightView
from services.engine.model import ModelConfig
from services.engine.weights.cache import packed, quantised
from services.engine.weights.formats import QuantisedMatrix
from services.engine.weights.plan import items


def dequantised(
    config: ModelConfig, weights: Mapping[str, WeightView], format: str
) -> dict[str, WeightView]:
    """The tensors with every packed matrix as the float32 numbers that its packing stands for."""
    rounded = {
        item.tensor: packed(item, weights[item.tensor]).unpacked() for item in items(config, format)
    }
    return {**weights, **{name: WeightView("F32", w.shape, w) for name, w in rounded.items()}}


def with_codes(
    config: ModelConfig, weights: Mapping[str, WeightView], format: str
) -> dict[str, WeightView | QuantisedMatrix]:
    """The tensors with int8 or int4 matrices as codes and scales."""
    return {
        **weights,
        **{item.tensor: quantised(item, weights[item.tensor]) for item in items(config, format)},
    }
