"""The arithmetic of quantised weights, to be read: a backend in numpy alone, one row's rules in plain
sight. For tests and for measuring accuracy, not for serving.

Norms, attention and the gate are in float32. A product with a `QuantisedMatrix` is the exact integer
arithmetic of `weights/formats.py`, which the native kernels share; any other product is in float32.
Attention sums whole rows at once and not page by page, so results agree with the other backends to
rounding, and from run to run to the bit only in equal chunks.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from services.engine.backend import PageSource, Rows, check_layout
from services.engine.checkpoint import EMBEDDING, WeightView
from services.engine.model import ModelConfig
from services.engine.rope import rope_tables
from services.engine.weights.formats import (
    F32,
    QuantisedMatrix,
    from_bf16,
    product,
    round_to_bf16,
)
from services.engine.weights.plan import floats
from services.kv.layout import PAGE_TOKENS, blocks_for

Weight = WeightView | QuantisedMatrix


class NumpyBackend:
    """One model on this processor's numpy: implements `Backend`."""

    def __init__(
        self, config: ModelConfig, weights: Mapping[str, Weight], pages: PageSource
    ) -> None:
        check_layout(config, pages.layout)
        self._config, self._pages = config, pages
        self._weights = {
            name: floats(weight) if isinstance(weight, WeightView) else weight
            for name, weight in weights.items()
        }
        self._cos, self._sin = rope_tables(config, config.max_context)

    @property
    def numerics(self) -> str:
        """No class that KV could be shared under."""
        return "numpy/reference"

    def begin(self, rows: Rows) -> None:
        self._rows = rows
        self._hidden = self._floats(EMBEDDING)[rows.tokens]

    def run_group(self, group: int) -> None:
        layers = self._pages.layout.layers_of(group)
        for layer in layers:
            self._run_layer(f"model.layers.{layer}", layer, group, layer - layers.start)

    def logits(self, which: NDArray[np.int32]) -> F32:
        return self._linear("lm_head", self._norm("model.norm", self._hidden[which]))

    def _run_layer(self, prefix: str, layer: int, group: int, slot: int) -> None:
        x = self._norm(f"{prefix}.input_layernorm", self._hidden)
        attention = f"{prefix}.self_attn"
        query, key, value = (
            self._linear(f"{attention}.{name}_proj", x).reshape(len(x), -1, self._config.head_dim)
            for name in "qkv"
        )
        if self._config.qk_norm:
            query = self._norm(f"{attention}.q_norm", query)
            key = self._norm(f"{attention}.k_norm", key)
        query, key = self._rotated(query), self._rotated(key)
        attended = np.empty_like(query)
        for sequence in np.unique(self._rows.sequence):
            own = np.flatnonzero(self._rows.sequence == sequence)
            positions = self._rows.positions[own]
            table = self._rows.tables[sequence, : blocks_for(int(positions[-1]) + 1), group]
            self._store(table, slot, positions, np.stack((key[own], value[own])))
            keys, values = self._context(table, slot, int(positions[-1]) + 1)
            window = self._config.sliding_window[layer]
            attended[own] = _attention(query[own], positions, keys, values, window)
        self._hidden = self._hidden + self._linear(
            f"{attention}.o_proj", attended.reshape(len(x), -1)
        )
        x = self._norm(f"{prefix}.post_attention_layernorm", self._hidden)
        gate = self._linear(f"{prefix}.mlp.gate_proj", x)
        inner = gate / (1 + np.exp(-gate)) * self._linear(f"{prefix}.mlp.up_proj", x)
        self._hidden = self._hidden + self._linear(f"{prefix}.mlp.down_proj", inner)

    def _linear(self, name: str, x: F32) -> F32:
        weight = self._weights[f"{name}.weight"]
        y: F32 = product(x, weight) if isinstance(weight, QuantisedMatrix) else x @ weight.T
        return y + self._floats(f"{name}.bias") if f"{name}.bias" in self._weights else y

    def _floats(self, name: str) -> F32:
        weight = self._weights[name]
        assert not isinstance(weight, QuantisedMatrix), f"{name} is never packed"
        return weight

    def _norm(self, name: str, x: F32) -> F32:
        """Root mean square norm over the last dimension."""
        square = np.square(x).mean(-1, keepdims=True)
        normed: F32 = x / np.sqrt(square + np.float32(self._config.rms_eps))
        return self._floats(f"{name}.weight") * normed

    def _rotated(self, x: F32) -> F32:
        """x [rows, heads, D] at its rows' positions; see `rope_tables`."""
        at = self._rows.positions
        cos, sin = self._cos[at][:, None], self._sin[at][:, None]
        low, high = np.split(x, 2, axis=-1)
        return np.concatenate((low * cos - high * sin, high * cos + low * sin), axis=-1)

    def _store(
        self, table: NDArray[np.uint32], slot: int, positions: NDArray[np.int32], kv: F32
    ) -> None:
        """Rounds kv [K and V, rows, kv heads, D] to the stored dtype and writes it into pages."""
        bf16 = self._pages.layout.kv_dtype == "bf16"
        stored = round_to_bf16(kv) if bf16 else kv
        for row, position in enumerate(positions):
            block, place = divmod(int(position), PAGE_TOKENS)
            page = self._pages.page(int(table[block]))
            page[slot, :, :, place] = stored[:, row]

    def _context(self, table: NDArray[np.uint32], slot: int, end: int) -> tuple[F32, F32]:
        """K and V of positions 0 .. end - 1, float32[kv heads, end, D] each, as stored."""
        blocks = np.stack([self._pages.page(int(page_id))[slot] for page_id in table], axis=2)
        kv = blocks.reshape(2, blocks.shape[1], -1, blocks.shape[-1])[:, :, :end]
        keys, values = from_bf16(kv) if self._pages.layout.kv_dtype == "bf16" else kv
        return keys, values


def _attention(
    query: F32, positions: NDArray[np.int32], keys: F32, values: F32, window: int
) -> F32:
    """Softmax attention of query [rows, heads, D] over keys and values [kv heads, end, D]."""
    heads, head_dim = query.shape[1:]
    share = heads // len(keys)
    at = np.arange(keys.shape[1])
    unseen = at > positions[:, None]
    if window:
        unseen |= at <= positions[:, None] - window
    out = np.empty_like(query)
    for head in range(heads):
        scores = query[:, head] @ keys[head // share].T * np.float32(head_dim**-0.5)
        scores[unseen] = -np.inf
        weight = np.exp(scores - scores.max(-1, keepdims=True))
        out[:, head] = weight @ values[head // share] / weight.sum(-1, keepdims=True)
    return out
