"""llama.cpp by llama-cpp-python's low-level interface: `llama_decode` and the logits, nothing else.

Flash attention on, a KV cache of float16, no sampling, a cache for each sequence (`kv_unified` off),
so that eight streams of the same text read eight caches. One context for each length of context;
prompts are prefilled once, copied to the other sequences, and what a round appends is removed again.
"""

from __future__ import annotations

import ctypes
import time
from importlib import metadata
from typing import Any

import llama_cpp as lib
import numpy as np

from baton.bench.engine import gguf
from baton.bench.engine.engines import SLACK_TOKENS, Setup
from baton.bench.engine.shapes import SHAPES

UBATCH = 512
_FLASH_ON, _F16 = 1, 1


@lib.llama_log_callback
def _quiet(level: int, text: bytes, _: object) -> None:
    return None


class Llama:
    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self._vocab = setup.config["vocab_size"]
        self._random = np.random.default_rng(1)
        lib.llama_log_set(_quiet, ctypes.c_void_p(0))
        lib.llama_backend_init()
        self._model = lib.llama_model_load_from_file(
            setup.weights.encode(), lib.llama_model_default_params()
        )
        assert self._model, f"{setup.weights}: not loaded"
        self._contexts: dict[int, Any] = {}
        self._prefill: Any = None
        self._batch = lib.llama_batch_init(max(setup.prefill_max, *setup.contexts, 1), 0, 1)

    def facts(self) -> dict[str, Any]:
        return {
            "version": metadata.version("llama_cpp_python"),
            "system": lib.llama_print_system_info().decode().strip(),
            "flags": "flash attention, KV f16, a cache for each stream, no sampling",
            "kind": gguf.KINDS[self._setup.format],
            "bits_per_weight": gguf.bits_per_weight(SHAPES[self._setup.shape], self._setup.format),
            "kv_bytes_per_token": 2 * self._setup.kv_values_per_token,
        }

    def _context(self, tokens: int, sequences: int) -> Any:
        params = lib.llama_context_default_params()
        params.n_ctx = sequences * tokens
        params.n_batch = params.n_ctx
        params.n_ubatch = UBATCH
        params.n_seq_max = sequences
        params.n_threads = params.n_threads_batch = self._setup.threads
        params.flash_attn_type = _FLASH_ON
        params.type_k = params.type_v = _F16
        params.kv_unified = False
        context = lib.llama_init_from_model(self._model, params)
        assert context, "no context"
        return context

    def _run(self, context: Any, tokens: list[int], position: int, sequences: list[int]) -> None:
        """Several tokens of one sequence, or one token of several; waits for the last logits."""
        batch = self._batch
        batch.n_tokens = len(tokens)
        together = len(sequences) == 1
        for i, token in enumerate(tokens):
            batch.token[i] = token
            batch.pos[i] = position + i if together else position
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = sequences[0] if together else sequences[i]
            batch.logits[i] = not together or i == len(tokens) - 1
        assert lib.llama_decode(context, batch) == 0
        lib.llama_synchronize(context)
        logits = lib.llama_get_logits_ith(context, -1)
        assert np.isfinite(logits[0])

    def _filled(self, context: int) -> Any:
        """A context whose sequences all hold the same `context` tokens."""
        if context not in self._contexts:
            streams = self._setup.streams_max
            made = self._context(context + SLACK_TOKENS, streams)
            self._run(made, self._tokens(context), 0, [0])
            for other in range(1, streams):
                lib.llama_memory_seq_cp(lib.llama_get_memory(made), 0, other, -1, -1)
            self._contexts[context] = made
        return self._contexts[context]

    def _tokens(self, count: int) -> list[int]:
        return [int(token) for token in self._random.integers(1, self._vocab, count)]

    def decode(self, streams: int, context: int, steps: int) -> list[float]:
        made = self._filled(context)
        times = []
        for step in range(steps):
            tokens = self._tokens(streams)
            start = time.perf_counter()
            self._run(made, tokens, context + step, list(range(streams)))
            times.append(time.perf_counter() - start)
        for stream in range(streams):
            lib.llama_memory_seq_rm(lib.llama_get_memory(made), stream, context, -1)
        return times

    def prefill(self, tokens: int) -> float:
        if self._prefill is None:
            self._prefill = self._context(self._setup.prefill_max, 1)
        lib.llama_memory_clear(lib.llama_get_memory(self._prefill), False)
        prompt = self._tokens(tokens)
        start = time.perf_counter()
        self._run(self._prefill, prompt, 0, [0])
        return time.perf_counter() - start

    def logits(self, tokens: list[int]) -> list[float]:
        """After the last of a few tokens, of a new sequence."""
        made = self._context(len(tokens), 1)
        self._run(made, tokens, 0, [0])
        pointer = lib.llama_get_logits_ith(made, -1)
        return [float(value) for value in np.ctypeslib.as_array(pointer, (self._vocab,))]


def make(setup: Setup) -> Llama:
    return Llama(setup)
