"""What a compute device must offer: the only seam between the services and an accelerator.

A backend runs rows through the model one layer group at a time, writing each row's K and V into the
arena page that holds its position and attending over the pages before it, in place. Nothing outside
this package knows which device that is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from services.engine.errors import ModelError
from services.engine.model import ModelConfig
from services.kv.layout import KvLayout


class PageSource(Protocol):
    """Where pages lie. The backend may write only the rows it was asked to compute."""

    @property
    def layout(self) -> KvLayout: ...

    def page(self, page_id: int) -> NDArray[np.generic]:
        """A writable view, `KvLayout.page_shape`, of one page."""
        ...


@dataclass(frozen=True)
class Rows:
    """The rows of one pass: row r is token `tokens[r]` at `positions[r]` of its sequence.

    tokens, positions, sequence: int32[R]; `sequence` indexes `tables`.
    tables: uint32[S, blocks, groups], page ids; entries past a sequence's last block are unused.
    Rows of one sequence are in ascending position without gaps, and every earlier position's K
    and V is already in its page.
    """

    tokens: NDArray[np.int32]
    positions: NDArray[np.int32]
    sequence: NDArray[np.int32]
    tables: NDArray[np.uint32]

    def __len__(self) -> int:
        return len(self.tokens)


class Backend(Protocol):
    """One model on one device. Not thread-safe: one engine thread owns it."""

    @property
    def numerics(self) -> str:
        """The numerics class: KV of two backends is bit-identical only if this is equal."""
        ...

    def begin(self, rows: Rows) -> None:
        """Looks up the embeddings of a new pass. `rows` must stay unchanged until the pass ends."""
        ...

    def run_group(self, group: int) -> None:
        """Computes the layers of `group` for all rows and writes their K and V into the pages.

        Groups are run in order 0..groups-1. Releases the interpreter lock while computing.
        """
        ...

    def logits(self, which: NDArray[np.int32]) -> NDArray[np.float32]:
        """float32[len(which), vocab]: the logits after the given rows, once all groups have run."""
        ...


@runtime_checkable
class OneCallBackend(Protocol):
    """A backend that can also run a whole pass in one call."""

    def step(
        self, rows: Rows, seeds: NDArray[np.uint32] | None = None
    ) -> NDArray[np.float32]:  # fmt: skip
        """float32[len(rows), vocab] after every row; nothing happens between layer groups.

        seeds: one for each row, if its checksums are to be stored in the headers of its pages.
        The array is used again once the caller has let go of it.
        """
        ...


def check_layout(config: ModelConfig, layout: KvLayout) -> None:
    """Refuses, by ModelError, pages that were laid out for another model."""
    for name in ("layers", "kv_heads", "head_dim"):
        of_model, of_layout = getattr(config, name), getattr(layout, name)
        if of_model != of_layout:
            raise ModelError(f"{name}: {of_layout} in the page layout, {of_model} in the model")
