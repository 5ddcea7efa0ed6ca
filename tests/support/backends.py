"""Every compute backend by name, and a runner that feeds sequences to one over pages in memory.

Tests of the `Backend` contract are parametrised over `BACKENDS`; a new device adds one line here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from services.engine.backend import Backend, PageSource, Rows
from services.engine.checkpoint import WeightView
from services.engine.model import ModelConfig
from services.engine.native_backend import NativeBackend
from services.engine.torch_device import ACCELERATOR_TILE_ROWS
from services.kv.heap import HeapPages
from services.kv.layout import KvLayout, blocks_for
from services.ops.errors import ConfigError

BackendFactory = Callable[[ModelConfig, Mapping[str, WeightView], PageSource], Backend]


def _torch(device: str = "cpu", tile: int = 0) -> BackendFactory:
    def make(config: ModelConfig, weights: Mapping[str, WeightView], pages: PageSource) -> Backend:
        import torch

        from services.engine.torch_backend import TorchBackend

        torch.set_num_threads(1)
        return TorchBackend(config, weights, pages, device=device, tile=tile)

    return make


def has_device(device: str) -> bool:
    """Whether torch can use an accelerator of this kind here."""
    from services.engine.torch_device import parse_device

    try:
        parse_device(device)
    except ConfigError:
        return False
    return True


def _native(level: str) -> BackendFactory:
    def make(config: ModelConfig, weights: Mapping[str, WeightView], pages: PageSource) -> Backend:
        return NativeBackend(config, weights, pages, level)  # type: ignore[arg-type]

    return make


def levels() -> list[str]:
    """The instruction sets this processor runs."""
    needed = {
        "vnni": "avx512_bf16",
        "v4": "avx512vl",
        "v3": "avx2",
        "dotprod": "asimddp",
        "base": "",
    }
    flags = Path("/proc/cpuinfo").read_text()
    return [level for level, flag in needed.items() if flag in flags]


BACKENDS: dict[str, BackendFactory] = {
    "torch": _torch(),
    "torch-wide": _torch(tile=ACCELERATOR_TILE_ROWS),
    "torch-cuda": _torch("cuda"),
    **{f"native-{level}": _native(level) for level in levels()},
}


class Runner:
    """Sequences in memory pages, page ids in no order, each fed in any number of passes."""

    def __init__(
        self,
        factory: BackendFactory,
        config: ModelConfig,
        weights: Mapping[str, WeightView],
        *,
        kv_dtype: str = "f32",
        layers_per_group: int = 1,
        sequences: int = 1,
        tokens_max: int = 256,
        fill: int = 0xFF,
    ) -> None:
        layout = KvLayout(
            config.layers, layers_per_group, config.kv_heads, config.head_dim, kv_dtype
        )
        shape = (sequences, blocks_for(tokens_max), layout.groups)
        count = int(np.prod(shape)) + 1
        ids = np.random.default_rng(5).permutation(count)[:-1]
        self.tables = ids.reshape(shape).astype(np.uint32)
        self.pages = HeapPages(layout, count, fill=fill)
        self.lengths = [0] * sequences
        self.backend = factory(config, weights, self.pages)

    def feed(self, *work: tuple[int, Sequence[int]]) -> NDArray[np.float32]:
        """One pass of (sequence, next tokens) pairs; the logits after every row, in that order.

        A sequence may appear several times; its rows go on where the last left off.
        """
        rows = self.rows(work)
        self.backend.begin(rows)
        for group in range(self.pages.layout.groups):
            self.backend.run_group(group)
        return self.backend.logits(np.arange(len(rows), dtype=np.int32))

    def rows(self, work: Sequence[tuple[int, Sequence[int]]]) -> Rows:
        """The next pass over these pairs; counts them as fed."""
        tokens: list[int] = []
        positions: list[int] = []
        owners: list[int] = []
        for sequence, following in work:
            start = self.lengths[sequence]
            tokens += following
            positions += range(start, start + len(following))
            owners += [sequence] * len(following)
            self.lengths[sequence] += len(following)
        return Rows(
            tokens=np.array(tokens, np.int32),
            positions=np.array(positions, np.int32),
            sequence=np.array(owners, np.int32),
            tables=self.tables,
        )

    def stored(self, sequence: int = 0) -> NDArray[np.generic]:
        """[layer, K and V, kv head, token, dim]: what the pages hold of one sequence."""
        layout = self.pages.layout
        layers = []
        for group in range(layout.groups):
            blocks = [self.pages.page(int(page_id)) for page_id in self.tables[sequence, :, group]]
            joined = np.concatenate(blocks, axis=3)[: len(layout.layers_of(group))]
            layers.append(joined[:, :, :, : self.lengths[sequence]])
        return np.concatenate(layers)

    def greedy(self, prompt: Sequence[int], count: int) -> list[int]:
        """`count` tokens after `prompt`, each the most probable, by sequence 0."""
        token = int(self.feed((0, prompt))[-1].argmax())
        tokens = [token]
        while len(tokens) < count:
            token = int(self.feed((0, [token]))[-1].argmax())
            tokens.append(token)
        return tokens
