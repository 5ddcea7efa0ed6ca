"""OpenVINO GenAI's continuous batching: requests in, `step()` until they are done.

Prefix caching is on: the streams of a decode share the KV of their prompt, which favours it. A prompt
that is timed begins with a token of its own, so nothing of it is cached.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import openvino as ov
import openvino_genai as genai

from baton.bench.engine.engines import Setup
from baton.bench.engine.peers import openvino_model
from baton.bench.engine.peers.source import converted
from baton.bench.engine.shapes import SHAPES

BATCH_TOKENS = 4096


class OpenVino:
    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self._random = np.random.default_rng(1)
        self._requests = 0
        directory = converted(
            setup.weights,
            lambda path: openvino_model.write(setup.config, setup.checkpoint, setup.format, path),
        )
        scheduler = genai.SchedulerConfig()
        scheduler.max_num_batched_tokens = BATCH_TOKENS
        scheduler.max_num_seqs = setup.streams_max
        scheduler.enable_prefix_caching = True
        scheduler.cache_size = 2  # GiB
        properties: dict[str, Any] = {
            "INFERENCE_NUM_THREADS": setup.threads, "PERFORMANCE_HINT": "LATENCY",
            "ENABLE_CPU_PINNING": False,
            "INFERENCE_PRECISION_HINT": "bf16" if setup.format == "bf16" else "f32",
        }  # fmt: skip
        self._pipe = genai.ContinuousBatchingPipeline(str(directory), scheduler, "CPU", properties)

    def facts(self) -> dict[str, Any]:
        return {
            "version": genai.__version__, "openvino": ov.__version__,
            "flags": "continuous batching, prefix caching, KV u8 (its default on CPU)",
            "bits_per_weight": SHAPES[self._setup.shape].bits_per_weight(self._bits),
            "kv_bytes_per_token": self._setup.kv_values_per_token,
        }  # fmt: skip

    def _bits(self, name: str, sizes: tuple[int, ...]) -> float:
        head = name == SHAPES[self._setup.shape].head
        return openvino_model.bits_per_weight(self._setup.format, sizes[1], head)

    def _tokens(self, count: int) -> list[int]:
        return [
            int(token)
            for token in self._random.integers(1, self._setup.config["vocab_size"], count)
        ]

    def _add(self, tokens: list[int], new: int) -> Any:
        generation = genai.GenerationConfig()
        generation.max_new_tokens, generation.ignore_eos = new, True
        generation.do_sample = False
        self._requests += 1
        ids = ov.Tensor(np.array([tokens], np.int64))
        return self._pipe.add_request(self._requests, ids, generation)

    def decode(self, streams: int, context: int, steps: int) -> list[float]:
        """Steps in which every stream was past its prompt; the last one ends the requests."""
        prompt = np.random.default_rng(context).integers(
            1, self._setup.config["vocab_size"], context
        )
        tokens = [int(token) for token in prompt]
        self._prime(tokens)
        handles = [self._add(tokens, steps + 4) for _ in range(streams)]
        begun = 0
        while begun < streams:
            self._pipe.step()
            begun += sum(handle.can_read() and bool(handle.read()) for handle in handles)
        times: list[float] = []
        while self._pipe.has_non_finished_requests() and len(times) < steps:
            start = time.perf_counter()
            self._pipe.step()
            times.append(time.perf_counter() - start)
        self._finish(handles)
        return times

    def _prime(self, tokens: list[int]) -> None:
        """The prompt's KV is in the cache, for all streams."""
        self._finish([self._add(tokens, 1)])

    def _finish(self, handles: list[Any]) -> None:
        """Runs what is left. A request is dropped with its handle, so they are held until then."""
        while self._pipe.has_non_finished_requests():
            self._pipe.step()
        assert all(handle.can_read() for handle in handles), "a request was dropped"

    def prefill(self, tokens: int) -> float:
        prompt = self._tokens(tokens)
        start = time.perf_counter()
        self._finish([self._add(prompt, 1)])
        return time.perf_counter() - start


def make(setup: Setup) -> OpenVino:
    return OpenVino(setup)
