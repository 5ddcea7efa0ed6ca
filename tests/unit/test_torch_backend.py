"""What is about the torch backend alone; the rest is in tests/contract/test_backend.py."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from services.engine.checkpoint import WeightView, load_weights
from services.engine.errors import ModelError, NumericsError
from services.engine.model import ModelConfig
from services.engine.torch_backend import TorchBackend
from services.kv.layout import KvLayout
from tests.support.backends import BACKENDS, Runner
from tests.support.models import TINY_MODELS, MemoryPages, reference_logits, save_tiny_model

PROMPT_TOKENS = 150
CHUNKS = {"chunks-64": (64, 64, 22), "chunks-128": (128, 22), "whole": (150,)}

Loaded = tuple[ModelConfig, Mapping[str, WeightView]]

every_backend = pytest.mark.parametrize("backend", BACKENDS)
every_model = pytest.mark.parametrize("name", TINY_MODELS)


@pytest.fixture(scope="session")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tiny")
    return {name: save_tiny_model(name, root / name) for name in TINY_MODELS}


@pytest.fixture
def loaded(directories: dict[str, Path], name: str) -> Loaded:
    config = ModelConfig.load(directories[name])
    return config, load_weights(directories[name], config)


@pytest.fixture
def name() -> str:
    """The model of a test that does not go through all: it has grouped heads and a window."""
    return "mistral-window"


def prompt_for(name: str, length: int = PROMPT_TOKENS, seed: int = 1) -> list[int]:
    vocab = TINY_MODELS[name][1]["vocab_size"]
    prompt: list[int] = np.random.default_rng(seed).integers(0, vocab, length).tolist()
    return prompt


@cache
def prompt_logits(name: str) -> NDArray[np.float32]:
    return reference_logits(name, np.array(prompt_for(name), np.int32))


def bits(array: NDArray[np.generic]) -> bytes:
    return np.ascontiguousarray(array).tobytes()


def test_numerics_class_names_what_decides_the_bits(name: str, loaded: Loaded) -> None:
    """The numerics class holds torch's version, the device's kernels, the dtype and the tile."""
    config, weights = loaded
    pages = MemoryPages(KvLayout(config.layers, 1, config.kv_heads, config.head_dim, "f32"), 1)
    parts = TorchBackend(config, weights, pages, compute_dtype="bfloat16").numerics.split("/")
    assert parts[0].startswith("torch-2.")
    assert parts[1].startswith("cpu-")
    assert parts[2:] == ["bfloat16", "tile16"]


def test_bfloat16_compute_is_near_float32(name: str, loaded: Loaded) -> None:
    """compute_dtype rounds weights and activations only: the logits stay near the reference."""

    def bfloat16(*arguments: object) -> TorchBackend:
        return TorchBackend(*arguments, compute_dtype="bfloat16")  # type: ignore[arg-type]

    logits = Runner(bfloat16, *loaded).feed((0, prompt_for(name)))
    assert np.abs(logits - prompt_logits(name)).max() < 0.25


def test_unknown_compute_dtype_is_refused(name: str, loaded: Loaded) -> None:
    """A compute_dtype torch cannot serve is refused by name."""
    config, weights = loaded
    pages = MemoryPages(KvLayout(config.layers, 1, config.kv_heads, config.head_dim, "f32"), 1)
    with pytest.raises(ModelError, match="compute_dtype"):
        TorchBackend(config, weights, pages, compute_dtype="int4")


def test_a_device_whose_rows_depend_on_their_place_is_refused(
    name: str, loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A device that rounds the rows of a product differently cannot keep T0: it stops at start."""
    import torch

    exact = torch.nn.functional.linear

    def crooked(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        result = exact(x, weight, bias)
        result[0] *= 1 + 1e-6
        return result

    monkeypatch.setattr(torch.nn.functional, "linear", crooked)
    with pytest.raises(NumericsError, match="depends on its place"):
        Runner(TorchBackend, *loaded)
