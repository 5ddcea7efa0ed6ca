"""Prompts for the tiny models and what `transformers` says of them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

import numpy as np
import pytest
from numpy.typing import NDArray

from services.engine.checkpoint import WeightView
from services.engine.model import ModelConfig
from tests.support.backends import BACKENDS, has_device
from tests.support.models import TINY_MODELS, reference_logits

PROMPT_TOKENS = 150
CHUNKS = {"chunks-64": (64, 64, 22), "chunks-128": (128, 22), "whole": (150,)}

Loaded = tuple[ModelConfig, Mapping[str, WeightView]]

no_cuda = pytest.mark.skipif(not has_device("cuda"), reason="torch has no CUDA device here")
every_backend = pytest.mark.parametrize(
    "backend", [pytest.param(n, marks=no_cuda if n == "torch-cuda" else ()) for n in BACKENDS]
)
every_model = pytest.mark.parametrize("name", TINY_MODELS)


def prompt_for(name: str, length: int = PROMPT_TOKENS, seed: int = 1) -> list[int]:
    vocab = TINY_MODELS[name][1]["vocab_size"]
    prompt: list[int] = np.random.default_rng(seed).integers(0, vocab, length).tolist()
    return prompt


@cache
def prompt_logits(name: str) -> NDArray[np.float32]:
    return reference_logits(name, np.array(prompt_for(name), np.int32))


def bits(array: NDArray[np.generic]) -> bytes:
    return np.ascontiguousarray(array).tobytes()
