"""Baton's engine as the benchmark sees it: a backend over pages in this process's own memory."""

from __future__ import annotations

import time
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from baton.bench.engine.engines import SLACK_TOKENS, Setup
from baton.bench.engine.shapes import SHAPES
from services.engine.backend import Rows
from services.engine.load import Team, Weights, load_backend
from services.engine.model import ModelConfig
from services.engine.native_backend import NativeBackend, NativePages
from services.kv.heap import HeapPages
from services.kv.layout import PAGE_TOKENS, KvLayout, blocks_for

LAYERS_PER_GROUP = 2  # the cluster's default
CHUNK_TOKENS = 256  # of prefill, the service's default
READS = 3


def backend(
    model: str, config: ModelConfig, pages: NativePages, format_: str, cache: str, cores: list[int]
) -> NativeBackend:
    """Packed weights, one thread on each core."""
    team = Team(len(cores), tuple(cores))
    made = load_backend("cpu", model, config, pages, Weights(format_, cache), team)
    assert isinstance(made, NativeBackend)
    return made


def device_classes(format_: str) -> tuple[str, str]:
    """Of prefill and decode, as a cluster of this format names them."""
    return f"cpu/{format_}", f"cpu/{format_}"


def arena_bytes(model: Path, streams: int, tokens: int) -> int:
    """Of an arena in which so many streams may grow so long."""
    config = ModelConfig.load(model)
    token = 2 * 2 * config.layers * config.kv_heads * config.head_dim
    return (streams + 1) * (tokens + 2 * PAGE_TOKENS) * token + (64 << 20)


def random_pages(layout: KvLayout, count: int) -> HeapPages:
    """Pages in memory like an arena's, each filled with the same small random K and V."""
    pages = HeapPages(layout, count, mapped=True)
    page = np.random.default_rng(3).standard_normal(layout.page_shape, np.float32)
    pages.array[:] = page if layout.kv_dtype == "f32" else (page.view(np.uint32) >> 16)
    return pages


class Own:
    """Sequences with a table each; a round's rows overwrite those of the round before."""

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self._config = ModelConfig.load(Path(setup.checkpoint))
        self._layout = KvLayout(
            self._config.layers,
            LAYERS_PER_GROUP,
            self._config.kv_heads,
            self._config.head_dim,
            "bf16",
        )
        longest = max([*setup.contexts, 0]) + SLACK_TOKENS
        blocks = max(setup.streams_max * blocks_for(longest), blocks_for(setup.prefill_max))
        pages = random_pages(self._layout, blocks * self._layout.groups)
        groups = np.arange(self._layout.groups, dtype=np.uint32) * blocks
        table = np.arange(blocks, dtype=np.uint32)[:, None] + groups
        each = blocks_for(longest)
        self._tables = table[: setup.streams_max * each].reshape(setup.streams_max, each, -1).copy()
        self._prompt_table = table[None].copy()
        self._backend = backend(
            setup.checkpoint, self._config, pages, setup.format, setup.weights, setup.cores
        )
        self._weight_bytes = self._backend.read_weights()
        self._random = np.random.default_rng(1)

    def facts(self) -> dict[str, Any]:
        read = SHAPES[self._setup.shape].read_per_step
        return {
            "version": metadata.version("baton"), "level": self._backend.level,
            "flags": f"KV bf16, {LAYERS_PER_GROUP} layers in a group, chunks of {CHUNK_TOKENS}",
            "weight_bytes": self._weight_bytes,
            "bits_per_weight": round(8 * self._weight_bytes / read, 3),
            "kv_bytes_per_token": self._layout.token_bytes,
        }  # fmt: skip

    def read(self) -> float:
        """Seconds to read all packed weights once: the best of a few, since it is a limit."""
        times = []
        for _ in range(READS):
            start = time.perf_counter()
            self._backend.read_weights()
            times.append(time.perf_counter() - start)
        return min(times)

    def _pass(self, rows: Rows, which: NDArray[np.int32]) -> NDArray[np.float32]:
        """A chunk of a prompt, group by group, as the prefill service computes it."""
        self._backend.begin(rows)
        for group in range(self._layout.groups):
            self._backend.run_group(group)
        return self._backend.logits(which)

    def _tokens(self, count: int) -> NDArray[np.int32]:
        return self._random.integers(1, self._config.vocab_size, count, dtype=np.int32)

    def decode(self, streams: int, context: int, steps: int) -> list[float]:
        sequence = np.arange(streams, dtype=np.int32)
        times = []
        for step in range(steps):
            tokens = self._tokens(streams)
            start = time.perf_counter()
            positions = np.full(streams, context + step, np.int32)
            self._backend.step(Rows(tokens, positions, sequence, self._tables))
            times.append(time.perf_counter() - start)
        return times

    def prefill_for(self, tokens: int, seconds: float) -> dict[str, float]:
        """New prompts, one after the other, for so long; when it began and ended, and how many."""
        begun, count = time.perf_counter(), 0
        while time.perf_counter() - begun < seconds:
            self.prefill(tokens)
            count += 1
        return {"begun": begun, "ended": time.perf_counter(), "prompts": count}

    def prefill(self, tokens: int) -> float:
        prompt = self._tokens(tokens)
        start = time.perf_counter()
        self._prompt(prompt)
        return time.perf_counter() - start

    def _prompt(self, prompt: NDArray[np.int32]) -> NDArray[np.float32]:
        """The logits after the last token."""
        for begin in range(0, len(prompt), CHUNK_TOKENS):
            chunk = prompt[begin : begin + CHUNK_TOKENS]
            positions = np.arange(begin, begin + len(chunk), dtype=np.int32)
            rows = Rows(chunk, positions, np.zeros(len(chunk), np.int32), self._prompt_table)
            last = begin + len(chunk) == len(prompt)
            which = np.array([len(chunk) - 1] if last else [], np.int32)
            logits = self._pass(rows, which)
        return logits

    def logits(self, tokens: list[int]) -> list[float]:
        """After the last of a few tokens, of a new sequence."""
        return [float(value) for value in self._prompt(np.array(tokens, np.int32))[0]]


def make(setup: Setup) -> Own:
    return Own(setup)
