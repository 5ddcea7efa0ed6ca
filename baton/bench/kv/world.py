"""What is moved and how it is cut: the shape of one prompt's KV. Pure arithmetic."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from baton.bench.models import model_variant
from services.kv.layout import PAGE_TOKENS

KIB, MIB = 1 << 10, 1 << 20
HEAD_DIM, ELEMENT_BYTES = 64, 2
_HEAD_BYTES = 2 * PAGE_TOKENS * HEAD_DIM * ELEMENT_BYTES  # K and V of one head: 16 KiB
PAGE_BYTES_MAX = 64 * KIB  # one layer of four KV heads of 64 in bf16


@dataclass(frozen=True)
class World:
    """`groups` layer groups of `blocks` pages each; every group's pages are one contiguous run.

    ::

        group 0  [page 0 | page 1 | ... | page blocks-1]     a run is some neighbouring pages
        group 1  [page 0 | page 1 | ... | page blocks-1]
    """

    page_bytes: int
    blocks: int
    groups: int

    def __post_init__(self) -> None:
        assert self.page_bytes % _HEAD_BYTES == 0, "pages hold whole heads"
        assert self.blocks > 0
        assert self.groups > 0

    @property
    def tokens(self) -> int:
        return self.blocks * PAGE_TOKENS

    @property
    def group_bytes(self) -> int:
        return self.blocks * self.page_bytes

    @property
    def total_bytes(self) -> int:
        return self.groups * self.group_bytes

    @property
    def arena_bytes(self) -> int:
        """Room for one such prompt, its headers and some records."""
        return self.total_bytes + self.total_bytes // 16 + 16 * MIB

    def steps(self, run_bytes: int) -> Iterator[tuple[int, int, int]]:
        """(group, first block, end block) of every run, chunk after chunk through all groups, as a
        prefill computes them."""
        pages = run_bytes // self.page_bytes
        assert pages > 0, "a run is at least a page"
        for begin in range(0, self.blocks, pages):
            for group in range(self.groups):
                yield group, begin, min(begin + pages, self.blocks)

    def token_ids(self) -> NDArray[np.int32]:
        """The prompt: any will do, and every process makes the same one."""
        return (np.arange(self.tokens, dtype=np.int32) * 7 + 3) % 4000

    def save_model(self, model: Path, directory: Path) -> Path:
        """A model directory of this shape, for processes that read no more than the shape: the files
        of `model` under another config.json."""
        heads = self.page_bytes // _HEAD_BYTES
        return model_variant(
            model, directory, num_hidden_layers=self.groups, num_attention_heads=heads,
            num_key_value_heads=heads, head_dim=HEAD_DIM, max_position_embeddings=self.tokens + 64,
        )  # fmt: skip


def worlds(runs: list[int], total_bytes: int) -> dict[int, World]:
    """For each run length the world it is measured in. Pages are as large as they come in small
    models, 64 KiB; a shorter run has pages of its own size, and a smaller world."""
    longest = max(runs)
    made = {}
    for run in runs:
        page = min(run, PAGE_BYTES_MAX)
        blocks = max(1, longest // PAGE_BYTES_MAX)
        groups = max(1, total_bytes // (blocks * PAGE_BYTES_MAX))
        made[run] = World(page, blocks, groups)
    return made
