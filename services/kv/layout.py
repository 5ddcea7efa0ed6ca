"""The geometry of KV pages: pure arithmetic, shared by every process and both media.

One page holds 64 tokens of one layer group, K and V of every KV head, head-major, so that one token's
row of one head is contiguous and a head's block of 64 rows can be streamed:

    page = [layer in group][K, V][kv head][64 tokens][head_dim]

All pages of a cluster have the same size, so any page fits any hole. A block is the `groups` pages
that hold the same 64 tokens. Source: design.md section 4; layer groups settle the conflict between
FlowKV's block-major and Mooncake's layer-major order (systems.md 2.6).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

PAGE_TOKENS = 64
LAYOUT_VERSION = 1

KV_DTYPES: dict[str, np.dtype[Any]] = {"bf16": np.dtype(np.uint16), "f32": np.dtype(np.float32)}


@dataclass(frozen=True)
class KvLayout:
    """How one model's KV lies in pages. `kv_dtype` is `bf16` (stored as uint16) or `f32`."""

    layers: int
    layers_per_group: int
    kv_heads: int
    head_dim: int
    kv_dtype: str

    def __post_init__(self) -> None:
        if self.kv_dtype not in KV_DTYPES:
            raise ValueError(f"kv_dtype: {self.kv_dtype!r} is not one of {sorted(KV_DTYPES)}")
        if not 1 <= self.layers_per_group <= self.layers:
            raise ValueError(f"layers_per_group: {self.layers_per_group} of {self.layers} layers")

    @cached_property
    def groups(self) -> int:
        return -(-self.layers // self.layers_per_group)

    def layers_of(self, group: int) -> range:
        """The layers of one group; the last group may be shorter."""
        first = group * self.layers_per_group
        return range(first, min(first + self.layers_per_group, self.layers))

    @property
    def dtype(self) -> np.dtype[np.generic]:
        """The dtype a page is viewed as; bf16 has no numpy dtype and is seen as uint16."""
        dtype: np.dtype[np.generic] = KV_DTYPES[self.kv_dtype]
        return dtype

    @property
    def page_shape(self) -> tuple[int, int, int, int, int]:
        return (self.layers_per_group, 2, self.kv_heads, PAGE_TOKENS, self.head_dim)

    @cached_property
    def page_bytes(self) -> int:
        return math.prod(self.page_shape) * self.dtype.itemsize

    @property
    def token_bytes(self) -> int:
        """KV of one token over all layers, in bytes."""
        return self.layers * 2 * self.kv_heads * self.head_dim * self.dtype.itemsize

    def describe(self) -> str:
        """A canonical text of the layout; part of every fingerprint."""
        return (
            f"v{LAYOUT_VERSION}/{PAGE_TOKENS}t/{self.layers}l/{self.layers_per_group}g/"
            f"{self.kv_heads}h/{self.head_dim}d/{self.kv_dtype}"
        )


def blocks_for(tokens: int) -> int:
    """How many blocks of 64 tokens hold `tokens` tokens."""
    return -(-tokens // PAGE_TOKENS)


def empty_page(layout: KvLayout) -> NDArray[np.generic]:
    """A zeroed page outside any arena, for tests and transfers."""
    return np.zeros(layout.page_shape, layout.dtype)
