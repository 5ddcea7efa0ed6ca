"""What is about the torch backend alone; the rest is in tests/contract/test_backend.py."""

from __future__ import annotations

import numpy as np
import pytest

from services.engine.errors import ModelError, NumericsError
from services.engine.torch_backend import TorchBackend
from services.kv.layout import KvLayout
from tests.support.backends import Runner
from tests.support.models import MemoryPages
from tests.support.oracle import (
    Loaded,
    prompt_for,
    prompt_logits,
)


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
