"""Which matrices of a model are packed, each in which format.

The embedding is not among them: its rows are looked up in the checkpoint, where they lie.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from services.engine.checkpoint import LM_HEAD, WeightView
from services.engine.model import ModelConfig
from services.engine.weights.formats import F32, GROUPS, HEAD_GROUP, from_bf16

PROJECTIONS = (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
)  # fmt: skip
SLAB_WEIGHTS = 4 << 20  # converted to float32 at once


@dataclass(frozen=True)
class Item:
    """One matrix to pack: its name in the checkpoint, and what it becomes."""

    tensor: str
    format: str

    @property
    def group(self) -> int:
        return group_of(self.format, self.tensor)


def group_of(format: str, tensor: str = "") -> int:
    """Columns under one scale; the head has its own number of them."""
    return HEAD_GROUP if tensor == LM_HEAD and format != "bf16" else GROUPS[format]


def items(config: ModelConfig, format: str) -> list[Item]:
    """Every packed matrix, in the order of a pass.

    The head of an int4 model is int8: it alone would cost as much accuracy as all layers together. For
    the same reason its groups are smaller.
    """
    layers = [
        Item(f"model.layers.{layer}.{name}.weight", format)
        for layer in range(config.layers)
        for name in PROJECTIONS
    ]
    return [*layers, Item(LM_HEAD, "int8" if format == "int4" else format)]


def floats(view: WeightView) -> F32:
    """A float32 copy of a tensor."""
    return from_bf16(view.array) if view.dtype == "BF16" else view.array.astype(np.float32)


def slabs(view: WeightView) -> Iterator[F32]:
    """A matrix in float32, some rows with a few million weights at a time."""
    rows, cols = view.shape
    step = max(1, SLAB_WEIGHTS // max(cols, 1))
    for start in range(0, rows, step):
        part = view.array[start : start + step]
        yield floats(WeightView(view.dtype, part.shape, part))
