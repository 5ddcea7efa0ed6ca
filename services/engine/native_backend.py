"""The CPU engine behind the `Backend` seam: own kernels over mapped weights, no torch.

Matrices are plain, as they lie in the checkpoint, or packed (`packed.py`), each as it is given.

Prefill and decode use the same kernels, so a row's K, V and logits are the same bits wherever and in
whatever company it is computed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from services import _native
from services.engine.backend import PageSource, Rows, check_layout
from services.engine.checkpoint import EMBEDDING, LM_HEAD, WeightView
from services.engine.identity import native_numerics
from services.engine.model import ModelConfig
from services.engine.packed import PackedMatrix
from services.engine.rope import rope_tables

Weight = WeightView | PackedMatrix

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
    """Pages that the native code can reach: an arena, or a process's own memory."""

    @property
    def native(self) -> Any: ...


class NativeBackend:
    """One model on this processor.

    threads: how many compute; `cores` pins them, the calling thread as the first. level: forces an
    instruction set: vnni, v4, v3, dotprod or base. weights_class: how the weights were made from the
    checkpoint's, part of the numerics class; empty if they are the checkpoint's.
    """

    def __init__(
        self, config: ModelConfig, weights: Mapping[str, Weight], arena: NativePages,
        level: str = "", threads: int = 1, cores: Sequence[int] = (), weights_class: str = "",
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
            shape_of, _arrays(config, weights), cos, sin, arena.native, level, threads, list(cores)
        )
        self._weights_class = weights_class
        self._rows: Rows | None = None
        self._groups = self._next_group = layout.groups

    @property
    def numerics(self) -> str:
        return native_numerics(self._weights_class)

    @property
    def threads(self) -> int:
        return int(self._engine.threads)

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

    def step(self, rows: Rows, seeds: NDArray[np.uint32] | None = None) -> NDArray[np.float32]:
        """A whole pass in one call without the interpreter lock; `OneCallBackend.step`."""
        self._engine.begin(rows.tokens, rows.positions, rows.sequence, rows.tables)
        self._next_group = self._groups
        out: NDArray[np.float32] = self._engine.step(seeds)
        return out

    @property
    def step_ns(self) -> int:
        """Nanoseconds that the last `step` spent in native code, without the lock."""
        return int(self._engine.step_ns)

    @property
    def weight_bytes(self) -> int:
        """Bytes of matrices that one step reads, scales and head among them."""
        return int(self._engine.weight_bytes)

    def read_weights(self) -> int:
        """Reads all matrices once, as a step would, and returns their bytes: for benchmarks."""
        return int(self._engine.read_weights())


def _arrays(config: ModelConfig, weights: Mapping[str, Weight]) -> dict[str, Any]:
    """Matrices as they lie in the mapping; norms and biases as small float32 copies."""
    arrays: dict[str, Any] = {
        "embed": _matrix(weights[EMBEDDING]),
        "head": _matrix(weights[LM_HEAD]),
        "final_norm": _floats(weights["model.norm.weight"]),
    }
    for layer in range(config.layers):
        prefix = f"model.layers.{layer}."
        for short, name in _MATRICES.items():
            arrays[f"{layer}.{short}"] = _matrix(weights[f"{prefix}{name}.weight"])
            if bias := weights.get(f"{prefix}{name}.bias"):
                arrays[f"{layer}.{short}_bias"] = _floats(bias)
        for short, name in _NORMS.items():
            if norm := weights.get(f"{prefix}{name}.weight"):
                arrays[f"{layer}.{short}"] = _floats(norm)
    return arrays


def _matrix(weight: Weight) -> Any:
    return weight.native() if isinstance(weight, PackedMatrix) else weight.array


def _floats(view: Weight) -> NDArray[np.float32]:
    assert isinstance(view, WeightView), "norms and biases are never packed"
    if view.dtype == "BF16":
        return (view.array.astype(np.uint32) << 16).view(np.float32)
    return view.array.astype(np.float32)
