"""Picks the backend for a device name; the only place that knows which there are."""

from __future__ import annotations

from services.engine.backend import Backend
from services.engine.checkpoint import load_weights
from services.engine.model import ModelConfig
from services.engine.native_backend import NativeBackend
from services.kv.arena import Arena


def load_backend(device: str, directory: str, config: ModelConfig, arena: Arena) -> Backend:
    """`cpu` is the native engine; `cuda`, `xpu`, `npu` and `torch-cpu` go through torch."""
    weights = load_weights(directory, config)
    if device == "cpu":
        return NativeBackend(config, weights, arena)
    from services.engine.torch_backend import TorchBackend  # torch takes a second to import

    return TorchBackend(config, weights, arena, device=device.removeprefix("torch-"))
