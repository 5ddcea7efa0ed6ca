"""The reference backend, on any device torch knows: readable first, and the seam for accelerators.

It keeps T0 (design.md section 5): a token's K, V and logits depend on the tokens up to it alone.
Torch's products round differently with another number of rows, so every product here has exactly
`tile` rows, padded where there are fewer, and attention reduces over one 64-token page after another.
All shapes are therefore static, which a compiler for an NPU wants as well.

    run_group:  for each layer   tiles of rows            hidden -> q, k, v
                                 rows of each sequence    k, v -> pages;  q x pages -> attended
                                 tiles of rows            hidden, attended -> hidden

K and V are rounded to the layout's dtype on their way into the page, and attention reads them back
from there, a token's own row included: a page is all that a later pass, or another process, needs.
Knows nothing of requests, epochs or who else maps the arena. Not the fast path.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from services.engine.backend import PageSource, Rows, check_layout
from services.engine.checkpoint import EMBEDDING, LM_HEAD, WeightView
from services.engine.errors import ModelError, NumericsError
from services.engine.model import ModelConfig
from services.engine.rope import rope_tables
from services.engine.torch_device import make_exact, numerics_class, parse_device, tile_rows
from services.kv.layout import PAGE_TOKENS, KvLayout, blocks_for

_COMPUTE_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
_KV_DTYPES = {"bf16": torch.bfloat16, "f32": torch.float32}
_UNSEEN = -1e30  # the running maximum before any key: finite, so that a masked page leaves it be


@dataclass(frozen=True)
class _Span:
    """The rows of one sequence: rows[i] is at position first + i; positions end before `end`."""

    sequence: int
    rows: NDArray[np.intp]
    first: int
    end: int


@dataclass(frozen=True)
class _Tile:
    """Rows of one span that attend together; its last row is repeated until the tile is full.

    rows, positions: int64[tile] on the device. `count` rows are real; positions end before `end`.
    """

    rows: torch.Tensor
    positions: torch.Tensor
    count: int
    end: int


class TorchBackend:
    """One model on one torch device: implements `Backend`.

    Weights are copied to the device as `compute_dtype`; attention and norms are in float32 always.
    `tile` is the rows of one product; 0 is the device's own number. `weights_class` is what the
    weights' format adds to the numerics class. Raises ModelError if the layout
    does not fit the model, ConfigError if torch has no such device, NumericsError if a row's result
    depends on its place in its tile there.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: Mapping[str, WeightView],
        pages: PageSource,
        *,
        device: str = "cpu",
        compute_dtype: str = "float32",
        tile: int = 0,
        weights_class: str = "",
    ) -> None:
        """Reads `weights` once, at construction; `pages` is read and written by every pass."""
        if compute_dtype not in _COMPUTE_DTYPES:
            raise ModelError(f"compute_dtype: {compute_dtype!r} not in {sorted(_COMPUTE_DTYPES)}")
        check_layout(config, pages.layout)
        self._config = config
        self._pages = pages
        self._device = parse_device(device)
        make_exact(self._device)
        self._dtype = _COMPUTE_DTYPES[compute_dtype]
        self._tile = tile or tile_rows(self._device)
        own = numerics_class(self._device, compute_dtype, self._tile)
        self._numerics = f"{own}/{weights_class}" if weights_class else own
        self._weights = self._upload(weights)
        cos, sin = rope_tables(config, config.max_context)
        self._cos = torch.from_numpy(cos).to(self._device)
        self._sin = torch.from_numpy(sin).to(self._device)
        self._next_group = pages.layout.groups
        self._check_row_independence()

    @property
    def numerics(self) -> str:
        return self._numerics

    def begin(self, rows: Rows) -> None:
        assert len(rows) > 0
        assert 0 <= int(rows.tokens.min()) <= int(rows.tokens.max()) < self._config.vocab_size
        assert int(rows.positions.min()) >= 0, "a position is negative"
        assert int(rows.positions.max()) < self._config.max_context, "past max_context"
        self._rows = rows
        self._spans = _spans(rows)
        self._tiles = [self._tiles_of(span) for span in self._spans]
        self._positions = self._padded_to_device(rows.positions)
        self._hidden = self._weights[EMBEDDING][self._padded_to_device(rows.tokens)]
        self._next_group = 0

    def run_group(self, group: int) -> None:
        assert group == self._next_group, f"group {group} after {self._next_group - 1}"
        layers = self._pages.layout.layers_of(group)
        for layer in layers:
            self._run_layer(layer, group, layer - layers.start)
        self._next_group += 1

    def logits(self, which: NDArray[np.int32]) -> NDArray[np.float32]:
        assert self._next_group == self._pages.layout.groups, "not all groups have run"
        if len(which) == 0:
            return np.zeros((0, self._config.vocab_size), np.float32)
        hidden = self._hidden[self._padded_to_device(which)]
        tiles = [self._head(x) for x in hidden.split(self._tile)]
        result: NDArray[np.float32] = torch.cat(tiles).float().cpu().numpy()[: len(which)]
        return result

    def _run_layer(self, layer: int, group: int, slot: int) -> None:
        """One layer for all rows; `slot` is its place in the group's pages."""
        prefix = f"model.layers.{layer}"
        places = self._positions.split(self._tile)
        tiles = self._hidden.split(self._tile)
        projected = [self._project(prefix, x, at) for x, at in zip(tiles, places, strict=True)]
        query, key, value = (torch.cat(part) for part in zip(*projected, strict=True))
        self._store(group, slot, torch.stack((key, value), dim=1))
        attended = torch.zeros_like(query)
        for span, parts in zip(self._spans, self._tiles, strict=True):
            self._attend(span, parts, query, attended, layer, group, slot)
        rows = attended.to(self._dtype).flatten(1).split(self._tile)
        pairs = zip(tiles, rows, strict=True)
        self._hidden = torch.cat([self._finish(prefix, x, seen) for x, seen in pairs])

    def _project(
        self, prefix: str, hidden: torch.Tensor, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q [tile, heads, D], k and v [tile, kv heads, D] in float32, q and k rotated."""
        x = self._norm(f"{prefix}.input_layernorm", hidden)
        attention = f"{prefix}.self_attn"
        query, key, value = (
            self._linear(f"{attention}.{name}_proj", x).unflatten(1, (-1, self._config.head_dim))
            for name in "qkv"
        )
        if self._config.qk_norm:
            query = self._norm(f"{attention}.q_norm", query)
            key = self._norm(f"{attention}.k_norm", key)
        cos, sin = self._cos[positions][:, None], self._sin[positions][:, None]
        return _rotate(query.float(), cos, sin), _rotate(key.float(), cos, sin), value.float()

    def _finish(self, prefix: str, hidden: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """The second half of a layer: output projection, then the gated perceptron."""
        hidden = hidden + self._linear(f"{prefix}.self_attn.o_proj", attended)
        x = self._norm(f"{prefix}.post_attention_layernorm", hidden)
        gate = _silu(self._linear(f"{prefix}.mlp.gate_proj", x))
        inner = gate * self._linear(f"{prefix}.mlp.up_proj", x)
        return hidden + self._linear(f"{prefix}.mlp.down_proj", inner)

    def _head(self, hidden: torch.Tensor) -> torch.Tensor:
        return self._linear("lm_head", self._norm("model.norm", hidden))

    def _store(self, group: int, slot: int, kv: torch.Tensor) -> None:
        """Rounds kv [rows, K and V, kv heads, D] to the stored dtype and writes it into pages."""
        rounded = kv.to(_KV_DTYPES[self._pages.layout.kv_dtype]).cpu()
        stored = _as_stored(rounded, self._pages.layout)
        for span in self._spans:
            for block in range(span.first // PAGE_TOKENS, blocks_for(span.end)):
                base = block * PAGE_TOKENS
                start, stop = max(span.first, base), min(span.end, base + PAGE_TOKENS)
                rows = span.rows[start - span.first : stop - span.first]
                page = self._pages.page(int(self._rows.tables[span.sequence, block, group]))
                page[slot, :, :, start - base : stop - base] = stored[rows].transpose(1, 2, 0, 3)

    def _attend(
        self,
        span: _Span,
        tiles: list[_Tile],
        query: torch.Tensor,
        attended: torch.Tensor,
        layer: int,
        group: int,
        slot: int,
    ) -> None:
        """Writes the attention of one sequence's rows into `attended` [rows, heads, D]."""
        window = self._config.sliding_window[layer] or self._config.max_context
        first_block = max(0, span.first - window + 1) // PAGE_TOKENS
        keys, values = self._context(span, first_block, group, slot)
        for tile in tiles:
            blocks = blocks_for(tile.end) - first_block
            seen = _attention(
                query[tile.rows],
                tile.positions,
                keys[:blocks],
                values[:blocks],
                first_block * PAGE_TOKENS,
                window,
            )
            attended[tile.rows[: tile.count]] = seen[: tile.count]

    def _tiles_of(self, span: _Span) -> list[_Tile]:
        tiles = []
        for start in range(0, len(span.rows), self._tile):
            count = min(self._tile, len(span.rows) - start)
            at = start + np.minimum(np.arange(self._tile), count - 1)
            rows, positions = torch.from_numpy(np.stack((span.rows[at], span.first + at))).to(
                self._device
            )
            tiles.append(_Tile(rows, positions, count, span.first + start + count))
        return tiles

    def _context(
        self, span: _Span, first_block: int, group: int, slot: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V as stored, float32[blocks, kv heads, 64, D] each, from `first_block` on.

        What lies behind the sequence's last row is another writer's or nobody's, and is zeroed:
        a masked NaN would still poison the sum.
        """
        last_block = blocks_for(span.end)
        ids = self._rows.tables[span.sequence, first_block:last_block, group]
        host = np.stack([self._pages.page(int(page_id))[slot] for page_id in ids])
        host[-1, :, :, span.end - (last_block - 1) * PAGE_TOKENS :] = 0
        stored = torch.from_numpy(host).view(_KV_DTYPES[self._pages.layout.kv_dtype])
        keys, values = stored.to(self._device).float().unbind(1)
        return keys, values

    def _norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """Root mean square norm over the last dimension, in float32."""
        wide = x.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self._config.rms_eps)
        return self._weights[f"{name}.weight"] * (wide * scale).to(self._dtype)

    def _linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        assert x.shape[0] == self._tile
        weights = self._weights
        return torch.nn.functional.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))

    def _padded_to_device(self, values: NDArray[np.int32]) -> torch.Tensor:
        """int64 on the device, padded with zeros to whole tiles."""
        padded = np.zeros(-(-len(values) // self._tile) * self._tile, np.int64)
        padded[: len(values)] = values
        return torch.from_numpy(padded).to(self._device)

    def _upload(self, weights: Mapping[str, WeightView]) -> dict[str, torch.Tensor]:
        """Copies the weights to the device; a tied head shares the embedding's copy."""
        tensors = {
            name: _as_tensor(view).to(self._device, self._dtype)
            for name, view in weights.items()
            if not (name == LM_HEAD and self._config.tie_embeddings)
        }
        tensors.setdefault(LM_HEAD, tensors[EMBEDDING])
        return tensors

    def _check_row_independence(self) -> None:
        """Moves each row of a tile by one place through every step of a layer, and compares bits."""
        for name, step, rows in self._steps():
            moved = step(*(x.roll(1, 0) for x in rows))
            if not torch.equal(moved, step(*rows).roll(1, 0)):
                raise NumericsError(
                    f"{self._numerics}: {name}: a row's result depends on its place"
                )

    def _steps(self) -> list[tuple[str, Callable[..., torch.Tensor], tuple[torch.Tensor, ...]]]:
        """What happens to a tile, with random rows that are all at one position."""
        config, generator = self._config, torch.Generator().manual_seed(0)

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator).to(self._device, self._dtype)

        layer = "model.layers.0"
        position = min(PAGE_TOKENS, config.max_context) - 1  # sees all of a page
        at = torch.full((self._tile,), position, device=self._device)
        page = draw(1, config.kv_heads, PAGE_TOKENS, config.head_dim).float()
        hidden = draw(self._tile, config.hidden)
        query = draw(self._tile, config.heads, config.head_dim).float()

        def project(x: torch.Tensor) -> torch.Tensor:
            return torch.cat(self._project(layer, x, at), dim=1)

        def attend(q: torch.Tensor) -> torch.Tensor:
            return _attention(q, at, page, page, 0, PAGE_TOKENS)

        def finish(x: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
            return self._finish(layer, x, seen)

        attended = query.to(self._dtype).flatten(1)
        return [
            ("queries, keys and values", project, (hidden,)),
            ("attention", attend, (query,)),
            ("perceptron", finish, (hidden, attended)),
            ("logits", self._head, (hidden,)),
        ]


def _attention(
    query: torch.Tensor,
    positions: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    first_key: int,
    window: int,
) -> torch.Tensor:
    """Softmax attention of one tile's rows of one sequence, page by page in ascending order.

    query: [tile, heads, D]; keys, values: [blocks, kv heads, 64, D], from position `first_key`.
    Returns [tile, heads, D]. The sums are rescaled when a page raises the maximum ("online
    softmax", Milakov and Gimelshein 2018); a page that a row may not see changes none of its bits.
    """
    tile, heads, head_dim = query.shape
    kv_heads = keys.shape[1]
    share = heads // kv_heads  # query heads per KV head
    q = query.view(tile, kv_heads, share, head_dim).transpose(0, 1).reshape(kv_heads, -1, head_dim)
    row = positions.repeat_interleave(share)[:, None]
    maximum = q.new_full((kv_heads, tile * share, 1), _UNSEEN)
    total, mixed = torch.zeros_like(maximum), torch.zeros_like(q)
    for block in range(len(keys)):
        key = first_key + block * PAGE_TOKENS + torch.arange(PAGE_TOKENS, device=q.device)
        hidden = (key > row) | (key <= row - window)
        scores = (q @ keys[block].transpose(1, 2)) * head_dim**-0.5
        scores = scores.masked_fill(hidden, -torch.inf)
        raised = torch.maximum(maximum, scores.amax(-1, keepdim=True))
        weight, decay = torch.exp(scores - raised), torch.exp(maximum - raised)
        total = total * decay + weight.sum(-1, keepdim=True)
        mixed = mixed * decay + weight @ values[block]
        maximum = raised
    result = (mixed / total).view(kv_heads, tile, share, head_dim).transpose(0, 1)
    return result.reshape(tile, heads, head_dim)


def _silu(x: torch.Tensor) -> torch.Tensor:
    """x * sigmoid(x), in float32.

    Torch's own silu and sigmoid compute the last elements of a tensor with scalar code that rounds
    otherwise, so the last row of a tile would differ; exp has one code for all elements.
    """
    wide = x.float()
    return (wide / (1 + torch.exp(-wide))).to(x.dtype)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates x [rows, heads, D] by tables [rows, 1, D/2]; see `rope_tables`."""
    low, high = x.chunk(2, dim=-1)
    return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1)


def _spans(rows: Rows) -> list[_Span]:
    """The rows of each sequence present, in any interleaving; checks that positions have no gap."""
    spans = []
    for sequence in np.unique(rows.sequence):
        own = np.flatnonzero(rows.sequence == sequence)
        first = int(rows.positions[own[0]])
        assert np.array_equal(rows.positions[own], np.arange(first, first + len(own)))
        spans.append(_Span(int(sequence), own, first, first + len(own)))
    return spans


def _as_stored(rounded: torch.Tensor, layout: KvLayout) -> NDArray[np.generic]:
    """The numpy view of K and V that are already in the stored dtype."""
    bits: NDArray[np.generic] = rounded.view(torch.uint8).numpy().view(layout.dtype)
    return bits


def _as_tensor(view: WeightView) -> torch.Tensor:
    """A copy in host memory: torch has no read-only tensors and would warn about the mapping."""
    tensor = torch.from_numpy(np.array(view.array))
    return tensor.view(torch.bfloat16) if view.dtype == "BF16" else tensor
