"""What is about the torch backend alone; the rest is in tests/contract/test_backend.py."""

from __future__ import annotations

import os
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from services.engine import torch_backend
from services.engine.errors import ModelError, NumericsError
from services.engine.torch_backend import TorchBackend
from services.engine.torch_device import make_exact, parse_device
from services.kv.heap import HeapPages
from services.kv.layout import KvLayout
from services.ops.errors import ConfigError
from tests.support.backends import Runner
from tests.support.oracle import (
    Loaded,
    prompt_for,
    prompt_logits,
)


def test_numerics_class_names_what_decides_the_bits(name: str, loaded: Loaded) -> None:
    """The numerics class holds torch's version, the device's kernels, the dtype and the tile."""
    config, weights = loaded
    pages = HeapPages(KvLayout(config.layers, 1, config.kv_heads, config.head_dim, "f32"), 1)
    parts = TorchBackend(config, weights, pages, compute_dtype="bfloat16").numerics.split("/")
    assert parts[0].startswith("torch-2.")
    assert parts[1].startswith("cpu-")
    assert parts[2:] == ["bfloat16", "tile16"]
    wide = TorchBackend(config, weights, pages, tile=64)
    assert wide.numerics.endswith("/float32/tile64")


def test_bfloat16_compute_is_near_float32(name: str, loaded: Loaded) -> None:
    """compute_dtype rounds weights and activations only: the logits stay near the reference."""

    def bfloat16(*arguments: object) -> TorchBackend:
        return TorchBackend(*arguments, compute_dtype="bfloat16")  # type: ignore[arg-type]

    logits = Runner(bfloat16, *loaded).feed((0, prompt_for(name)))
    assert np.abs(logits - prompt_logits(name)).max() < 0.25


def test_unknown_compute_dtype_is_refused(name: str, loaded: Loaded) -> None:
    """A compute_dtype torch cannot serve is refused by name."""
    config, weights = loaded
    pages = HeapPages(KvLayout(config.layers, 1, config.kv_heads, config.head_dim, "f32"), 1)
    with pytest.raises(ModelError, match="compute_dtype"):
        TorchBackend(config, weights, pages, compute_dtype="int4")


@pytest.mark.parametrize(
    ("module", "function", "step"),
    [
        (torch.nn.functional, "linear", "queries"),
        (torch, "rsqrt", "queries"),
        (torch_backend, "_attention", "attention"),
        (torch_backend, "_silu", "perceptron"),
    ],
)
def test_a_device_whose_rows_depend_on_their_place_is_refused(
    name: str,
    loaded: Loaded,
    monkeypatch: pytest.MonkeyPatch,
    module: ModuleType,
    function: str,
    step: str,
) -> None:
    """A device that rounds the rows of a step differently cannot keep T0: it stops at start."""
    exact = getattr(module, function)

    def crooked(*arguments: Any) -> torch.Tensor:
        result: torch.Tensor = exact(*arguments)
        result[0] *= 1 + 1e-6
        return result

    monkeypatch.setattr(module, function, crooked)
    with pytest.raises(NumericsError, match=f"{step}.*depends on its place"):
        Runner(TorchBackend, *loaded)


def test_an_accelerator_is_told_to_be_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """TF32, sums in half precision and kernels that add in any order are off; a CPU is left alone."""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    products = torch.backends.cuda.matmul
    try:
        torch.set_float32_matmul_precision("high")
        make_exact(torch.device("cpu"))
        assert products.allow_tf32
        assert not torch.are_deterministic_algorithms_enabled()
        make_exact(torch.device("cuda"))
        assert not products.allow_tf32
        assert not products.allow_bf16_reduced_precision_reduction
        assert not products.allow_fp16_reduced_precision_reduction
        assert torch.are_deterministic_algorithms_enabled()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_float32_matmul_precision("highest")


def test_a_device_that_is_not_there_is_refused() -> None:
    """The message names the option and the device, and comes before any weight is read."""
    with pytest.raises(ConfigError, match="device: torch cannot use 'abacus'"):
        parse_device("abacus")
