"""The CPU engine behind the `Backend` seam: own kernels over mapped weights, no torch.

Prefill and decode use the same kernels, so a row's K, V and logits are the same bits wherever and in
whatever company it is computed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from services import _native
from services.engine.backend import PageSource, Rows, check_layout
from services.engine.checkpoint import EMBEDDING, LM_HEAD, WeightView
from services.engine.identity import NATIVE_NUMERICS
from services.engine.model import ModelConfig
from services.engine.rope import rope_tables

_MATRICES = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
_NORMS = {
    "attention_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
}


class NativePages(PageSource, Protocol):
    """Pages that the native code can reach: an arena, or a test's memory."""

    @property
    def native(self) -> Any: ...


class NativeBackend:
    """One model on this processor. `level` forces an instruction set: v4, v3 or base."""

    def __init__(
        self, config: ModelConfig, weights: Mapping[str, WeightView], arena: NativePages,
        level: str = "",
    ) -> None:  # fmt: skip
        layout = arena.layout
        check_layout(config, layout)
        cos, sin = rope_tables(config, config.max_context)
        shape_of = {
            name: getattr(config, name)
            for name in (
                "vocab_size", "hidden", "layers", "heads", "kv_heads", "head_dim", "intermediate",
                "rms_eps",
            )
        }  # fmt: skip
        shape_of |= {"kv_bf16": layout.kv_dtype == "bf16", "windows": list(config.sliding_window)}
        self._engine = _native.Engine(
            shape_of, _arrays(config, weights), cos, sin, arena.native, level
        )
        self._rows: Rows | None = None
        self._groups = self._next_group = layout.groups

    @property
    def numerics(self) -> str:
        return NATIVE_NUMERICS

    @property
    def level(self) -> str:
        """The instruction set in use."""
        return str(self._engine.level)

    def begin(self, rows: Rows) -> None:
        self._rows, self._next_group = rows, 0
        self._engine.begin(rows.tokens, rows.positions, rows.sequence, rows.tables)

    def run_group(self, group: int) -> None:
        assert group == self._next_group, f"group {group} before group {self._next_group}"
        self._engine.run_group(group)
        self._next_group += 1

    def logits(self, which: NDArray[np.int32]) -> NDArray[np.float32]:
        assert self._next_group == self._groups, "logits before the last group"
        out: NDArray[np.float32] = self._engine.logits(which)
        return out


def _arrays(config: ModelConfig, weights: Mapping[str, WeightView]) -> dict[str, Any]:
    """Matrices as they lie in the mapping; norms and biases as small float32 copies."""
    arrays: dict[str, Any] = {
        "embed": weights[EMBEDDING].array,
        "head": weights[LM_HEAD].array,
        "final_norm": _floats(weights["model.norm.weight"]),
    }
    for layer in range(config.layers):
        prefix = f"model.layers.{layer}."
        for short, name in _MATRICES.items():
            arrays[f"{layer}.{short}"] = weights[f"{prefix}{name}.weight"].array
            if bias := weights.get(f"{prefix}{name}.bias"):
                arrays[f"{layer}.{short}_bias"] = _floats(bias)
        for short, name in _NORMS.items():
            if norm := weights.get(f"{prefix}{name}.weight"):
                arrays[f"{layer}.{short}"] = _floats(norm)
    return arrays


def _floats(view: WeightView) -> NDArray[np.float32]:
    if view.dtype == "BF16":
        return (view.array.astype(np.uint32) << 16).view(np.float32)
    return view.array.astype(np.float32)
